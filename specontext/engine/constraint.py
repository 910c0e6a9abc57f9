"""One output on its way through a grammar, and the masks of all outputs that follow one in a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from specontext.core import Request, SpeContextError, Thinking
from specontext.engine.detokenizer import Detokenizer
from specontext.engine.failures import Failures
from specontext.grammars.grammar import Grammar


class ConstraintError(SpeContextError):
    """An output cannot go on in its grammar."""


class Constraint:
    """Follows one output; its thinking is free, where that is told apart, and the grammar begins behind it.

    Where the output may begin to think, its first token is one of the grammar or the opening mark, if that is a single token.
    """

    def __init__(self, grammar: Grammar, thinking: Thinking | None) -> None:
        self.mask_words = grammar.mask_words
        self._state = grammar.begin()
        self._thinks = thinking is not None and thinking.inside
        self._may_think = thinking.begin_id if thinking is not None and not thinking.inside else None

    @property
    def active(self) -> bool:
        """Whether the next token is the grammar's to allow."""
        return not self._thinks

    @property
    def complete(self) -> bool:
        """Whether the output can only end."""
        return self.active and self._state.complete

    def fill(self, row: Tensor) -> None:
        """Write which tokens may come next to `row`, int32 [words], in host memory."""
        self._state.fill(row.data_ptr(), row.numel() * row.element_size())
        if self._state.error:
            raise ConstraintError(f"the output cannot go on in its grammar: {self._state.error}")
        if self._may_think is not None:
            word, bit = divmod(self._may_think, 32)
            row[word] |= 1 << bit if bit < 31 else -(1 << 31)

    def accept(self, token: int, detokenizer: Detokenizer) -> None:
        """Take the output's next token, which the detokenizer has taken already.

        Raises:
            ConstraintError: the grammar does not allow it.
        """
        if self._thinks:
            self._end_thinking(detokenizer)
        elif token == self._may_think:
            self._thinks = True
        elif not self._state.accept(token):
            raise ConstraintError(f"token {token} is not one that the grammar allows here: {self._state.error}")
        self._may_think = None

    def _end_thinking(self, detokenizer: Detokenizer) -> None:
        begun = detokenizer.text.lstrip()  # a mark of several tokens may end inside one, which goes on with the answer
        self._thinks = detokenizer.thinking is None or not detokenizer.thinking.over
        if begun and not self._thinks and not self._state.accept_text(begun):
            raise ConstraintError("the answer began amid the token that ended the thinking, and the grammar does not allow it")


class Masks:
    """Writes masks of a step while the device computes, and copies them to it.

    Args:
        device: where the logits are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._host = torch.empty((0, 0), dtype=torch.int32)

    def fill(self, pairs: Iterable[tuple[Request, Constraint | None]], failures: Failures) -> None:
        """Set `Request.allowed` of every request for its next token; requests whose grammar fails are among the failures."""
        following: list[tuple[Request, Constraint]] = []
        for request, constraint in pairs:
            request.allowed = None
            if constraint is not None and constraint.active:
                following.append((request, constraint))
        if not following:
            return
        host = self._rows(len(following), following[0][1].mask_words)
        for (request, constraint), row in zip(following, host, strict=True):
            with failures.of(request.request_id):
                constraint.fill(row)
        # The step's end awaits its sampling, and with it this copy, before the rows are written again.
        rows: Sequence[Tensor] = host.to(self.device, non_blocking=True).unbind()
        for (request, _), row in zip(following, rows, strict=True):
            request.allowed = row

    def _rows(self, count: int, words: int) -> Tensor:
        if len(self._host) < count or self._host.shape[1] != words:
            self._host = torch.empty((count, words), dtype=torch.int32, pin_memory=self.device.type == "cuda")
        return self._host[:count]

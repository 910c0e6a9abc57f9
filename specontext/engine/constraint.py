"""One output on its way through a grammar, and the masks of all outputs that follow one in a step."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import numpy
import torch
from llguidance import LLExecutor, LLMatcher
from torch import Tensor

from specontext.core import Request, SpeContextError, Thinking
from specontext.engine.detokenizer import Detokenizer
from specontext.engine.failures import Failures
from specontext.grammars.grammar import Grammar

_MOST_THREADS = 8
_ALONE = 1 << 16  # words of masks that one thread writes: 16 requests with a vocabulary of 131,072


class ConstraintError(SpeContextError):
    """An output cannot go on in its grammar."""


class Constraint:
    """Follows one output; its thinking is free, where that is told apart, and the grammar begins behind it.

    Where the output may begin to think, its first token is one of the grammar or the opening mark, if that is a single token.

    Attributes:
        may_think: the opening mark's token, where it may come next.
    """

    def __init__(self, grammar: Grammar, thinking: Thinking | None) -> None:
        self.mask_words = grammar.mask_words
        self._state = grammar.begin()
        self._thinks = thinking is not None and thinking.inside
        self.may_think = thinking.begin_id if thinking is not None and not thinking.inside else None

    @property
    def active(self) -> bool:
        """Whether the next token is the grammar's to allow."""
        return not self._thinks

    @property
    def complete(self) -> bool:
        """Whether the output can only end."""
        return self.active and self._state.complete

    @property
    def matcher(self) -> LLMatcher:
        return self._state.matcher

    @property
    def failed(self) -> bool:
        """Whether the grammar has become too complex for its limits."""
        return bool(self._state.matcher.is_error())

    def failure(self) -> ConstraintError:
        return ConstraintError(f"the output cannot go on in its grammar: {self._state.error}")

    def accept(self, token: int, detokenizer: Detokenizer) -> None:
        """Take the output's next token, which the detokenizer has taken already.

        Raises:
            ConstraintError: the grammar does not allow it.
        """
        if self._thinks:
            self._end_thinking(detokenizer)
        elif token == self.may_think:
            self._thinks = True
        elif not self._state.accept(token):
            raise ConstraintError(f"token {token} is not one that the grammar allows here: {self._state.error}")
        self.may_think = None

    def _end_thinking(self, detokenizer: Detokenizer) -> None:
        begun = detokenizer.text.lstrip()  # a mark of several tokens may end inside one, which goes on with the answer
        self._thinks = detokenizer.thinking is None or not detokenizer.thinking.over
        if begun and not self._thinks and not self._state.accept_text(begun):
            raise ConstraintError("the answer began amid the token that ended the thinking, and the grammar does not allow it")


class Masks:
    """Writes the masks of a step, on the host, while a GPU computes what they are for.

    Args:
        device, vocab_size: of the logits.
    """

    def __init__(self, device: torch.device, vocab_size: int) -> None:
        self.device, self.vocab_size = device, vocab_size
        self._filling: LLExecutor | None = None  # threads, made when one is too slow
        self._host = torch.empty((0, 0), dtype=torch.int32)

    def fill(self, pairs: Iterable[tuple[Request, Constraint | None]], failures: Failures) -> None:
        """Set `Request.allowed` of every request for its next token; those whose grammar fails are among the failures."""
        following: list[tuple[Request, Constraint]] = []
        for request, constraint in pairs:
            request.allowed = None
            if constraint is not None and constraint.active:
                following.append((request, constraint))
        if not following:
            return
        masks = self._written([constraint for _, constraint in following])
        for (request, constraint), row in zip(following, masks.unbind(), strict=True):
            if constraint.failed:
                failures.add(constraint.failure(), request.request_id)
            if constraint.may_think is not None:
                row[constraint.may_think] = True
            request.allowed = row

    def _written(self, following: Sequence[Constraint]) -> Tensor:
        """What each of them allows next, bool [R, V] on the device."""
        count, words = len(following), following[0].mask_words
        if len(self._host) < count or self._host.shape[1] != words:
            self._host = torch.empty((count, words), dtype=torch.int32, pin_memory=self.device.type == "cuda")
        address, num_bytes = self._host.data_ptr(), words * self._host.element_size()
        if count * words <= _ALONE:  # waking others takes longer
            for number, constraint in enumerate(following):
                constraint.matcher.unsafe_compute_mask_ptr(address + number * num_bytes, num_bytes)
        else:
            matchers = [(constraint.matcher, number) for number, constraint in enumerate(following)]
            if self._filling is None:
                self._filling = LLExecutor(num_threads=max(1, min(_MOST_THREADS, (os.cpu_count() or 1) // 2)))
            self._filling.unsafe_compute_mask_ptr(matchers, address, num_bytes, count)
        # The end of the step awaits its sampling, and with it this copy, before these bits are written again.
        return unpacked(self._host[:count].to(self.device, non_blocking=True), self.vocab_size)


def unpacked(bits: Tensor, size: int) -> Tensor:
    """Masks int32 [R, words], the lowest bit first, as bool [R, size]."""
    if not bits.is_cuda:
        flat = numpy.unpackbits(bits.numpy().view(numpy.uint8), axis=1, count=size, bitorder="little")
        return torch.from_numpy(flat.view(numpy.bool_))
    places = torch.arange(32, dtype=torch.int32, device=bits.device)
    return ((bits.unsqueeze(2) >> places) & 1).flatten(1)[:, :size].bool()

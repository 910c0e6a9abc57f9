"""One output on its way through a grammar, and the masks of all outputs that follow one in a step."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy
import torch
from llguidance import LLExecutor, LLMatcher
from torch import Tensor

from specontext.core import Request, SpeContextError, Thinking
from specontext.engine.detokenizer import Detokenizer
from specontext.engine.failures import Failures
from specontext.grammars.grammar import Grammar

_MOST_THREADS = 8


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

    def check(self) -> None:
        """Raises ConstraintError where the grammar has become too complex for its limits."""
        if self._state.error:
            raise ConstraintError(f"the output cannot go on in its grammar: {self._state.error}")

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
    """Writes the masks of a step in a thread of its own while the model computes.

    Args:
        device, vocab_size: of the logits.
    """

    def __init__(self, device: torch.device, vocab_size: int) -> None:
        self.device, self.vocab_size = device, vocab_size
        self._threads: tuple[ThreadPoolExecutor, LLExecutor] | None = None  # made for the first request that follows a grammar
        self._host = torch.empty((0, 0), dtype=torch.int32)
        self._following: list[tuple[Request, Constraint]] = []
        self._written: Future[Tensor] | None = None

    def begin(self, pairs: Iterable[tuple[Request, Constraint | None]]) -> None:
        """Start to write which tokens may come next in these requests, of which each has all its tokens so far."""
        if self._written is not None:  # of a step that broke
            self._written.result()
        self._following, self._written = [], None
        for request, constraint in pairs:
            request.allowed = None
            if constraint is not None and constraint.active:
                self._following.append((request, constraint))
        if self._following:
            if self._threads is None:
                filling = LLExecutor(num_threads=max(1, min(_MOST_THREADS, (os.cpu_count() or 1) // 2)))
                self._threads = ThreadPoolExecutor(1, thread_name_prefix="specontext-masks"), filling
            self._written = self._threads[0].submit(self._write, self._threads[1])

    def finish(self, failures: Failures) -> None:
        """Set `Request.allowed` of all these requests; those whose grammar fails are among the failures."""
        if self._written is None:
            return
        written, self._written = self._written.result(), None
        if self.device.type != "cpu":  # the step's end awaits its sampling, and with it this copy, before it is written again
            written = unpacked(written.to(self.device, non_blocking=True), self.vocab_size)
        for (request, constraint), row in zip(self._following, written.unbind(), strict=True):
            with failures.of(request.request_id):
                constraint.check()
                if constraint.may_think is not None:
                    row[constraint.may_think] = True
            request.allowed = row
        self._following = []

    def close(self) -> None:
        """End the thread."""
        if self._threads is not None:
            self._threads[0].shutdown(wait=True)
            self._threads = None

    def _write(self, filling: LLExecutor) -> Tensor:
        """Bits on their way to a GPU, int32 [R, words], or the masks as they are used, bool [R, V]."""
        count, words = len(self._following), self._following[0][1].mask_words
        if len(self._host) < count or self._host.shape[1] != words:
            self._host = torch.empty((count, words), dtype=torch.int32, pin_memory=self.device.type == "cuda")
        matchers = [(constraint.matcher, number) for number, (_, constraint) in enumerate(self._following)]
        filling.unsafe_compute_mask_ptr(matchers, self._host.data_ptr(), words * self._host.element_size(), count)
        bits = self._host[:count]
        return bits if self.device.type != "cpu" else unpacked(bits, self.vocab_size)


def unpacked(bits: Tensor, size: int) -> Tensor:
    """Masks int32 [R, words], the lowest bit first, as bool [R, size]."""
    if not bits.is_cuda:
        flat = numpy.unpackbits(bits.numpy().view(numpy.uint8), axis=1, count=size, bitorder="little")
        return torch.from_numpy(flat.view(numpy.bool_))
    places = torch.arange(32, dtype=torch.int32, device=bits.device)
    return ((bits.unsqueeze(2) >> places) & 1).flatten(1)[:, :size].bool()

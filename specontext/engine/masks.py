"""Which tokens grammars allow next: the masks of all outputs of a step, written beside what they are for."""

from __future__ import annotations

import os
import weakref
from collections.abc import Collection, Iterable, Sequence
from queue import SimpleQueue
from threading import Thread

import numpy
import torch
from llguidance import LLExecutor, LLMatcher
from torch import Tensor

from specontext.core import AllowedTokens, Request
from specontext.engine.constraint import Constraint
from specontext.engine.failures import Failures
from specontext.kernels.token_masks import expanded

_MOST_THREADS = 8
_ALONE = 1 << 16  # words of masks that one thread writes: 16 requests with a vocabulary of 131,072


class Masks:
    """Writes the masks of a step on the host: while a GPU computes, or in a thread of its own where the host computes.

    Args:
        device: of the logits.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._threads: LLExecutor | None = None  # made when one is too slow
        self._beside: _Beside | None = None
        self._begun: list[tuple[Request, Constraint]] = []  # whose masks are being written beside the step
        # What was begun before: most steps have the same.
        self._last: tuple[list[tuple[Request, Constraint]], _Order] | None = None
        self._host = torch.empty((0, 0), dtype=torch.int32)
        self._added: Tensor | None = None  # the same for logits on a CPU, float32 [rows, 32 * words]

    def begin(self, pairs: Iterable[tuple[Request, Constraint | None]]) -> None:
        """Have the masks of these requests written from now on, if it is the host that computes the step."""
        if self.device.type != "cpu":
            return
        self._settle()  # a step that failed may have left some
        self._begun = following = _following(pairs)
        if not following:
            self._last = None
            return
        self._beside = self._beside or _Beside()
        if self._last is None or self._last[0] != following or self._last[1].marks:
            self._last = following, self._order([constraint for _, constraint in following])
            self._allow(following)
        self._beside.start(self._last[1])

    def fill(self, pairs: Iterable[tuple[Request, Constraint | None]], failures: Failures) -> None:
        """Have `Request.allowed` of every request say what may be its next token; those whose grammar fails are among the
        failures. Where masks of this step were begun, these requests are among those that they were begun for."""
        if following := self._begun:
            failed = self._settle()
        elif following := _following(pairs):
            self._last = None
            failed = self._write([constraint for _, constraint in following])
            self._allow(following)
        else:
            return
        for row in failed:
            request, constraint = following[row]
            failures.add(constraint.failure(), request.request_id)

    def _allow(self, following: Sequence[tuple[Request, Constraint]]) -> None:
        # The end of the step awaits its sampling, and with it this copy, before these bits are written again.
        count = len(following)
        masks = self._host[:count].to(self.device, non_blocking=True) if self._added is None else self._added[:count]
        for row, (request, _) in enumerate(following):
            request.allowed = AllowedTokens(masks, row)

    def _settle(self) -> Collection[int]:
        """Wait for what is written beside the step; the rows of those whose grammar failed."""
        begun, self._begun = self._begun, []
        if not begun:
            return ()
        assert self._beside is not None
        return self._beside.wait()

    def _write(self, following: Sequence[Constraint]) -> Collection[int]:
        """Write their masks now; the rows of those whose grammar failed."""
        order = self._order(following)
        if self._host.numel() <= _ALONE:  # waking others takes longer
            for matcher, row in order.matchers:
                matcher.unsafe_compute_mask_ptr(order.address + row * order.num_bytes, order.num_bytes)
        else:
            if self._threads is None:
                self._threads = LLExecutor(num_threads=max(1, min(_MOST_THREADS, (os.cpu_count() or 1) // 2)))
            order.compute(self._threads)
        return order.finish()

    def _order(self, following: Sequence[Constraint]) -> _Order:
        count, words = len(following), following[0].mask_words
        if len(self._host) < count or self._host.shape[1] != words:
            self._host = torch.empty((count, words), dtype=torch.int32, pin_memory=self.device.type == "cuda")
            self._added = torch.empty((count, 32 * words), dtype=torch.float32) if self.device.type == "cpu" else None
        matchers = [(constraint.matcher, row) for row, constraint in enumerate(following)]
        marks = [(row, constraint.may_think) for row, constraint in enumerate(following) if constraint.may_think is not None]
        return _Order(matchers, marks, self._host[:count], self._added[:count] if self._added is not None else None)


def _following(pairs: Iterable[tuple[Request, Constraint | None]]) -> list[tuple[Request, Constraint]]:
    """Those whose next token is their grammar's to allow; any is allowed to the others."""
    found = []
    for request, constraint in pairs:
        if constraint is not None and constraint.active:
            found.append((request, constraint))
        else:
            request.allowed = None
    return found


class _Order:
    """Masks that are to be written.

    Args:
        matchers: the library's, with the rows of their masks.
        marks: (row, token) of tokens that are allowed besides.
        host: int32 [matchers, words].
        added: float32 [matchers, 32 * words], to be written too; None for a GPU, which is given the bits.
    """

    def __init__(
        self, matchers: list[tuple[LLMatcher, int]], marks: list[tuple[int, int]], host: Tensor, added: Tensor | None
    ) -> None:
        self.matchers, self.marks, self._host, self._added = matchers, marks, host, added
        self.address, self.num_bytes = host.data_ptr(), host.shape[1] * host.element_size()

    def compute(self, threads: LLExecutor) -> None:
        """All in one call, in which Python's lock is not held."""
        threads.unsafe_compute_mask_ptr(self.matchers, self.address, self.num_bytes, len(self.matchers))

    def finish(self) -> list[int]:
        """The rest, once they are computed; the rows of grammars that failed."""
        if self.marks:
            bits = self._host.numpy().view(numpy.uint32)
            for row, token in self.marks:
                bits[row, token // 32] |= numpy.uint32(1 << token % 32)
        if self._added is not None:
            expanded(self._host, self._added)
        return [row for matcher, row in self.matchers if matcher.is_error()]


class _Beside:
    """A thread that writes masks."""

    def __init__(self) -> None:
        self._orders: SimpleQueue[_Order | None] = SimpleQueue()
        self._done: SimpleQueue[Exception | list[int]] = SimpleQueue()
        Thread(target=_follow, args=(self._orders, self._done), name="specontext-masks", daemon=True).start()
        weakref.finalize(self, self._orders.put, None)

    def start(self, order: _Order) -> None:
        self._orders.put(order)

    def wait(self) -> list[int]:
        """Wait for what was started: the rows of grammars that failed; raises what went wrong."""
        found = self._done.get()
        if isinstance(found, Exception):
            raise found
        return found


def _follow(orders: SimpleQueue[_Order | None], done: SimpleQueue[Exception | list[int]]) -> None:
    threads = LLExecutor(num_threads=1)  # the others compute
    while (order := orders.get()) is not None:
        try:
            order.compute(threads)
            done.put(order.finish())
        except Exception as error:
            done.put(error)

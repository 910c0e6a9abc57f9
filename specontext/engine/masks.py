"""Which tokens grammars allow next: the masks of all outputs of a step, written beside what they are for."""

from __future__ import annotations

import os
import weakref
from collections.abc import Collection, Iterable, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy
import torch
from llguidance import LLExecutor, LLMatcher

from specontext.core import AllowedTokens, Request
from specontext.engine.constraint import Constraint
from specontext.engine.failures import Failures

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
        self._rows: dict[str, int] = {}  # of requests whose masks are being written beside the step
        self._host = torch.empty((0, 0), dtype=torch.int32)

    def begin(self, pairs: Iterable[tuple[Request, Constraint | None]]) -> None:
        """Have the masks of these requests written from now on, if it is the host that computes the step."""
        if self.device.type != "cpu":
            return
        self._settle()  # a step that failed may have left some
        if following := {request.request_id: c for request, c in pairs if c is not None and c.active}:
            self._beside = self._beside or _Beside()
            self._beside.start(self._orders(list(following.values())))
            self._rows = {name: row for row, name in enumerate(following)}

    def fill(self, pairs: Iterable[tuple[Request, Constraint | None]], failures: Failures) -> None:
        """Set `Request.allowed` of every request for its next token; those whose grammar fails are among the failures."""
        following: list[tuple[Request, Constraint]] = []
        for request, constraint in pairs:
            request.allowed = None
            if constraint is not None and constraint.active:
                following.append((request, constraint))
        rows, failed = self._settle()
        if not following:
            return
        if any(request.request_id not in rows for request, _ in following):
            failed = self._write([constraint for _, constraint in following])
            rows = {request.request_id: row for row, (request, _) in enumerate(following)}
        bits = self._host.numpy().view(numpy.uint32)
        for request, constraint in following:
            if (token := constraint.may_think) is not None:
                bits[rows[request.request_id], token // 32] |= numpy.uint32(1 << token % 32)
            if failed and rows[request.request_id] in failed:
                failures.add(constraint.failure(), request.request_id)
        # The end of the step awaits its sampling, and with it this copy, before these bits are written again.
        masks = self._host[: len(rows)].to(self.device, non_blocking=True)
        for request, _ in following:
            request.allowed = AllowedTokens(masks, rows[request.request_id])

    def _settle(self) -> tuple[dict[str, int], Collection[int]]:
        """Wait for what is written beside the step; its rows, and those whose grammar failed."""
        rows, self._rows = self._rows, {}
        if not rows:
            return rows, ()
        assert self._beside is not None
        return rows, self._beside.wait()

    def _write(self, following: Sequence[Constraint]) -> Collection[int]:
        """Write their masks now; the rows of those whose grammar failed."""
        matchers, address, num_bytes, count = self._orders(following)
        if self._host.numel() <= _ALONE:  # waking others takes longer
            for matcher, row in matchers:
                matcher.unsafe_compute_mask_ptr(address + row * num_bytes, num_bytes)
        else:
            if self._threads is None:
                self._threads = LLExecutor(num_threads=max(1, min(_MOST_THREADS, (os.cpu_count() or 1) // 2)))
            self._threads.unsafe_compute_mask_ptr(matchers, address, num_bytes, count)
        return _failed(matchers)

    def _orders(self, following: Sequence[Constraint]) -> tuple[list[tuple[LLMatcher, int]], int, int, int]:
        """What the library is told: matchers with their rows, the address of the masks, bytes of one, and how many there are."""
        count, words = len(following), following[0].mask_words
        if len(self._host) < count or self._host.shape[1] != words:
            self._host = torch.empty((count, words), dtype=torch.int32, pin_memory=self.device.type == "cuda")
        matchers = [(constraint.matcher, row) for row, constraint in enumerate(following)]
        return matchers, self._host.data_ptr(), words * self._host.element_size(), count


class _Beside:
    """A thread that writes masks. All of a step are one call, in which it does not hold Python's lock."""

    def __init__(self) -> None:
        self._orders: SimpleQueue[Any] = SimpleQueue()
        self._done: SimpleQueue[Exception | list[int]] = SimpleQueue()
        Thread(target=_follow, args=(self._orders, self._done), name="specontext-masks", daemon=True).start()
        weakref.finalize(self, self._orders.put, None)

    def start(self, orders: tuple[Any, ...]) -> None:
        self._orders.put(orders)

    def wait(self) -> list[int]:
        """Wait for what was started: the rows of grammars that failed; raises what went wrong."""
        found = self._done.get()
        if isinstance(found, Exception):
            raise found
        return found


def _failed(matchers: Sequence[tuple[LLMatcher, int]]) -> list[int]:
    return [row for matcher, row in matchers if matcher.is_error()]


def _follow(orders: SimpleQueue[Any], done: SimpleQueue[Exception | list[int]]) -> None:
    threads = LLExecutor(num_threads=1)  # the others compute
    while (order := orders.get()) is not None:
        try:
            threads.unsafe_compute_mask_ptr(*order)
            done.put(_failed(order[0]))
        except Exception as error:
            done.put(error)

"""Which tokens grammars allow next: the masks of all outputs of a step, written beside what they are for."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy
import torch
from llguidance import LLExecutor

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
        rows = self._settle()
        if not following:
            return
        if any(request.request_id not in rows for request, _ in following):
            self._write([constraint for _, constraint in following])
            rows = {request.request_id: row for row, (request, _) in enumerate(following)}
        bits = self._host.numpy().view(numpy.uint32)
        for request, constraint in following:
            if constraint.failed:
                failures.add(constraint.failure(), request.request_id)
            if (token := constraint.may_think) is not None:
                bits[rows[request.request_id], token // 32] |= numpy.uint32(1 << token % 32)
        # The end of the step awaits its sampling, and with it this copy, before these bits are written again.
        masks = self._host[: len(rows)].to(self.device, non_blocking=True)
        for request, _ in following:
            request.allowed = AllowedTokens(masks, rows[request.request_id])

    def _settle(self) -> dict[str, int]:
        """Wait for what is written beside the step; its rows."""
        rows, self._rows = self._rows, {}
        if rows:
            assert self._beside is not None
            self._beside.wait()
        return rows

    def _write(self, following: Sequence[Constraint]) -> None:
        """Write their masks now."""
        matchers, address, num_bytes, count = self._orders(following)
        if self._host.numel() <= _ALONE:  # waking others takes longer
            for matcher, row in matchers:
                matcher.unsafe_compute_mask_ptr(address + row * num_bytes, num_bytes)
        else:
            if self._threads is None:
                self._threads = LLExecutor(num_threads=max(1, min(_MOST_THREADS, (os.cpu_count() or 1) // 2)))
            self._threads.unsafe_compute_mask_ptr(matchers, address, num_bytes, count)

    def _orders(self, following: Sequence[Constraint]) -> tuple[list[tuple[Any, int]], int, int, int]:
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
        self._done: SimpleQueue[Exception | None] = SimpleQueue()
        Thread(target=_follow, args=(self._orders, self._done), name="specontext-masks", daemon=True).start()
        weakref.finalize(self, self._orders.put, None)

    def start(self, orders: tuple[Any, ...]) -> None:
        self._orders.put(orders)

    def wait(self) -> None:
        """Wait for what was started; raises what went wrong."""
        if (error := self._done.get()) is not None:
            raise error


def _follow(orders: SimpleQueue[Any], done: SimpleQueue[Exception | None]) -> None:
    threads = LLExecutor(num_threads=1)  # the others compute
    while (order := orders.get()) is not None:
        try:
            threads.unsafe_compute_mask_ptr(*order)
            done.put(None)
        except Exception as error:
            done.put(error)

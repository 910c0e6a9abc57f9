"""Decode steps as CUDA graphs: captured once for a size of batch and context, replayed without a decision of the host.

A captured step reads and writes the engine's own tables, so it stays valid while requests come and go, grow, and layers move
between the tiers. What differs is the number of requests, the span of positions that compete, and the way in which the requests
choose: one graph for each of these, captured when it is first needed or to warm up; for choices that requests name, once they
have recurred. Requests are padded to the next size by rows with negative positions, which every kernel passes over.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specontext.core import Batch, Choice, Lane

logger = logging.getLogger("specontext")
LEAST_SPAN = 4096
DecodeStep = Callable[[Batch], Tensor]
RECURS = 4  # eager steps of requests that choose in a way of their own, before one is captured: it costs about as much
NAMED = 16  # graphs that are kept for such choices, of which clients may name any number
PARTS = 5  # token ids, positions, seats, lengths, seeds


@dataclass(frozen=True)
class _Kind:
    """What one graph serves; `choice` is None for the engine's own."""

    choice: Choice | None
    size: int
    span: int


@dataclass(frozen=True)
class _Captured:
    """A recorded step, and what it reads and writes outside of the graph's own memory."""

    graph: torch.cuda.CUDAGraph
    numbers: Tensor
    padding: Tensor
    batch: Batch
    logits: Tensor


class DecodeGraphs:
    """Captured steps by size.

    Whoever has the graphs gives the step with every call: it runs a batch of decode tokens and returns logits [R, V]. If the
    graphs kept it, they and the engine would keep each other alive.

    Args:
        seats: number of seats; the row of that number belongs to none.
        max_tokens: longest context.
    """

    def __init__(self, *, seats: int, max_tokens: int, device: torch.device) -> None:
        self._seats, self._max_tokens, self._device = seats, max_tokens, device
        self._captured: dict[_Kind, _Captured] = {}  # the one that ran last at the end
        self._met: Counter[_Kind] = Counter()
        self._pool: Any = None

    def warm_up(self, step: DecodeStep) -> None:
        """Capture a step of every size, for short contexts."""
        for size in sorted({requests_bucket(requests, self._seats) for requests in range(1, self._seats + 1)}):
            self._of(_Kind(None, size, span_bucket(1, self._max_tokens)), step)

    def _kind(self, lane: Lane) -> _Kind:
        size = requests_bucket(lane.stop - lane.start, self._seats)
        return _Kind(lane.choice, size, span_bucket(lane.span, self._max_tokens))

    def takes(self, lane: Lane) -> bool:
        """Whether decode tokens that choose alike run as a graph; ways that requests name do after some steps."""
        kind = self._kind(lane)
        return kind.choice is None or kind in self._captured or self._met[kind] >= RECURS

    def meet(self, lane: Lane) -> None:
        """Count an eager step of decode tokens that `takes` did not take."""
        if len(self._met) > 64 * NAMED:  # whoever names ever new budgets is not worth remembering
            self._met.clear()
        self._met[self._kind(lane)] += 1

    def _of(self, kind: _Kind, step: DecodeStep) -> _Captured:
        captured = self._captured.pop(kind, None)
        if captured is None:
            named = [other for other in self._captured if other.choice is not None]
            if kind.choice is not None and len(named) >= NAMED:
                torch.cuda.synchronize(self._device)
                del self._captured[named[0]]
            captured = self._capture(kind, step)
        self._captured[kind] = captured
        return captured

    def run(self, batch: Batch, step: DecodeStep) -> Tensor:
        """Logits [R, V] of a batch of decode tokens that choose alike; valid until the next run."""
        [lane] = batch.lanes
        kind = self._kind(lane)
        captured = self._of(kind, step)
        columns = (batch.token_ids, batch.positions, batch.seats, batch.lengths, batch.seeds)
        if batch.num_decodes == kind.size:
            torch.stack(columns, out=captured.numbers)
        else:
            torch.cat((torch.stack(columns), captured.padding[:, batch.num_decodes :]), dim=1, out=captured.numbers)
        captured.graph.replay()
        return captured.logits[: batch.num_decodes]

    def close(self) -> None:
        """Give the graphs' memory back."""
        self._captured.clear()
        self._met.clear()

    def _capture(self, kind: _Kind, step: DecodeStep) -> _Captured:
        """Record a step of padding, which changes nothing when it is run to warm up."""
        padding = _padding(kind.size, self._seats, self._device)
        numbers = padding.clone()
        batch = decode_batch(numbers, kind.span, kind.choice)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # Other threads may pin memory or copy meanwhile: only this thread's calls are checked.
        capture = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
        # Libraries keep a workspace for every stream that they have seen. So all steps warm up on the one stream on which all are
        # captured: with streams of their own they would hold another 32 MiB each on an H100, and nobody would give them back.
        side = capture.capture_stream
        assert side is not None
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2 if kind.choice is None else 1):  # ways that requests name have run before
                step(batch)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize(self._device)
        with capture:
            logits = step(batch)
        logger.debug("captured a decode step of %d requests and %d positions", kind.size, kind.span)
        return _Captured(graph, numbers, padding, batch, logits)


def decode_batch(numbers: Tensor, span: int, choice: Choice | None = None) -> Batch:
    """A batch of decode tokens that choose alike, from int64 [PARTS, R] on the device."""
    token_ids, positions, seats, lengths, seeds = numbers.unbind()
    count = numbers.shape[1]
    last = torch.arange(count, device=numbers.device)
    return Batch(token_ids, positions, seats, lengths, seeds, count, (), last, span, (Lane(choice, 0, count, span),))


def _padding(size: int, seats: int, device: torch.device) -> Tensor:
    """int64 [PARTS, size]: token 0 at position -1 of the row that is no seat's."""
    numbers = torch.zeros((PARTS, size), dtype=torch.int64, device=device)
    numbers[1] = -1
    numbers[2] = seats
    return numbers


def requests_bucket(requests: int, seats: int) -> int:
    """Sizes of captured steps: 1, 2, 4, 8, then multiples of 8, and the number of seats."""
    size = 1 << (requests - 1).bit_length() if requests <= 8 else -(-requests // 8) * 8
    return min(size, max(seats, requests))


def span_bucket(span: int, max_tokens: int) -> int:
    """Spans of captured steps: powers of two from `LEAST_SPAN` on, and the longest context."""
    return min(max(LEAST_SPAN, 1 << (span - 1).bit_length()), max_tokens)

"""Decode steps as CUDA graphs: captured once for a size of batch and context, replayed without a decision of the host.

A captured step reads and writes the engine's own tables, so it stays valid while requests come and go, grow, and layers move
between the tiers. What differs is the number of requests, the span of positions that compete, and the way in which the requests
choose: one graph for each of these. Those of the engine's own way are all captured to warm up; those of choices that requests
name, once they have recurred. Requests are padded to the next size by rows with negative positions, which every kernel passes
over. All graphs write their logits to one place, and share the memory in which they compute.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
GRAPH_LAYER = 256 << 10  # bytes of a graph for each layer of the model; its nodes lie outside of PyTorch's allocator
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
    """

    def __init__(self, *, seats: int, device: torch.device) -> None:
        self._seats, self._device = seats, device
        self._captured: dict[_Kind, _Captured] = {}  # the one that ran last at the end
        self._met: Counter[_Kind] = Counter()
        self._warm: set[bool] = set()  # whether steps of one request, and of several, have run: they are compiled apart
        self._logits: Tensor | None = None
        self._pool: Any = None

    def warm_up(self, spans: Sequence[int], step: DecodeStep) -> None:
        """Capture steps of the engine's own way, of all sizes and spans. The largest come first: what follows finds room in the
        memory that they have computed in."""
        for span in sorted(spans, reverse=True):
            for size in reversed(sizes(self._seats)):
                self._of(_Kind(None, size, span), step)

    def paddings(self, spans: Sequence[int], choice: Choice | None) -> Iterator[Batch]:
        """Batches of padding that have the kernels of the steps of a choice: of all sizes, and of all spans."""
        longest, *others = sorted(spans, reverse=True)
        for size, span in [(size, longest) for size in sizes(self._seats)] + [(1, span) for span in others]:
            yield decode_batch(_padding(size, self._seats, self._device), span, choice)

    def _kind(self, lane: Lane, span: int) -> _Kind:
        return _Kind(lane.choice, requests_bucket(lane.stop - lane.start, self._seats), span)

    def takes(self, lane: Lane, span: int) -> bool:
        """Whether decode tokens that choose alike run as a graph of this span; ways that requests name do after some steps."""
        kind = self._kind(lane, span)
        return kind.choice is None or kind in self._captured or self._met[kind] >= RECURS

    def meet(self, lane: Lane, span: int) -> None:
        """Count an eager step of decode tokens that `takes` did not take."""
        if len(self._met) > 64 * NAMED:  # whoever names ever new budgets is not worth remembering
            self._met.clear()
        self._met[self._kind(lane, span)] += 1

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

    def run(self, batch: Batch, span: int, step: DecodeStep) -> Tensor:
        """Logits [R, V] of a batch of decode tokens that choose alike, none in a longer context; valid until the next run."""
        [lane] = batch.lanes
        assert lane.span <= span
        kind = self._kind(lane, span)
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
        self._logits = None
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
            for _ in range(1 if (kind.size == 1) in self._warm else 2):  # the first step of its kind compiles
                logits = step(batch)
        self._warm.add(kind.size == 1)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize(self._device)
        if self._logits is None:
            self._logits = logits.new_empty((max(sizes(self._seats)), logits.shape[1]))
        del logits
        with capture:
            self._logits[: kind.size].copy_(step(batch))
        logger.debug("captured a decode step of %d requests and %d positions", kind.size, kind.span)
        return _Captured(graph, numbers, padding, batch, self._logits)


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
    """Sizes of captured steps: powers of two up to 8, then in steps of half of the power of two below, at least 8, up to the
    number of seats."""
    if requests <= 8:
        size = 1 << (requests - 1).bit_length()
    else:
        step = max(8, 1 << (requests - 1).bit_length() - 2)
        size = -(-requests // step) * step
    return min(size, max(seats, requests))


def sizes(seats: int) -> list[int]:
    """All sizes of captured steps, ascending."""
    return sorted({requests_bucket(requests, seats) for requests in range(1, seats + 1)})


def span_buckets(budget: int, max_tokens: int) -> list[int]:
    """Spans of captured steps, ascending: the budget, within which nothing competes; powers of two; the longest context."""
    least = max(LEAST_SPAN, budget + 1)
    powers = [1 << power for power in range(max_tokens.bit_length()) if least <= 1 << power < max_tokens]
    return sorted({min(budget, max_tokens), *powers, max_tokens})


def graph_bytes(seats: int, spans: int, *, layers: int, vocab_size: int, itemsize: int) -> int:
    """Bytes of all graphs that may be there at a time, besides those in which they compute: their nodes, and the logits."""
    return (len(sizes(seats)) * spans + NAMED) * layers * GRAPH_LAYER + max(sizes(seats)) * vocab_size * itemsize

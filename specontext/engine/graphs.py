"""Decode steps as CUDA graphs: captured once for a size of batch and context, replayed without a decision of the host.

A captured step reads and writes the engine's own tables, so it stays valid while requests come and go, grow, and layers move
between the tiers. What differs is the number of requests and the span of positions that compete: one graph for each such
pair, captured when it is first needed or to warm up. Requests are padded to the next size by rows
with negative positions, which every kernel passes over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specontext.core import Batch

logger = logging.getLogger("specontext")
LEAST_SPAN = 4096
DecodeStep = Callable[[Batch], Tensor]
PARTS = 5  # token ids, positions, seats, lengths, seeds


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
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, step: DecodeStep) -> None:
        """Capture a step of every size, for short contexts."""
        for size in sorted({requests_bucket(requests, self._seats) for requests in range(1, self._seats + 1)}):
            self._of(size, span_bucket(1, self._max_tokens), step)

    def _of(self, size: int, span: int, step: DecodeStep) -> _Captured:
        captured = self._captured.get((size, span))
        if captured is None:
            captured = self._captured[size, span] = self._capture(size, span, step)
        return captured

    def run(self, batch: Batch, step: DecodeStep) -> Tensor:
        """Logits [R, V] of a batch of decode tokens; valid until the next run."""
        size, span = requests_bucket(batch.num_decodes, self._seats), span_bucket(batch.span, self._max_tokens)
        captured = self._of(size, span, step)
        columns = (batch.token_ids, batch.positions, batch.seats, batch.lengths, batch.seeds)
        if batch.num_decodes == size:
            torch.stack(columns, out=captured.numbers)
        else:
            torch.cat((torch.stack(columns), captured.padding[:, batch.num_decodes :]), dim=1, out=captured.numbers)
        captured.graph.replay()
        return captured.logits[: batch.num_decodes]

    def close(self) -> None:
        """Give the graphs' memory back."""
        self._captured.clear()

    def _capture(self, size: int, span: int, step: DecodeStep) -> _Captured:
        """Record a step of padding, which changes nothing when it is run to warm up."""
        padding = _padding(size, self._seats, self._device)
        numbers = padding.clone()
        batch = decode_batch(numbers, span)
        graph = torch.cuda.CUDAGraph()
        # Other threads may pin memory or copy meanwhile: only this thread's calls are checked.
        capture = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
        # Libraries keep a workspace for every stream that they have seen. So all steps warm up on the one stream on which all are
        # captured: with streams of their own they would hold another 32 MiB each on an H100, and nobody would give them back.
        side = capture.capture_stream
        assert side is not None
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step(batch)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize(self._device)
        with capture:
            logits = step(batch)
        logger.debug("captured a decode step of %d requests and %d positions", size, span)
        return _Captured(graph, numbers, padding, batch, logits)


def decode_batch(numbers: Tensor, span: int) -> Batch:
    """A batch of decode tokens from int64 [PARTS, R] on the device."""
    token_ids, positions, seats, lengths, seeds = numbers.unbind()
    last = torch.arange(numbers.shape[1], device=numbers.device)
    return Batch(token_ids, positions, seats, lengths, seeds, numbers.shape[1], (), last, span)


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

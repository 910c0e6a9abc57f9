"""SnapKV: what the last queries of the prompt look at stays, the rest is dropped (https://arxiv.org/abs/2404.14469)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from specontext.core import Segment
from specontext.retrieval.eviction import DROPPED, EvictingSelector, chunk_weights
from specontext.retrieval.selector import LaneTokens, LayerView, MethodContext
from specontext.retrieval.stateful import Table

WINDOW = 32  # queries
KERNEL = 7  # tokens


class SnapKVSelector(EvictingSelector):
    """Keeps the entries that a window of 32 queries weighs most, together with their neighbours.

    The paper's: the attention weights that the last 32 queries of the prompt give to the entries before them are added up and
    pooled (greatest of 7, as in its runs on LongBench); the best stay, and so do the window's own entries; the rest is dropped
    before the first token is generated. It then reads all generated tokens, which is the variant for prompts only.

    Ours: with one budget for all, what has not been scored yet (the window and what came after it) has precedence, and after
    every 32 generated tokens the last 32 queries score what is still there; sinks and recent window are inside the budget;
    one set for each KV head, by sums of the greatest weight that a query head of its group gives.
    """

    replay = WINDOW

    @classmethod
    def tables_for(cls, context: MethodContext) -> dict[str, Table]:
        shape = context.shape
        return {
            "scores": Table((shape.kv_heads, context.max_tokens), torch.float32, 1),
            "queries": Table((WINDOW, shape.query_heads, shape.head_dim), shape.dtype),  # that of position p at p % WINDOW
        }

    def observe_chunk(self, layer: int, segment: Segment, query: Tensor, scale: float, keys: Callable[[], Tensor]) -> None:
        last = query[-WINDOW:]
        stop = segment.start + len(query)
        place = torch.arange(stop - len(last), stop, device=query.device) % WINDOW
        self.tables["queries"][layer, segment.seat, place] = last

    @property
    def asks_host(self) -> bool:
        """Where generated tokens are scored too, positions decide when a window is complete."""
        return super().asks_host or not self.keep_generated

    def learn(self, layer: int, row: int, seat: int, view: LayerView) -> None:
        self._score(layer, row, seat, self.prompt(seat), view)

    def follow(self, layer: int, lane: LaneTokens, view: LayerView) -> None:
        for row, (seat, position) in enumerate(self.on_host(lane)):
            generated = position - self.prompt(seat)
            if generated and generated % WINDOW == 0:
                self._score(layer, row, seat, position, view)
        self.tables["queries"][layer][lane.seats, lane.positions % WINDOW] = view.query
        self.tables["scores"][layer][lane.seats, :, lane.positions] = torch.inf

    def _score(self, layer: int, row: int, seat: int, tokens: int, view: LayerView) -> None:
        """Score the first `tokens` tokens of a request by its queries of the last ones of them."""
        start = max(0, tokens - WINDOW)
        window = torch.arange(start, tokens, device=view.query.device) % WINDOW
        scores = self.tables["scores"][layer, seat, :, :tokens]
        new = torch.full_like(scores, torch.inf)
        if start:
            query, keys = self.tables["queries"][layer, seat, window], view.keys(row, 0, tokens)
            weights = chunk_weights(query, keys, start, view.scale, scores >= 0)[:, :start]
            new[:, :start] = max_pool1d(weights[None], KERNEL, stride=1, padding=KERNEL // 2)[0]
        scores.copy_(torch.where(scores >= 0, new, DROPPED))

    def selection_bytes(self, lane: LaneTokens) -> Tensor:
        """The scores of the entries that are still there and, once in a window, their keys; nothing for prompts only."""
        if self.keep_generated:
            return torch.zeros_like(lane.positions)
        entries = lane.lengths.clamp(max=self.budget.total) * (self.shape.layers * self.shape.kv_heads)
        return entries * torch.float32.itemsize + entries * (self.shape.head_dim * self.shape.dtype.itemsize) // WINDOW

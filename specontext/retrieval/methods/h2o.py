"""H2O: entries that attention has weighed most so far stay, the others are dropped (https://arxiv.org/abs/2306.14048)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specontext.core import Segment, Selection
from specontext.retrieval.eviction import EvictingSelector, chunk_weights
from specontext.retrieval.selector import LaneTokens, LayerView, MethodContext
from specontext.retrieval.stateful import Table


class H2OSelector(EvictingSelector):
    """Keeps the heavy hitters: the entries with the greatest sum of attention weights over all queries so far.

    The paper's: sums over the queries of the prompt, and then of every decode step over the entries that are still there; in each
    step the entry with the least sum leaves for good, and last tokens are kept whatever their sums.

    Ours: of the budget sinks and recent window take their part and heavy hitters the rest (the paper gives half of it to last
    tokens); one set for each KV head, by sums of the greatest weight that a query head of its group gives. A decode
    step's weights are those that attention computes over the selection in any case, so `selection_bytes` counts the sums only.
    """

    replay = 1 << 30  # all of the prompt

    @classmethod
    def tables_for(cls, context: MethodContext) -> dict[str, Table]:
        return {"scores": Table((context.shape.kv_heads, context.max_tokens), torch.float32, 1)}

    def observe_chunk(self, layer: int, segment: Segment, query: Tensor, scale: float, keys: Callable[[], Tensor]) -> None:
        weights = chunk_weights(query, keys(), segment.start, scale)  # [Hkv, S]
        self.tables["scores"][layer, segment.seat, :, : weights.shape[-1]] += weights

    def learn(self, layer: int, row: int, seat: int, view: LayerView) -> None:
        """The sums of the prompt are there already."""

    def select_in_layer(self, layer: int, lane: LaneTokens, view: LayerView) -> Selection:
        selection = super().select_in_layer(layer, lane, view)
        tokens = selection.tokens  # [R, Hkv, B]
        logits = view.logits_of(tokens).unflatten(1, (self.shape.kv_heads, -1))
        weights = torch.softmax(logits, dim=-1).amax(2)
        scores = self.tables["scores"][layer][:, :, : lane.span]
        scores.index_copy_(0, lane.seats, scores.index_select(0, lane.seats).scatter_add_(-1, tokens.clamp(min=0), weights))
        return selection

    def selection_bytes(self, lane: LaneTokens) -> Tensor:
        """The sums of the entries that are still there."""
        return lane.lengths.clamp(max=self.budget.total) * (self.shape.layers * self.shape.kv_heads * torch.float32.itemsize)

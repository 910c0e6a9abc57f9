"""Oracle top-k: each layer reads the entries that its own true attention weighs most. An upper bound, not a method."""

from __future__ import annotations

from torch import Tensor

from specontext.core import Selection
from specontext.kernels.retrieval_scores import group_weights
from specontext.kernels.top_k import choose, groups_of
from specontext.retrieval.selector import DecodeTokens, LayerSelector, LayerView, MethodContext, uniform_map


class OracleSelector(LayerSelector):
    """Top-k of the layer's own attention weights, maximised over the query heads of a group."""

    def __init__(self, context: MethodContext) -> None:
        self.shape, self.budget, self.granularity = context.shape, context.budget, context.granularity
        self.groups = groups_of(self.granularity, self.shape.kv_heads)
        self.head_map = uniform_map(self.shape, self.groups)

    def select_in_layer(self, layer: int, step: DecodeTokens, view: LayerView) -> Selection:
        grouped = view.logits().unflatten(1, (self.shape.kv_heads, -1))
        scores = group_weights(grouped, self.budget.sink, self.budget.candidates_end(step.lengths))
        return self.budget.compose(choose(scores, self.granularity, self.budget.scored), step.lengths)

    def selection_bytes(self, step: DecodeTokens) -> Tensor:
        """All keys of all layers."""
        return step.lengths * (self.shape.kv_bytes_per_token // 2)

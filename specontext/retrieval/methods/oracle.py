"""Oracle top-k: each layer reads the entries that its own true attention weighs most. An upper bound, not a method."""

from __future__ import annotations

from torch import Tensor

from specontext.core import Selection
from specontext.kernels.retrieval_scores import group_weights
from specontext.kernels.top_k import choose
from specontext.retrieval.selector import LaneTokens, LayerSelector, LayerView


class OracleSelector(LayerSelector):
    """Top-k of the layer's own attention weights, maximised over the query heads of a group."""

    def select_in_layer(self, layer: int, lane: LaneTokens, view: LayerView) -> Selection:
        grouped = view.logits().unflatten(1, (self.shape.kv_heads, -1))
        scores = group_weights(grouped, self.budget.sink, self.budget.candidates_end(lane.lengths))
        return self.budget.compose(choose(scores, self.granularity, self.budget.scored), lane.lengths)

    def selection_bytes(self, lane: LaneTokens) -> Tensor:
        """All keys of all layers."""
        return lane.lengths * (self.shape.kv_bytes_per_token // 2)

"""Quest: pages by an upper bound of their logits (https://arxiv.org/abs/2406.10774)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from specontext.kernels.retrieval_scores import group_weights
from specontext.retrieval.blocks import candidate_blocks, place_of, whole_blocks
from specontext.retrieval.selector import LaneTokens, LayerView, MethodContext
from specontext.retrieval.stateful import StatefulSelector, Table, group_logits

PAGE = 16  # tokens


class QuestSelector(StatefulSelector):
    """Reads the pages of 16 tokens whose greatest possible logit is greatest.

    The paper's: for every page the element-wise minimum and maximum of its keys, and as score of a page
    sum_d max(q_d min_d, q_d max_d), which no logit in the page exceeds; the best pages are read whole, generated ones among them.

    Ours: pages begin after the sinks, which are read in any case; as many pages are chosen as fit beside sinks and recent window;
    one set for each KV head, by the greatest softmax weight over the pages that a query head of its group gives. The paper reads
    everything in the first two layers; here all layers have the same budget.
    """

    @classmethod
    def tables_for(cls, context: MethodContext) -> dict[str, Table]:
        shape = context.shape
        pages = max(1, -(-(context.max_tokens - context.budget.sink) // PAGE))
        return {"bounds": Table((shape.kv_heads, pages, 2, shape.head_dim), shape.dtype, PAGE)}  # maximum, minimum

    def learn(self, layer: int, row: int, seat: int, view: LayerView) -> None:
        tokens = self.prompt(seat) - self.budget.sink
        if tokens > 0:
            keys = view.keys(row, self.budget.sink, self.prompt(seat))
            filled = (0, 0, 0, 0, 0, -tokens % PAGE)
            high = pad(keys, filled, value=-torch.inf).unflatten(0, (-1, PAGE)).amax(1)  # [pages, Hkv, D]
            low = pad(keys, filled, value=torch.inf).unflatten(0, (-1, PAGE)).amin(1)
            self.tables["bounds"][layer, seat, :, : len(high)] = torch.stack((high, low), dim=2).transpose(0, 1)

    def follow(self, layer: int, lane: LaneTokens, view: LayerView) -> None:
        bounds, keys = self.tables["bounds"][layer], view.key
        rows, pages, places = place_of(lane.positions, lane.seats, PAGE, self.budget.sink, self.seats)
        known, first = bounds[rows, :, pages], (places == 0)[:, None, None]  # known [R, Hkv, 2, D]
        high = torch.where(first, keys, torch.maximum(known[:, :, 0], keys))
        low = torch.where(first, keys, torch.minimum(known[:, :, 1], keys))
        bounds[rows, :, pages] = torch.stack((high, low), dim=2)

    def choose(self, layer: int, lane: LaneTokens, view: LayerView, ends: Tensor) -> Tensor:
        sink = self.budget.sink
        weights = group_weights(self.page_bounds(layer, lane, view), 0, candidate_blocks(ends, PAGE, sink))
        return whole_blocks(weights, PAGE, sink, ends, self.budget.scored)

    def page_bounds(self, layer: int, lane: LaneTokens, view: LayerView) -> Tensor:
        """Upper bounds of the logits in each page: float32 [R, Hkv, Hq / Hkv, P]; anything for pages that do not exist."""
        pages = max(1, -(-(lane.span - self.budget.sink) // PAGE))
        bounds = self.tables["bounds"][layer][:, :, :pages].index_select(0, lane.seats).float().flatten(-2)  # [R, Hkv, P, 2 D]
        signed = torch.cat((view.query.clamp(min=0), view.query.clamp(max=0)), dim=-1)
        return group_logits(signed, bounds, view.scale)

    def selection_bytes(self, lane: LaneTokens) -> Tensor:
        """Two vectors of every page."""
        pages = candidate_blocks(self.ends(lane), PAGE, self.budget.sink)
        return pages * (2 * self.shape.layers * self.shape.kv_heads * self.shape.head_dim * self.shape.dtype.itemsize)

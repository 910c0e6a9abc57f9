"""Quest: pages by an upper bound of their logits (https://arxiv.org/abs/2406.10774)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from specontext.kernels.blocks import follow_bounds
from specontext.kernels.retrieval_scores import paged_retrieval_scores
from specontext.retrieval.by_blocks import BlockSelector, LaneBlocks
from specontext.retrieval.selector import LaneTokens, LayerView, MethodContext
from specontext.retrieval.stateful import Table

PAGE = 16  # tokens


class QuestSelector(BlockSelector):
    """Reads the pages of 16 tokens whose greatest possible logit is greatest.

    The paper's: for every page the element-wise minimum and maximum of its keys, and as score of a page
    sum_d max(q_d min_d, q_d max_d), which no logit in the page exceeds; the best pages are read whole, generated ones among them.

    Ours: pages begin after the sinks, which are read in any case; as many pages are chosen as fit beside sinks and recent window;
    one set for each KV head, by the greatest softmax weight over the pages that a query head of its group gives. The paper reads
    everything in the first two layers; here all layers have the same budget.
    """

    size = PAGE

    @classmethod
    def tables_for(cls, context: MethodContext) -> dict[str, Table]:
        shape = context.shape
        return {"bounds": Table((shape.kv_heads, cls.entries(context), 2, shape.head_dim), shape.dtype, PAGE)}  # maximum, minimum

    def learn(self, layer: int, row: int, seat: int, view: LayerView) -> None:
        tokens = self.prompt(seat) - self.budget.sink
        if tokens > 0:
            keys = view.keys(row, self.budget.sink, self.prompt(seat))
            filled = (0, 0, 0, 0, 0, -tokens % PAGE)
            high = pad(keys, filled, value=-torch.inf).unflatten(0, (-1, PAGE)).amax(1)  # [pages, Hkv, D]
            low = pad(keys, filled, value=torch.inf).unflatten(0, (-1, PAGE)).amin(1)
            self.tables["bounds"][layer, seat, :, : len(high)] = torch.stack((high, low), dim=2).transpose(0, 1)

    def follow(self, layer: int, lane: LaneTokens, view: LayerView) -> None:
        follow_bounds(self.tables["bounds"][layer], view.key, lane.positions, lane.seats, PAGE, self.budget.sink)

    def weights(self, layer: int, view: LayerView, blocks: LaneBlocks) -> Tensor:
        """Of upper bounds: what is positive of a query meets the maximum, and what is negative the minimum."""
        signed = torch.cat((view.query.clamp(min=0), view.query.clamp(max=0)), dim=-1)  # [R, Hq, 2 D]
        signed = signed.reshape(len(blocks.counts), -1, signed.shape[-1])
        bounds = self.paged("bounds", layer)
        return paged_retrieval_scores(signed, bounds, blocks.pages, 0, blocks.counts, blocks.most, scale=view.scale)

    def selection_bytes(self, lane: LaneTokens) -> Tensor:
        """Two vectors of every page."""
        each = 2 * self.shape.layers * self.shape.kv_heads * self.shape.head_dim * self.shape.dtype.itemsize
        return self.counts(self.ends(lane)) * each

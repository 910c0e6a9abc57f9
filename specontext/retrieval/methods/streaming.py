"""StreamingLLM: attention sinks and a sliding window (https://arxiv.org/abs/2309.17453), without re-numbering positions."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.core import Selection
from specontext.retrieval.selector import AheadSelector, LaneTokens, MethodContext


class StreamingSelector(AheadSelector):
    """The first `sink` tokens and as many last tokens as the budget holds, the same for all heads."""

    by_span = False

    @classmethod
    def token_sets(cls, context: MethodContext, variant: str | None) -> int:
        return 1

    def select(self, lane: LaneTokens) -> Selection:
        return self.budget.compose_last(lane.lengths)

    def selection_bytes(self, lane: LaneTokens) -> Tensor:
        return torch.zeros_like(lane.positions)

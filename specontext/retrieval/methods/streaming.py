"""StreamingLLM: attention sinks and a sliding window (https://arxiv.org/abs/2309.17453), without re-numbering positions."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.core import Selection
from specontext.retrieval.selector import AheadSelector, LaneTokens, MethodContext


class StreamingSelector(AheadSelector):
    """The first `sink` tokens and as many last tokens as the budget holds, the same for all heads."""

    @classmethod
    def token_sets(cls, context: MethodContext, variant: str | None) -> int:
        return 1

    def select(self, lane: LaneTokens) -> Selection:
        end = self.budget.candidates_end(lane.lengths)[:, None]
        first = (end - self.budget.scored).clamp(min=self.budget.sink)
        window = first + torch.arange(self.budget.scored, device=end.device)
        tokens = torch.where(window < end, window, -1)
        return self.budget.compose(tokens[:, None], lane.lengths)

    def selection_bytes(self, lane: LaneTokens) -> Tensor:
        return torch.zeros_like(lane.positions)

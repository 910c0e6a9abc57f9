"""StreamingLLM: attention sinks and a sliding window (https://arxiv.org/abs/2309.17453), without re-numbering positions."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.core import Selection
from specontext.retrieval.selector import AheadSelector, DecodeTokens, MethodContext, uniform_map


class StreamingSelector(AheadSelector):
    """The first `sink` tokens and as many last tokens as the budget holds, the same for all heads."""

    def __init__(self, context: MethodContext) -> None:
        self.budget = context.budget
        self.groups, self.head_map = 1, uniform_map(context.shape, 1)

    def select(self, step: DecodeTokens) -> Selection:
        end = self.budget.candidates_end(step.lengths)[:, None]
        first = (end - self.budget.scored).clamp(min=self.budget.sink)
        window = first + torch.arange(self.budget.scored, device=end.device)
        tokens = torch.where(window < end, window, -1)
        return self.budget.compose(tokens[:, None], step.lengths)

    def selection_bytes(self, step: DecodeTokens) -> Tensor:
        return torch.zeros_like(step.positions)

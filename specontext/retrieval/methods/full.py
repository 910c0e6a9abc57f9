"""Full attention: every entry is read."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.retrieval.selector import DecodeTokens, MethodContext, Selector, uniform_map


class FullSelector(Selector):
    """Selects nothing; attention reads the whole context."""

    def __init__(self, context: MethodContext) -> None:
        self.budget = context.budget  # of which it takes no notice
        self.groups, self.head_map = 1, uniform_map(context.shape, 1)

    def selection_bytes(self, step: DecodeTokens) -> Tensor:
        return torch.zeros_like(step.positions)

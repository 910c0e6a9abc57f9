"""Full attention: every entry is read."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.retrieval.selector import LaneTokens, MethodContext, Selector


class FullSelector(Selector):
    """Selects nothing; attention reads the whole context."""

    by_span = False

    @classmethod
    def token_sets(cls, context: MethodContext, variant: str | None) -> int:
        return 1

    def selection_bytes(self, lane: LaneTokens) -> Tensor:
        return torch.zeros_like(lane.positions)

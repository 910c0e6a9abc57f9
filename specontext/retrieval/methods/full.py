"""Full attention: every entry is read."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.core import ModelShape
from specontext.retrieval.selector import Selector, uniform_map


class FullSelector(Selector):
    """Selects nothing; attention reads the whole context."""

    dense = True

    def __init__(self, shape: ModelShape) -> None:
        self.groups, self.head_map = 1, uniform_map(shape, 1)

    def selection_bytes(self, lengths: Tensor) -> Tensor:
        return torch.zeros_like(lengths)

"""What Quest and ShadowKV have in common: blocks of tokens compete by one vector of each and are read whole."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specontext.kernels.blocks import whole_blocks
from specontext.retrieval.selector import LaneTokens, LayerView, MethodContext
from specontext.retrieval.stateful import StatefulSelector

PAGE = 64  # blocks whose vectors are scored as keys of one page are


@dataclass(frozen=True)
class LaneBlocks:
    """Where the vectors of a lane's blocks lie, the same in all layers; each KV head of a request is a request to the scores.

    Attributes:
        pages: int64 [R * Hkv, N / PAGE], in tables [seats + 1, Hkv, N, ...] cut into pages.
        counts: int64 [R * Hkv], blocks that hold candidates.
        most: no request has more of them; known without asking the device.
    """

    pages: Tensor
    counts: Tensor
    most: int


class BlockSelector(StatefulSelector):
    """Reads the best blocks of `size` tokens, as many as fit; blocks begin after the sinks.

    One set for each KV head, by the greatest softmax weight over the blocks that a query head of its group gives.
    """

    size: ClassVar[int]

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        self._blocks: tuple[Tensor, LaneBlocks] | None = None  # by the ends of the candidates that they are of

    @classmethod
    def entries(cls, context: MethodContext) -> int:
        """Blocks of a request for which there is room, a multiple of PAGE."""
        blocks = max(1, -(-(context.max_tokens - context.budget.sink) // cls.size))
        return -(-blocks // PAGE) * PAGE

    @abstractmethod
    def weights(self, layer: int, view: LayerView, blocks: LaneBlocks) -> Tensor:
        """float32 [R * Hkv, 1, most]: the softmax weights; -1 for blocks without candidates."""

    def choose(self, layer: int, lane: LaneTokens, view: LayerView, ends: Tensor) -> Tensor:
        weights = self.weights(layer, view, self._of(lane, ends)).view(len(ends), self.shape.kv_heads, -1)
        return whole_blocks(weights, self.size, self.budget.sink, ends, self.budget.scored)

    def counts(self, ends: Tensor) -> Tensor:
        """Blocks that hold candidates before their ends: int64 [R]."""
        return (ends - self.budget.sink + self.size - 1) // self.size

    def paged(self, name: str, layer: int) -> Tensor:
        """A table of a layer as keys of one head in pages: [pages, PAGE, 1, numbers of a block]."""
        return self.tables[name][layer].view(-1, PAGE, 1, self.tables[name][0, 0, 0, 0].numel())

    def _of(self, lane: LaneTokens, ends: Tensor) -> LaneBlocks:
        if self._blocks is None or self._blocks[0] is not ends:
            heads, pages = self.shape.kv_heads, next(iter(self.layout.values())).size[1] // PAGE
            device = lane.seats.device
            first = (lane.seats[:, None] * heads + torch.arange(heads, device=device)).flatten() * pages
            self._blocks = (
                ends,
                LaneBlocks(
                    first[:, None] + torch.arange(pages, device=device),
                    self.counts(ends).repeat_interleave(heads),
                    max(1, -(-(lane.span - self.budget.sink) // self.size)),
                ),
            )
        return self._blocks[1]

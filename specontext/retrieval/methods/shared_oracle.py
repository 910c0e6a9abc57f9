"""Shared oracle: the best sets that all layers could read together, from the true attention of all of them. For analysis.

A retrieval head chooses one set a KV head before the model runs, so this and not `oracle` bounds what it can reach. The attention
of the token about to be processed is that of a dense pass over it ahead of the step.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from specontext.core import Selection
from specontext.errors import ConfigError
from specontext.kernels.top_k import choose, groups_of
from specontext.retrieval.selector import ForeseeingSelector, LaneTokens, MethodContext, Selector


class SharedOracleSelector(ForeseeingSelector):
    """Top-k of the attention weights, maximised over the query heads of a KV head, mean over the layers of a band.

    Attributes:
        bands: runs of consecutive layers that have sets of their own; 1 is one set a KV head for all layers.
    """

    def __init__(self, context: MethodContext) -> None:
        super().__init__(context)
        self._set_bands(1)

    @classmethod
    def token_sets(cls, context: MethodContext, variant: str | None) -> int:
        bands, layers = _bands(variant), context.shape.layers
        if bands > layers:
            raise ConfigError(f"method 'shared-oracle-{variant}' needs {bands} layers and the model has {layers}: leave it out")
        return bands * groups_of(context.granularity, context.shape.kv_heads)

    def _set_bands(self, bands: int) -> None:
        layers, sets = self.shape.layers, groups_of(self.granularity, self.shape.kv_heads)
        edges = [layers * band // bands for band in range(1, bands + 1)]
        self.band_of = [next(band for band, edge in enumerate(edges) if layer < edge) for layer in range(layers)]
        self.bands, self.groups = bands, bands * sets
        first = torch.tensor(self.band_of)[:, None] * sets
        self.head_map = (first + torch.arange(sets)).expand(layers, self.shape.kv_heads).clone()
        self._sums: list[Tensor] = []

    def variant(self, name: str) -> Selector:
        """The same with sets of their own for some bands of layers ('bands2' ...)."""
        other = copy.copy(self)
        other._set_bands(_bands(name))
        return other

    def look_anew(self) -> None:
        self._sums = []

    def foresee(self, layer: int, weights: Tensor) -> None:
        band, best = self.band_of[layer], weights.unflatten(1, (self.shape.kv_heads, -1)).amax(2)  # [R, Hkv, S]
        if band == len(self._sums):
            self._sums.append(best)
        else:
            self._sums[band] += best

    def select(self, lane: LaneTokens) -> Selection:
        scores = torch.stack(self._sums, dim=1)  # [R, bands, Hkv, S]; a mean over layers has the same order
        self._sums = []
        position = torch.arange(scores.shape[-1], device=scores.device)
        ends = self.budget.candidates_end(lane.lengths)
        absent = (position < self.budget.sink) | (position >= ends[:, None])  # [R, S]
        scores.masked_fill_(absent[:, None, None], -1.0)
        return self.budget.compose(choose(scores, self.granularity, self.budget.scored).flatten(1, 2), lane.lengths)

    def selection_bytes(self, lane: LaneTokens) -> Tensor:
        """Keys and values of all layers, which the dense pass reads."""
        return lane.lengths * self.shape.kv_bytes_per_token


def _bands(variant: str | None) -> int:
    return 1 if variant is None else int(variant.removeprefix("bands"))

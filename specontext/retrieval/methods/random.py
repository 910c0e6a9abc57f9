"""Random entries: the floor that any method must clear."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.core import Selection
from specontext.kernels.counter_random import combine_keys, counter_uniform
from specontext.kernels.top_k import top_k_positions
from specontext.retrieval.selector import AheadSelector, LaneTokens


class RandomSelector(AheadSelector):
    """A fresh random set at every step, keyed by (seed, position, group): the batch does not change it."""

    def select(self, lane: LaneTokens) -> Selection:
        position = torch.arange(lane.span, device=lane.seats.device)
        group = torch.arange(self.groups, device=lane.seats.device)[:, None]
        key = combine_keys((lane.seeds[:, None, None], lane.positions[:, None, None], group))
        scores = counter_uniform(key, position)
        end = self.budget.candidates_end(lane.lengths)[:, None, None]
        scores = scores.masked_fill((position < self.budget.sink) | (position >= end), -1.0)
        return self.budget.compose(top_k_positions(scores, self.budget.scored), lane.lengths)

    def selection_bytes(self, lane: LaneTokens) -> Tensor:
        return torch.zeros_like(lane.positions)

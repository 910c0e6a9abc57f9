"""Random entries: the floor that any method must clear."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.core import Selection
from specontext.kernels.counter_random import combine_keys, counter_uniform
from specontext.kernels.top_k import groups_of, top_k_positions
from specontext.retrieval.selector import AheadSelector, DecodeTokens, MethodContext, uniform_map


class RandomSelector(AheadSelector):
    """A fresh random set at every step, keyed by (seed, position, group): the batch does not change it."""

    def __init__(self, context: MethodContext) -> None:
        self.budget = context.budget
        self.groups = groups_of(context.granularity, context.shape.kv_heads)
        self.head_map = uniform_map(context.shape, self.groups)

    def select(self, step: DecodeTokens) -> Selection:
        position = torch.arange(step.span, device=step.seats.device)
        group = torch.arange(self.groups, device=step.seats.device)[:, None]
        key = combine_keys((step.seeds[:, None, None], step.positions[:, None, None], group))
        scores = counter_uniform(key, position)
        end = self.budget.candidates_end(step.lengths)[:, None, None]
        scores = scores.masked_fill((position < self.budget.sink) | (position >= end), -1.0)
        return self.budget.compose(top_k_positions(scores, self.budget.scored), step.lengths)

    def selection_bytes(self, step: DecodeTokens) -> Tensor:
        return torch.zeros_like(step.positions)

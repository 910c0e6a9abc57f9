"""Selections of a stated overlap, replayed: random weights have no neighbourhoods, so their own selections hardly repeat."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from specontext.core import Batch, Selection
from specontext.engine.methods import Methods
from specontext.engine.parts import Parts
from specontext.retrieval.selector import AheadSelector, Budget, LaneTokens, Selector


class Replay(AheadSelector):
    """Runs a selector in full and then answers with the next selection of a recorded sequence.

    The place in the sequence is counted on the device, so that a captured graph goes on as an eager step does.

    Args:
        selections: of the same requests, step after step; after the last comes the first.
    """

    def __init__(self, inner: AheadSelector, selections: list[Selection], device: torch.device) -> None:
        self.inner, self.budget = inner, inner.budget
        self.groups, self.head_map = inner.groups, inner.head_map
        self.budget = inner.budget
        self.tokens = torch.stack([selection.tokens for selection in selections]).to(device)
        self.scored = torch.stack([selection.scored for selection in selections]).to(device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)

    def open(self, seat: int, tokens: int) -> bool:
        return self.inner.open(seat, tokens)

    def grow(self, seat: int, tokens: int) -> bool:
        return self.inner.grow(seat, tokens)

    def close(self, seat: int) -> None:
        self.inner.close(seat)

    @property
    def held_pages(self) -> list[list[int]]:
        return self.inner.held_pages

    def select(self, lane: LaneTokens) -> Selection:
        self.inner.select(lane)
        self.place.add_(1).remainder_(len(self.tokens))
        return Selection(self.tokens.index_select(0, self.place)[0], self.scored.index_select(0, self.place)[0])

    def observe(self, batch: Batch, features: Tensor | None) -> None:
        self.inner.observe(batch, features)

    def selection_bytes(self, lane: LaneTokens) -> Tensor:
        return self.inner.selection_bytes(lane)


def with_own_method(parts: Parts, selector: Selector) -> Parts:
    """The same parts with another selector as the engine's own method."""
    methods = parts.methods
    selectors = methods.selectors | {methods.own.method: selector}
    own = Methods(methods.own.method, methods.budget, selectors, layout=parts.kv.layout, device=parts.kv.device)
    return replace(parts, methods=own)


def overlapping(budget: Budget, context: int, requests: int, groups: int, overlap: float, count: int) -> list[Selection]:
    """Selections of which each keeps this share of the scored tokens of the one before, the first of the last one, too."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.full((requests,), context)
    low, high = budget.sink, context - budget.recent
    new = budget.scored - round(budget.scored * overlap)
    # A window that moves by the new share over a ring of tokens, which is as long as all steps together.
    ring = min(high - low, max(new * count, budget.scored + new))
    rings = torch.stack([torch.randperm(high - low, generator=generator)[:ring] + low for _ in range(requests * groups)])
    rings = rings.view(requests, groups, ring)
    windows = ((torch.arange(step * new, step * new + budget.scored) % ring) for step in range(count))
    return [budget.compose(rings[..., window].sort(-1).values, lengths) for window in windows]

"""Overlap of adjacent decode steps: share of the scored tokens that the step before had scored too (paper, Fig. 6b)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specontext.distill.attention import pooled
from specontext.distill.queries import candidates, sample_rows
from specontext.distill.recall import keep
from specontext.distill.target import Target
from specontext.evaluation.analysis.recall import ORACLE
from specontext.evaluation.analysis.rows import Row, row
from specontext.evaluation.analysis.selection import Entrant, Kind, look, selections
from specontext.evaluation.analysis.settings import Settings
from specontext.evaluation.analysis.texts import Sample


def overlap(before: Tensor, after: Tensor, far_before: Tensor, far_after: Tensor) -> tuple[Tensor, Tensor]:
    """Share of the scored tokens of one step that the step before had scored, all groups of a request counted together.

    Sinks and recent tokens are no candidates and do not count, as in the engine's statistics.

    Args:
        before, after: tokens that are read, bool [N, G, P, S]; far_before, far_after: candidates, bool [N, 1, P, S].

    Returns:
        float64 [N, P], and bool [N, P], False where a step scored nothing.
    """
    first, second = before & far_before, after & far_after
    total = second.sum((1, 3))
    share = (first & second).sum((1, 3)) / total.clamp_min(1)
    return share.double(), (total > 0) & first.any(-1).any(1)


class Mean:
    """Means over queries by (kind, budget)."""

    def __init__(self) -> None:
        self.sums: defaultdict[tuple[Kind, int], float] = defaultdict(float)
        self.counts: defaultdict[tuple[Kind, int], int] = defaultdict(int)

    def add(self, kind: Kind, budget: int, kept: Tensor, far: Tensor, real: Tensor) -> None:
        """Add the overlap of the two halves of `kept` [N, G, 2P, S]: the first step of every pair, then the second."""
        before, after = kept.chunk(2, 2)
        share, counts = overlap(before, after, *far.chunk(2, 2))
        counts &= real
        self.sums[kind, budget] += float(share[counts].sum())
        self.counts[kind, budget] += int(counts.sum())


def overlap_rows(
    target: Target,
    entrants: Sequence[Entrant],
    samples: Sequence[Sample],
    budgets: Sequence[int],
    length: int,
    settings: Settings,
    *,
    tick: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Rows `overlap`, mean over pairs of adjacent wanted positions; of the layers' own selections the mean over layers.

    A head map only says who reads a set, so the overlap of a head's sets has none.
    """
    mean, generator = Mean(), torch.Generator().manual_seed(settings.seed)
    for number, sample in enumerate(samples):
        first, real = sample_rows(sample.wanted[:, :-1] & sample.wanted[:, 1:], settings.queries // 2, 0.0, generator)
        rows = torch.cat((first, first + 1), 1).to(target.device)
        ids, real = sample.ids.to(target.device), real.to(target.device)
        far, always = candidates(rows, ids.shape[1], settings.sink, settings.recent)

        def own(layer: int, weights: Tensor, far: Tensor = far, always: Tensor = always, real: Tensor = real) -> None:
            scores = pooled(weights, target.groups, "max")
            for budget in budgets:
                mean.add(ORACLE, budget, keep(scores, far, always, budget - settings.always), far, real)

        doubled = torch.cat((real, real), 1)
        view = look(target, ids, rows, doubled, entrants, sink=settings.sink, recent=settings.recent, listeners=(own,))
        for budget in budgets:
            seen = set[Kind]()
            for kind, kept, _ in selections(
                view, entrants, budget, sink=settings.sink, recent=settings.recent, seed=settings.seed + number
            ):
                bare = Kind(kind.method, kind.granularity, kind.variant)
                if bare not in seen:
                    mean.add(bare, budget, kept, far, real)
                    seen.add(bare)
        tick()
    return [
        row(
            "overlap",
            kind.method,
            mean.sums[kind, budget] / count,
            granularity=kind.granularity,
            variant=kind.variant,
            budget=budget,
            length=length,
        )
        for (kind, budget), count in mean.counts.items()
        if count
    ]

"""Attention recall and hit rate of all selections, at several budgets, over sequences of one length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from specontext.distill.attention import HeadMap
from specontext.distill.queries import sample_rows
from specontext.distill.recall import Coverage
from specontext.distill.target import Target
from specontext.evaluation.analysis.rows import Row, row
from specontext.evaluation.analysis.selection import Entrant, Kind, View, look, selections
from specontext.evaluation.analysis.settings import Settings
from specontext.evaluation.analysis.texts import Sample

ORACLE = Kind("oracle", "head")
MASK_BYTES = 1 << 30  # of selections that are judged in one pass

Tick = Callable[[], None]


@dataclass
class Judged:
    """Sums of a `Coverage` and what its names stand for.

    Attributes:
        names: kind and budget by the name in `coverage`.
        queries: that every sum is over.
    """

    coverage: Coverage
    names: dict[str, tuple[Kind, int]] = field(default_factory=dict)
    queries: int = 0

    def rows(self, length: int, what: str = "recall") -> list[Row]:
        """Recall of every selection, mean over layers, heads and queries."""
        return [self._row(what, kind, budget, length, self._recall(name).mean()) for name, (kind, budget) in self.names.items()]

    def hit_rows(self, length: int) -> list[Row]:
        """Hit rates; a layer's own best tokens are what is hit, so theirs is 1 by definition."""
        hits = self.coverage.hits
        return [
            self._row("hit_rate", kind, budget, length, 1.0 if kind == ORACLE else (hits[name] / self.queries).mean())
            for name, (kind, budget) in self.names.items()
        ]

    def layer_rows(self, length: int, kinds: Sequence[Kind], budget: int) -> list[Row]:
        """Recall at one budget for every layer and KV head."""
        return [
            self._row("recall", kind, budget, length, value, layer=layer, head=head)
            for name, (kind, judged_budget) in self.names.items()
            if kind in kinds and judged_budget == budget
            for layer, heads in enumerate(self._recall(name).tolist())
            for head, value in enumerate(heads)
        ]

    def _recall(self, name: str) -> torch.Tensor:
        return self.coverage.recall[name] / self.queries  # [L, Hkv]

    def _row(self, what: str, kind: Kind, budget: int, length: int, value: float | torch.Tensor, **place: int) -> Row:
        return row(
            what,
            kind.method,
            float(value),
            granularity=kind.granularity,
            variant=kind.variant,
            map=kind.map,
            budget=budget,
            length=length,
            **place,
        )


def judge(
    target: Target,
    entrants: Sequence[Entrant],
    samples: Sequence[Sample],
    budgets: Sequence[int],
    settings: Settings,
    *,
    tick: Tick = lambda: None,
) -> Judged:
    """Judge the selections of `selections` and each layer's own best tokens.

    A pass of the target gives the features and the mean attention that selections are made from, further passes judge them
    layer by layer, as many budgets at once as fit into `MASK_BYTES`.

    Args:
        tick: called after each sequence.
    """
    judged = Judged(Coverage(target.layers, target.groups))
    generator = torch.Generator().manual_seed(settings.seed)
    for number, sample in enumerate(samples):
        drawn = sample_rows(sample.wanted, settings.queries, 0.0, generator)
        rows, real = (tensor.to(target.device) for tensor in drawn)
        ids = sample.ids.to(target.device)
        view = look(target, ids, rows, real, entrants, sink=settings.sink, recent=settings.recent)
        judged.queries += int(real.sum())
        for part in _parts(budgets, view, entrants, target):
            kept: dict[str, tuple[torch.Tensor, HeadMap | None]] = {}
            counts = {}
            for budget in part:
                count = budget - settings.always
                for kind, mask, head_map in selections(
                    view, entrants, budget, sink=settings.sink, recent=settings.recent, seed=settings.seed + number
                ):
                    name = f"{kind}/{budget}"
                    kept[name], counts[name], judged.names[name] = (mask, head_map), count, (kind, budget)
                judged.names[f"oracle/{count}"] = ORACLE, budget
            judged.coverage.watch(kept, counts=counts, far=view.far, always=view.always, real=real, oracle="oracle")
            target.observe(ids, rows, judged.coverage)
        tick()
    return judged


def _parts(budgets: Sequence[int], view: View, entrants: Sequence[Entrant], target: Target) -> list[Sequence[int]]:
    """Budgets that are judged in one pass each."""
    masks = sum(weights.shape[1] + 2 for weights in view.weights.values()) + 2 * target.groups + 3
    together = max(1, MASK_BYTES // (masks * view.far.numel()))
    return [budgets[start : start + together] for start in range(0, len(budgets), together)]

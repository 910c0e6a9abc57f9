"""What the model loses with selections: KL divergence, perplexity and agreement of its output on forced text, by budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from specontext.distill.attention import pooled
from specontext.distill.effects import grouped
from specontext.distill.fidelity import Losses, last_positions
from specontext.distill.queries import candidates
from specontext.distill.recall import keep
from specontext.distill.replay import Gates
from specontext.distill.target import Target
from specontext.evaluation.analysis.recall import ORACLE
from specontext.evaluation.analysis.rows import LOSSES, Row, row
from specontext.evaluation.analysis.selection import Entrant, Kind, look, selections
from specontext.evaluation.analysis.settings import Settings
from specontext.evaluation.analysis.texts import Sample

Masks = dict[int, list[Tensor]]  # by budget, what the KV heads of each layer read


def loss_rows(
    target: Target,
    entrants: Sequence[Entrant],
    samples: Sequence[Sample],
    budgets: Sequence[int],
    length: int,
    settings: Settings,
    *,
    tick: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Rows `kl_divergence`, `perplexity_ratio` and `agreement`, means over sequences; each head with its standard map.

    The last `settings.queries` positions of a sequence are forced, and those compared whose next token the model has to say. The
    layers' own best tokens are those of dense attention, as all selections are made from what a dense pass shows.
    """
    losses, names = Losses(), dict[str, tuple[Kind, int]]()
    standard = [entrant.standard() for entrant in entrants]
    for number, sample in enumerate(samples):
        all_ids, wanted = sample.ids.to(target.device), sample.wanted.to(target.device)
        ids, window = last_positions(all_ids, wanted, min(settings.queries, sample.tokens // 4))
        far, always = candidates(window.rows, ids.shape[1], settings.sink, settings.recent)
        best: Masks = {budget: [] for budget in budgets}

        def own(layer: int, weights: Tensor, far: Tensor = far, always: Tensor = always, best: Masks = best) -> None:
            scores = pooled(weights, target.groups, "max")
            for budget, layers in best.items():
                layers.append(keep(scores, far, always, budget - settings.always))

        view = look(
            target,
            ids,
            window.rows,
            window.real,
            standard,
            sink=settings.sink,
            recent=settings.recent,
            listeners=(own,),
            stored=True,
        )
        gates: dict[str, Gates] = {}
        for budget in budgets:
            seed = settings.seed + number
            gates[f"{ORACLE}/{budget}"], names[f"{ORACLE}/{budget}"] = best[budget].__getitem__, (ORACLE, budget)
            for kind, kept, head_map in selections(view, standard, budget, sink=settings.sink, recent=settings.recent, seed=seed):
                if kind.granularity in ("head", None):
                    gates[f"{kind}/{budget}"], names[f"{kind}/{budget}"] = grouped(kept, head_map), (kind, budget)
        losses.add(target, view.seen, window, gates)
        tick()
    return [
        row(
            what,
            kind.method,
            getattr(losses.mean(name), what),
            granularity=kind.granularity,
            variant=kind.variant,
            map=kind.map,
            budget=budget,
            length=length,
        )
        for name, (kind, budget) in names.items()
        for what in LOSSES
    ]

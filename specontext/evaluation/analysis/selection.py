"""The selections that are compared at one budget: of retrieval heads, of the true attention, of a window, of chance.

Shapes: N sequences, S tokens, Q query positions, G retrieval groups, L layers, Hkv KV heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specontext.config import GRANULARITIES
from specontext.distill.attention import HeadMap, Teacher, head_log_weights
from specontext.distill.queries import candidates, scored
from specontext.distill.recall import keep
from specontext.distill.target import LayerListener, Observation, Target
from specontext.evaluation.analysis.rows import MAPS
from specontext.kernels.counter_random import combine_keys, counter_uniform
from specontext.retrieval.head import RetrievalHead


@dataclass(frozen=True)
class Kind:
    """What a selection was made by; the fields are a row's."""

    method: str
    granularity: str | None = None
    variant: str | None = None
    map: str | None = None


@dataclass(frozen=True, eq=False)
class Entrant:
    """A retrieval head that is judged.

    Attributes:
        label: its `variant` in the rows.
        maps: the head maps that it is judged with at head level, by name.
        yarn_factor: of its RoPE; 1 is none.
    """

    label: str
    head: RetrievalHead
    maps: dict[str, HeadMap]
    granularities: tuple[str, ...] = GRANULARITIES
    yarn_factor: float = 1.0

    @property
    def standard_map(self) -> str:
        return next(name for name in MAPS if name in self.maps)

    def standard(self) -> Entrant:
        """At head level with the standard map only."""
        name = self.standard_map
        return replace(self, maps={name: self.maps[name]}, granularities=("head",))

    def kinds(self, granularity: str) -> dict[Kind, HeadMap | None]:
        """One set for all heads needs no map."""
        if granularity != "head":
            return {Kind("speculative", granularity, self.label): None}
        return {Kind("speculative", granularity, self.label, name): head_map for name, head_map in self.maps.items()}


@dataclass(frozen=True)
class View:
    """One sequence, seen at some of its positions.

    Attributes:
        rows: int64 [N, Q]; real: bool [N, Q], the rows that count.
        far, always: bool [N, 1, Q, S], as of `candidates`.
        weights: float32 [N, G, Q, S], of each head by its label.
        shared: float32 [N, Hkv, Q, S], the true attention, mean over layers and maximum in each group.
        seen: what the dense pass showed.
    """

    rows: Tensor
    real: Tensor
    far: Tensor
    always: Tensor
    weights: dict[str, Tensor]
    shared: Tensor
    seen: Observation

    @property
    def span(self) -> int:
        return self.far.shape[-1]


@torch.no_grad()
def look(
    target: Target,
    ids: Tensor,
    rows: Tensor,
    real: Tensor,
    entrants: Sequence[Entrant],
    *,
    sink: int,
    recent: int,
    listeners: Sequence[LayerListener] = (),
    stored: bool = False,
) -> View:
    """Run sequences [N, S] through target and heads; the RoPE of the heads is set to each entrant's.

    Args:
        stored: keep the keys and values of all layers.
    """
    far, always = candidates(rows, ids.shape[1], sink, recent)
    teacher = Teacher(identity_map(target), target.groups)
    seen = target.observe(ids, rows, teacher, *listeners, keep=stored)
    weights = {}
    for entrant in entrants:
        entrant.head.set_rope(yarn_factor=entrant.yarn_factor)
        weights[entrant.label] = head_log_weights(entrant.head, seen_by(entrant.head, seen, target), rows, far).exp()
    return View(rows, real, far, always, weights, teacher.weights, seen)


def seen_by(head: RetrievalHead, seen: Observation, target: Target) -> Observation:
    """The observation with the head's own feature layers out of those that the target was asked for."""
    layers = target.feature_layers
    if head.config.variant != "features" or head.config.feature_layers == layers:
        return seen
    places = [layers.index(layer) for layer in head.config.feature_layers]
    split = seen.features.unflatten(-1, (len(layers), -1))
    return replace(seen, features=split[..., places, :].flatten(-2))


def identity_map(target: Target) -> HeadMap:
    """KV head h reads group h in every layer."""
    return tuple(tuple(range(target.groups)) for _ in range(target.layers))


def selections(
    view: View, entrants: Sequence[Entrant], budget: int, *, sink: int, recent: int, seed: int
) -> Iterator[tuple[Kind, Tensor, HeadMap | None]]:
    """Every selection of `budget` tokens except the layers' own, which `Coverage` makes.

    Yields:
        what made it, the tokens that are read bool [N, G or 1, Q, S], and the group of each KV head (None: its own or the only).
    """
    count = scored(budget, sink, recent)
    for entrant in entrants:
        for granularity in entrant.granularities:
            kept = keep(view.weights[entrant.label], view.far, view.always, count, granularity)
            for kind, head_map in entrant.kinds(granularity).items():
                yield kind, kept, head_map
    for granularity in GRANULARITIES:
        yield Kind("shared_oracle", granularity), keep(view.shared, view.far, view.always, count, granularity), None
    yield Kind("streaming"), candidates(view.rows, view.span, sink, budget - sink)[1], None
    chance = random_scores(view.rows, view.shared.shape[1], view.span, seed)
    yield Kind("random", "head"), keep(chance, view.far, view.always, count), None


def random_scores(rows: Tensor, groups: int, span: int, seed: int) -> Tensor:
    """Numbers between 0 and 1 keyed by (seed, position, group), as `RandomSelector` draws them: [N, groups, Q, span]."""
    group = torch.arange(groups, device=rows.device)[:, None]
    key = combine_keys((torch.full_like(rows, seed)[:, None], rows[:, None], group))
    return counter_uniform(key[..., None], torch.arange(span, device=rows.device))

"""The retrieval heads of an analysis: the one that is analysed, those it is compared with, and their maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from specontext.distill.attention import HeadMap
from specontext.distill.calibration import calibrate
from specontext.distill.target import Target
from specontext.evaluation.analysis.selection import Entrant, identity_map
from specontext.evaluation.analysis.settings import AnalysisError, Settings
from specontext.evaluation.analysis.texts import Sample
from specontext.model_shape import ModelShape
from specontext.retrieval.checkpoint import load_head
from specontext.retrieval.head import RetrievalHead

CUT = "embedding:cut"


def load_heads(settings: Settings, shape: ModelShape, device: torch.device) -> dict[str, RetrievalHead]:
    """The heads in float32 by their label, the analysed one first.

    A label is the head's variant, with a name behind a colon where it is taken. Where no embedding head is among them, the
    analysed one without its features is.

    Raises:
        HeadError: a head that is missing, broken or made for another model.
    """
    heads: dict[str, RetrievalHead] = {}
    for source in (settings.head, *settings.compare):
        head = load_head(source, target=shape, need_map=False).to(device)
        variant = label = head.config.variant
        if label in heads:
            label = name = f"{variant}:{Path(source).name or source}"
            number = 2
            while label in heads:
                label, number = f"{name}-{number}", number + 1
        heads[label] = head
    first = next(iter(heads.values()))
    if all(head.config.variant == "features" for head in heads.values()):
        heads[CUT] = first.embedding_variant()
    return heads


def feature_layers(heads: dict[str, RetrievalHead]) -> tuple[int, ...]:
    """All feature layers that any of the heads reads."""
    return tuple(sorted({layer for head in heads.values() for layer in head.config.feature_layers}))


def make_entrants(
    heads: dict[str, RetrievalHead],
    target: Target,
    samples: Sequence[Sample],
    *,
    length: int,
    budget: int,
    settings: Settings,
) -> list[Entrant]:
    """Every head with its own map, the identity where the numbers of heads are equal, and the map calibrated on `samples`.

    YaRN is as the engine sets it for a longest context of `length`.

    Args:
        samples: none leaves the calibrated maps out.
        budget: that maps are calibrated at.

    Raises:
        AnalysisError: a head that needs a map, and no samples.
    """
    found = []
    for label, head in heads.items():
        factor = head.config.yarn_factor(length)
        maps: dict[str, HeadMap] = {}
        if head.config.head_map is not None:
            maps["own"] = head.config.head_map
        if head.config.kv_heads == target.groups:
            maps["identity"] = identity_map(target)
        if samples:
            head.set_rope(yarn_factor=factor)
            [result] = calibrate(
                head,
                Target(target.model, head.config.feature_layers),
                [(sample.ids, sample.wanted) for sample in samples],
                budget,
                queries=settings.queries,
                sink=settings.sink,
                recent=settings.recent,
                seed=settings.seed,
            )
            maps["calibrated"] = result.head_map
        if not maps:
            raise AnalysisError(
                f"the head '{label}' has {head.config.kv_heads} groups and the model {target.groups} KV heads, so it needs a "
                "calibrated map: leave --calibration-sequences above 0"
            )
        found.append(Entrant(label, head, maps, yarn_factor=factor))
    return found

"""Forms of new heads: EAGLE-3's, and the one that loses least."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from specontext.errors import ConfigError, HeadError
from specontext.model_shape import ModelShape
from specontext.retrieval.head import RetrievalHead, head_parameters
from specontext.retrieval.head_config import HeadConfig
from specontext.retrieval.head_map import band_map

BANDS = 3
FEWEST_LAYERS = 12  # of a model whose layers are worth dividing into bands
WIDEST_KEY = 512  # numbers of a token's keys
WIDEST_RANK = 1024


@dataclass(frozen=True)
class HeadShape:
    """Form of a new head; the defaults are EAGLE-3's choice.

    Attributes:
        heads: query heads; None takes as many for each group as the target has for each KV head.
        head_dim: None takes that of the target's keys.
        feature_layers: None takes `standard_feature_layers`.
        bands: of neighbouring layers, each with groups of its own.
        key_heads, key_inputs, query_rank: as of `HeadConfig`.
    """

    variant: str = "features"
    heads: int | None = None
    head_dim: int | None = None
    feature_layers: tuple[int, ...] | None = None
    rope_theta: float = 10000.0
    bands: int = 1
    key_heads: int | None = None
    key_inputs: str = "before"
    query_rank: int | None = None


def standard_shape(target: ModelShape, variant: str = "features") -> HeadShape:
    """The form that a head gets unless something else is asked for, or a draft is trained around it.

    A features head has groups for each of three bands of layers, which all find their tokens by one wide key that knows its own
    token: together as many numbers as EAGLE-3's keys have, and at most 512. Where the queries would take most of the parameters
    they go through a narrower layer. An embedding head has EAGLE-3's form.
    """
    if variant != "features":
        return HeadShape(variant)
    bands = BANDS if target.layers >= FEWEST_LAYERS else 1
    width = min(WIDEST_KEY, target.kv_heads * target.head_dim)
    read, made = 2 * target.hidden_size, target.query_heads * bands * width
    rank = max(64, min(WIDEST_RANK, target.hidden_size * 2 // 3 // 64 * 64))
    return HeadShape(
        head_dim=width,
        bands=bands,
        key_heads=1,
        key_inputs="around",
        query_rank=rank if 2 * rank * (read + made) < read * made else None,
    )


def standard_feature_layers(layers: int) -> tuple[int, ...]:
    """EAGLE-3's 2, L // 2, L - 3 where they are distinct and in order, else up to three layers spread evenly."""
    standard = (2, layers // 2, layers - 3)
    if layers >= 7:
        return standard
    return tuple(sorted({max(1, round(layers * part)) for part in (0.25, 0.5, 0.75)}))


def new_head(shape: HeadShape, target: ModelShape, *, trained_length: int, source: str, seed: int) -> RetrievalHead:
    """A head of random weights for a model of shape `target`.

    Raises:
        HeadError: a form that does not fit together, or not this model.
        ConfigError: fewer query heads than groups.
    """
    features = () if shape.variant == "embedding" else shape.feature_layers or standard_feature_layers(target.depth)
    head_map = band_map(target.layers, target.kv_heads, shape.bands)
    groups = target.kv_heads * shape.bands
    heads = shape.heads if shape.heads is not None else target.query_heads * shape.bands
    if heads < groups:
        raise ConfigError(
            f"{heads} query heads are fewer than the {groups} groups of {shape.bands} bands: ask for at least {groups}"
        )
    config = HeadConfig(
        variant=shape.variant,
        hidden_size=target.hidden_size,
        target_hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        heads=heads,
        kv_heads=groups,
        head_dim=target.key_dim if shape.head_dim is None else shape.head_dim,
        feature_layers=features,
        head_map=head_map if shape.bands > 1 else None,
        rope_theta=shape.rope_theta,
        trained_length=trained_length,
        source=source,
        key_heads=shape.key_heads,
        key_inputs=shape.key_inputs,
        query_rank=shape.query_rank,
    )
    config.check_target(target)
    torch.manual_seed(seed)
    try:
        return RetrievalHead(config)
    except RuntimeError as error:  # what torch raises where there is no memory
        raise HeadError(
            f"a head of this form has {head_parameters(config):,} numbers, too many for this machine: ask for less"
        ) from error

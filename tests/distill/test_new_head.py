"""Forms of new heads for models of several shapes."""

from __future__ import annotations

import pytest
import torch

from specontext.distill.new_head import HeadShape, new_head, standard_shape
from specontext.errors import ConfigError
from specontext.model_shape import ModelShape
from specontext.retrieval.head import head_parameters


def shape_of(layers: int, hidden: int, heads: int, kv_heads: int, width: int) -> ModelShape:
    return ModelShape(layers, hidden, heads, kv_heads, width, 500, 8192, torch.float32)


SMALL, MEDIUM, LARGE = shape_of(4, 128, 4, 2, 32), shape_of(30, 576, 9, 3, 64), shape_of(32, 4096, 32, 8, 128)


@pytest.mark.parametrize(
    ("target", "bands", "width", "rank"), [(SMALL, 1, 64, None), (MEDIUM, 3, 192, 384), (LARGE, 3, 512, 1024)]
)
def test_the_standard_form_stores_no_more_than_eagle_s(target: ModelShape, bands: int, width: int, rank: int | None) -> None:
    form = standard_shape(target)
    assert (form.bands, form.head_dim, form.key_heads, form.key_inputs, form.query_rank) == (bands, width, 1, "around", rank)
    assert width <= target.kv_heads * target.head_dim
    if target is LARGE:
        return
    config = new_head(form, target, trained_length=64, source="", seed=0).config
    assert config.kv_heads == bands * target.kv_heads and config.heads == bands * target.query_heads
    if bands == 1:
        assert config.head_map is None
    else:
        assert config.head_map is not None and [config.head_map[layer][0] for layer in (0, 9, 10, 20, 29)] == [0, 0, 1, 2, 2]
    assert head_parameters(config) < 3 * head_parameters(
        new_head(HeadShape(), target, trained_length=64, source="", seed=0).config
    )


def test_an_embedding_head_and_a_draft_s_have_eagle_s_form() -> None:
    assert standard_shape(MEDIUM, "embedding") == HeadShape("embedding")
    config = new_head(HeadShape(), MEDIUM, trained_length=64, source="", seed=0).config
    assert (config.heads, config.kv_heads, config.head_dim, config.key_count, config.key_inputs) == (9, 3, 64, 3, "before")


def test_fewer_query_heads_than_groups() -> None:
    with pytest.raises(ConfigError, match="8 query heads are fewer than the 9 groups of 3 bands"):
        new_head(HeadShape(bands=3, heads=8), MEDIUM, trained_length=64, source="", seed=0)

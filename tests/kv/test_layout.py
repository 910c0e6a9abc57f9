"""A layout says how many bytes rows and pages take and how many pages a layer needs, also where layers differ in kind."""

from __future__ import annotations

import pytest
import torch

from specontext.kv.layout import LayerLayout, Layout, Part
from specontext.memory.layer_blocks import divide_layers
from specontext.model_shape import ModelShape

SHAPE = ModelShape(3, 8, 4, 2, 16, 10, 64, torch.bfloat16)


def test_keys_and_values_of_every_token() -> None:
    layout = Layout.of_shape(SHAPE, 5)
    assert layout.full == [0, 1, 2] and layout.layers[1].row_bytes == SHAPE.row_bytes
    assert layout.page_bytes == 5 * 2 * SHAPE.row_bytes and (layout.row_size(), layout.heads) == ((2, 16), 2)
    assert [layout.pages_for(0, tokens) for tokens in (0, 1, 5, 6)] == [0, 1, 1, 2]


def test_layers_of_other_kinds() -> None:
    """A latent row with a scale for all heads, and a ring of the last seven tokens beside full layers."""
    latent = LayerLayout((Part("latent", 24, torch.float8_e4m3fn), Part("scale", 1, torch.float32)), heads=1)
    ring = LayerLayout(Layout.of_shape(SHAPE, 5).layers[0].parts, heads=2, entries=7)
    layout = Layout((latent, ring, latent), 5, divide_layers([[0]] * 3, latent.row_bytes, layers=[0, 2]))
    assert latent.row_bytes == latent.entry_bytes == 28 and layout.full == [0, 2]
    assert layout.page_bytes == 5 * ring.entry_bytes, "pages serve whichever layer takes them"
    assert [layout.pages_for(1, tokens) for tokens in (4, 7, 100)] == [1, 2, 2] and layout.pages_for(2, 100) == 20
    assert layout.layer_blocks.members == ((0, 2),), "on the host only layers whose KV grows lie side by side"
    with pytest.raises(AssertionError, match="rows of several kinds"):
        layout.row_size()

"""Blocks of layers: every layer has one place, pieces are as large as asked, and blocks end where bands end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specontext.memory.layer_blocks import LayerBlocks, divide_layers, one_by_one
from specontext.retrieval.head_map import band_map

SAME = ((0, 1),)


@pytest.mark.parametrize(
    ("layers", "row_bytes", "sizes"),
    [
        (32, 512, (4,) * 8),  # D = 128 in 16 bits
        (32, 1024, (2,) * 16),  # in float32
        (16, 256, (8, 8)),  # D = 64
        (28, 512, (4,) * 7),
        (3, 512, (3,)),  # fewer than a block
        (26, 512, (7, 7, 6, 6)),  # 4 and 3 would make pieces that are too small
        (5, 4096, (1,) * 5),
        (1, 64, (1,)),
    ],
)
def test_blocks_of_known_models(layers: int, row_bytes: int, sizes: tuple[int, ...]) -> None:
    assert divide_layers(SAME * layers, row_bytes).sizes == sizes


def test_blocks_end_where_bands_end() -> None:
    assert divide_layers(band_map(32, 8, 2), 512).sizes == (4,) * 8
    assert divide_layers(band_map(32, 8, 3), 512).sizes == (6, 5, 6, 5, 5, 5)
    assert divide_layers(band_map(6, 2, 3), 512).sizes == (2, 2, 2)


def test_single_heads_that_read_elsewhere_end_no_band() -> None:
    head_map = [[0, 1, 2, 3], [0, 1, 2, 2], [1, 1, 2, 3], [0, 1, 0, 3]]
    assert divide_layers(head_map, 512).sizes == (4,)


def test_layers_without_rows_of_all_tokens_have_no_place() -> None:
    """As in models whose windowed layers keep a ring, and others a state."""
    blocks = divide_layers(SAME * 24, 512, layers=range(5, 24, 6))
    assert blocks.members == ((5, 11, 17, 23),) and blocks.home[17] == (0, 2) and 6 not in blocks.home


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.sampled_from([64, 100, 256, 512, 700, 1024, 2048, 5000]))
def test_any_division(bands: list[int], row_bytes: int) -> None:
    head_map = [(band, band + 100) for band, length in enumerate(bands) for _ in range(length)]
    blocks = divide_layers(head_map, row_bytes)
    fewest = -(-2048 // row_bytes)
    assert [layer for members in blocks.members for layer in members] == list(range(sum(bands)))
    for block, members in enumerate(blocks.members):
        band = head_map[members[0]][0]
        assert {head_map[layer][0] for layer in members} == {band}
        assert min(fewest, bands[band]) <= len(members) < 2 * fewest
        assert [blocks.home[layer] for layer in members] == [(block, place) for place in range(len(members))]
    assert blocks.places == max(blocks.sizes)
    assert blocks.of(range(len(head_map))) == list(range(len(blocks.sizes)))
    for away, places in enumerate(blocks.places_away):
        last = range(len(head_map) - away, len(head_map))
        assert places == len(blocks.of(last)) * blocks.places >= away
    assert len(blocks.places_away) == len(head_map) + 1


def test_one_layer_a_block() -> None:
    blocks = one_by_one(3)
    assert blocks == LayerBlocks((1, 1, 1), 1, (0, 1, 2)) and blocks.places_away == (0, 1, 2, 3)


def test_a_block_that_is_away_in_part_is_read_in_smaller_pieces() -> None:
    blocks = divide_layers([range(8)] * 10, 512)
    assert blocks.sizes == (5, 5)
    assert [blocks.read_bytes(away, 512, 2048) for away in (0, 1, 4, 5, 6, 10)] == [0, 2048, 2048, 2560, 4608, 5120]
    assert [blocks.read_bytes(away, 512, 1) for away in (0, 1, 6)] == [0, 512, 3072], "where pieces do not matter"

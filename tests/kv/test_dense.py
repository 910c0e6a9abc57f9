"""Dense reading finds every stored token in its order, in both tiers and wherever its pages lie."""

from __future__ import annotations

import pytest
import torch

from specontext.core import ModelShape
from specontext.kv.dense import pages_in_reach, stored_tiles
from specontext.kv.pool import make_pools
from specontext.kv.reading import Reader
from specontext.kv.tiered import TieredKV

HEADS, DIM, TOKENS = 2, 4, 29


@pytest.fixture
def kv() -> TieredKV:
    """Layer 0 resident, layer 1 offloaded; three seats of which the middle one was given back and taken again."""
    shape = ModelShape(2, 8, HEADS, HEADS, DIM, 10, 64, torch.float32)
    arena, host = make_pools(shape, device_pages=60, host_pages=60, page_size=4, device=torch.device("cpu"))
    kv = TieredKV(
        shape,
        resident=(True, False),
        reader=Reader(torch.zeros(2, HEADS, dtype=torch.int64)),
        tables=1,
        groups=1,
        slots=6,
        sink=1,
        recent=2,
        seats=3,
        max_tokens=32,
        arena=arena,
        host=host,
    )
    for seat in range(3):
        kv.open(seat, 32)
    kv.close(1)
    kv.open(1, 32)
    return kv


def store(kv: TieredKV, layer: int, seat: int) -> torch.Tensor:
    """Write random tokens; returns them as [TOKENS, Hkv, 2, D]."""
    tokens = torch.randn(TOKENS, HEADS, 2, DIM, generator=torch.Generator().manual_seed(seat))
    positions = torch.arange(TOKENS)
    key, value = tokens.unbind(2)
    kv.append_chunk(layer, torch.full_like(positions, seat), positions, key, value, torch.full_like(positions, TOKENS))
    return tokens


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("tile", [1, 5, 8, 100])
def test_tiles_are_the_stored_tokens(layer: int, tile: int, kv: TieredKV) -> None:
    for seat in range(3):
        tokens = store(kv, layer, seat)
        for stop in (0, 1, 4, TOKENS):
            tiles = [part.clone() for part in stored_tiles(kv, layer, seat, stop, tile)]  # the next tile may overwrite it
            assert all(0 < len(part) <= tile for part in tiles)
            assert torch.equal(torch.cat([tokens[:0], *tiles]), tokens[:stop])


@pytest.mark.parametrize("layer", [0, 1])
def test_pages_in_reach_lead_to_the_stored_tokens(layer: int, kv: TieredKV) -> None:
    stored = [store(kv, layer, seat) for seat in range(3)]
    reach = pages_in_reach(kv, layer, torch.tensor([2, 1]))
    assert reach is not None
    rows, pages = reach
    for at, seat in enumerate((2, 1)):
        for token in (0, 3, 17, TOKENS - 1):
            row = (pages[at, token // 4] * 4 + token % 4) * HEADS
            assert torch.equal(rows[row : row + HEADS], stored[seat][token])

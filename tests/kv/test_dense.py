"""Dense reading finds every stored token in its order, in both tiers and wherever its pages lie."""

from __future__ import annotations

import pytest
import torch

from specontext.core import ModelShape
from specontext.kernels.tables import NewTokens
from specontext.kv.cache import KVCache
from specontext.kv.dense import stored_tiles
from specontext.kv.hot_slots import SlotSizes
from specontext.kv.layout import Layout, Reader
from specontext.kv.pool import make_pools
from specontext.kv.staging import DenseRead, Staging
from specontext.kv.streams import PREFETCH
from tests.kv.test_streams import RecordingStreams, watch

HEADS, DIM, TOKENS = 2, 4, 29


@pytest.fixture
def kv() -> KVCache:
    """Layer 0 resident, layer 1 offloaded; three seats of which the middle one was given back and taken again."""
    layout, cpu = Layout.of_shape(ModelShape(2, 8, HEADS, HEADS, DIM, 10, 64, torch.float32), 4), torch.device("cpu")
    kv = KVCache(
        *make_pools(layout, device_pages=60, host_pages=60, device=cpu),
        resident=(True, False),
        reader=Reader.of_map(layout, torch.zeros(2, HEADS, dtype=torch.int64), cpu),
        slots=SlotSizes(6, sink=1, recent=2),
        seats=3,
        max_tokens=32,
    )
    for seat in range(3):
        kv.open(seat, 32)
    kv.close(1)
    kv.open(1, 32)
    return kv


def store(kv: KVCache, layer: int, seat: int) -> torch.Tensor:
    """Write random tokens; returns them as [TOKENS, Hkv, 2, D]."""
    tokens = torch.randn(TOKENS, HEADS, 2, DIM, generator=torch.Generator().manual_seed(seat))
    positions = torch.arange(TOKENS)
    key, value = tokens.unbind(2)
    seats, lengths = torch.full_like(positions, seat), torch.full_like(positions, TOKENS)
    kv.transfers.append_chunk(layer, NewTokens(seats, positions, lengths, key, value))
    return tokens


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("tile", [1, 5, 8, 100])
def test_tiles_are_the_stored_tokens(layer: int, tile: int, kv: KVCache) -> None:
    for seat in range(3):
        tokens = store(kv, layer, seat)
        for stop in (0, 1, 4, TOKENS):
            tiles = [
                part.clone() for part in stored_tiles(kv.transfers, layer, seat, stop, tile)
            ]  # the next tile may overwrite it
            assert all(0 < len(part) <= tile for part in tiles)
            assert torch.equal(torch.cat([tokens[:0], *tiles]), tokens[:stop])


@pytest.mark.parametrize("layer", [0, 1])
def test_page_tables_lead_to_the_stored_tokens(layer: int, kv: KVCache) -> None:
    stored = [store(kv, layer, seat) for seat in range(3)]
    home = kv.transfers.home(layer)
    for seat in (2, 1):
        for token in (0, 3, 17, TOKENS - 1):
            page = int(home.table_of(layer)[seat, token // 4])
            assert torch.equal(home.by_page(layer)[page, token % 4], stored[seat][token])
            rows = home.rows_of(layer, torch.tensor([seat]), torch.tensor([[[token]]]))[0, :, 0]
            assert torch.equal(home.rows[rows], stored[seat][token])


@pytest.mark.parametrize(("room", "tiles", "fetched"), [(0, 6, (6, 8)), (1 << 20, 2, (1, 1))], ids=["tiles", "blocks"])
def test_staged_tiles_are_right_in_whatever_order_they_are_asked_for(
    room: int, tiles: int, fetched: tuple[int, int], kv: KVCache
) -> None:
    """In the order that was announced each is fetched once; out of it more often, and never another one's rows. Where a buffer
    holds all of them, they are there at once."""
    stored = [store(kv, 1, seat) for seat in range(3)]
    streams = RecordingStreams()
    kv.transfers.run_on(streams)
    reads = [
        DenseRead(torch.tensor([2]), 21, 8),
        DenseRead(torch.tensor([0, 1]), 13, 5, ends=torch.tensor([13, 9])),
    ]

    def check(staging: Staging, read: DenseRead) -> int:
        count = 0
        for tile in staging.tiles(1, read):
            count += 1
            for found, rows, seat in zip(tile.tokens, tile.rows(), read.seats.tolist(), strict=True):
                end = min(tile.stop, 13 if seat == 0 else 9 if seat == 1 else 21)
                length = max(0, end - tile.start)
                assert torch.equal(found[:length], stored[seat][tile.start : end])
                assert torch.equal(tile.buffer[rows[:, :length].T], found[:length])
        return count

    for order, times in zip((reads, reads[::-1]), fetched, strict=True):
        before = streams.clocks[PREFETCH].get(PREFETCH, 0)
        with pytest.MonkeyPatch.context() as patch:
            watch(streams, patch)
            assert sum(check(staging, read) for staging in [Staging(kv.transfers, reads, room)] for read in order) == tiles
        assert (streams.clocks[PREFETCH][PREFETCH] - before) // 2 == times, "a read and a write for each"


def test_a_block_of_layers_is_fetched_at_once_and_whatever_of_it_is_away() -> None:
    """Three layers side by side on the host, of which the last two are there: one copy, and each layer's own tokens."""
    layout, cpu = Layout.of_shape(ModelShape(3, 8, HEADS, HEADS, DIM, 10, 64, torch.float32), 4), torch.device("cpu")
    assert layout.layer_blocks.sizes == (3,)
    cache = KVCache(
        *make_pools(layout, device_pages=60, host_pages=60, device=cpu),
        resident=(True, False, False),
        reader=Reader.of_map(layout, torch.zeros(3, HEADS, dtype=torch.int64), cpu),
        slots=None,
        seats=1,
        max_tokens=32,
    )
    cache.open(0, 32)
    tokens = [store(cache, layer, seat) for layer, seat in ((1, 0), (2, 0))]
    again = torch.randn(TOKENS, HEADS, 2, DIM)
    positions = torch.arange(TOKENS)
    zeros, lengths = torch.zeros_like(positions), torch.full_like(positions, TOKENS)
    cache.transfers.append_chunk(2, NewTokens(zeros, positions, lengths, *again.unbind(2)))
    streams, read = RecordingStreams(), DenseRead(torch.tensor([0]), TOKENS, 8)
    cache.transfers.run_on(streams)
    with pytest.MonkeyPatch.context() as patch:
        watch(streams, patch)
        staging = Staging(cache.transfers, [read], 1 << 20)
        for layer, expected in ((1, tokens[0]), (2, again)):
            [tile] = staging.tiles(layer, read)
            assert torch.equal(tile.tokens[0], expected)
    assert streams.clocks[PREFETCH][PREFETCH] == 2, "a read and a write"

"""Dense reading finds every stored token in its order, in both tiers and wherever its pages lie."""

from __future__ import annotations

import pytest
import torch

from specontext.kernels.paged_attention import tokens_of_pages
from specontext.kernels.rows import row_of
from specontext.kernels.spans import read_rows
from specontext.kernels.tables import NewTokens
from specontext.kv.cache import KVCache
from specontext.kv.dense import stored_tiles
from specontext.kv.hot_slots import SlotSizes
from specontext.kv.layout import Layout, Reader
from specontext.kv.pool import make_pools
from specontext.kv.staging import DenseRead, Staging
from specontext.kv.streams import PREFETCH
from specontext.model_shape import ModelShape
from tests.kv.test_streams import RecordingStreams, watch

HEADS, DIM, TOKENS = 2, 4, 29


@pytest.fixture(params=[None, torch.int8], ids=["numbers", "int8"])
def kv(request: pytest.FixtureRequest) -> KVCache:
    """Layer 0 resident, layer 1 offloaded; three seats of which the middle one was given back and taken again."""
    shape = ModelShape(2, 8, HEADS, HEADS, DIM, 10, 64, torch.float32, kv_dtype=request.param)
    layout, cpu = Layout.of_shape(shape, 4), torch.device("cpu")
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


def store(kv: KVCache, layer: int, seat: int, number: int | None = None) -> torch.Tensor:
    """Write random tokens; returns their rows, [TOKENS, Hkv, *row]."""
    tokens = torch.randn(TOKENS, HEADS, 2, DIM, generator=torch.Generator().manual_seed(seat if number is None else number))
    positions = torch.arange(TOKENS)
    key, value = tokens.unbind(2)
    seats, lengths = torch.full_like(positions, seat), torch.full_like(positions, TOKENS)
    kv.transfers.append_chunk(layer, NewTokens(seats, positions, lengths, key, value))
    return row_of(key, value, kv.arena.rows)


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
            found = tokens_of_pages(home.by_page(layer), torch.tensor([page]), token % 4, token % 4 + 1)
            assert torch.equal(found[0], stored[seat][token])
            rows = home.rows_of(layer, torch.tensor([seat]), torch.tensor([[[token]]]))[0, :, 0]
            assert torch.equal(read_rows(home.rows, rows), stored[seat][token])


def test_staged_tiles_are_right_in_whatever_order_they_are_asked_for(kv: KVCache) -> None:
    """In the order that was announced each tile is fetched once; out of it more often, and never another one's rows."""
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
                assert torch.equal(read_rows(tile.buffer, rows[:, :length].T), found[:length])
        return count

    for order, fetched in ((reads, 6), (reads[::-1], 8)):
        before = streams.clocks[PREFETCH].get(PREFETCH, 0)
        with pytest.MonkeyPatch.context() as patch:
            watch(streams, patch)
            assert sum(check(staging, read) for staging in [Staging(kv.transfers, reads)] for read in order) == 6
        assert (streams.clocks[PREFETCH][PREFETCH] - before) // 2 == fetched, "a read and a write for each tile"


@pytest.mark.parametrize("codes", [None, torch.float8_e4m3fn], ids=["numbers", "fp8"])
def test_a_layer_is_read_out_of_the_pieces_that_it_shares(codes: torch.dtype | None) -> None:
    """Three layers side by side on the host, of which one has moved to the device: each layer's own tokens, from any seat."""
    shape = ModelShape(3, 8, HEADS, HEADS, DIM, 10, 64, torch.float32, kv_dtype=codes)
    layout, cpu = Layout.of_shape(shape, 4), torch.device("cpu")
    assert layout.layer_blocks.sizes == (3,)
    cache = KVCache(
        *make_pools(layout, device_pages=60, host_pages=60, device=cpu),
        resident=(True, False, False),
        reader=Reader.of_map(layout, torch.zeros(3, HEADS, dtype=torch.int64), cpu),
        slots=None,
        seats=2,
        max_tokens=32,
    )
    cache.open(0, 32)
    cache.open(1, 32)
    tokens = {(layer, seat): store(cache, layer, seat, number) for number, (layer, seat) in enumerate([(1, 0), (2, 0), (2, 1)])}
    reads = [DenseRead(torch.tensor([seat]), TOKENS, 16) for seat in (0, 1)]
    cache.transfers.run_on(RecordingStreams())
    staging = Staging(cache.transfers, reads)
    for layer, seat in tokens:
        found = torch.cat([tile.tokens[0].clone() for tile in staging.tiles(layer, reads[seat])])
        assert torch.equal(found.view(torch.uint8), tokens[layer, seat].view(torch.uint8))

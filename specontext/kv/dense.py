"""Dense reading of the tokens that a layer has stored: prompt chunks and dense decoding read them all, page by page.

Rows of an offloaded layer are read where they lie on a CPU. For a GPU they are streamed into one of two staging tiles while
the other is attended to, across the bounds of layers: the first tile of a layer is on its way while the layer before computes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from specontext.kernels.paged_attention import tile_buffer, tokens_of_pages
from specontext.kernels.rows import gather_rows
from specontext.kv.pool import PagePool
from specontext.kv.streams import COMPUTE, PREFETCH, Mark
from specontext.kv.tiered import TieredKV


def in_reach(kv: TieredKV, layer: int) -> bool:
    """Whether attention can read a layer's tokens in place: on a CPU both tiers, on a GPU the device's."""
    return kv.resident[layer] or not kv.streams.asynchronous


def pages_in_reach(kv: TieredKV, layer: int, seats: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, 2, D] and page table int64 [R, P] of a layer's tokens that are in reach."""
    assert in_reach(kv, layer)
    pool, table = _home(kv, layer)
    return pool.rows, table[layer].index_select(0, seats)


def stored_tiles(kv: TieredKV, layer: int, seat: int, stop: int, tile: int) -> Iterator[Tensor]:
    """K and V of the tokens 0 .. stop - 1 of a request, in tiles [T, Hkv, 2, D], T at most `tile`, where they are in reach.

    A tile is a view of the pool or of a buffer that the next tile overwrites.
    """
    if not stop:
        return
    assert in_reach(kv, layer)
    pool, table = _home(kv, layer)
    sizes = {"page_size": kv.page_size, "kv_heads": kv.shape.kv_heads}
    pages = table[layer, seat, : kv.pages_for(stop)]
    buffer = tile_buffer(pool.rows, min(tile, stop), **sizes)
    for start in range(0, stop, tile):
        yield tokens_of_pages(pool.rows, pages, start, min(start + tile, stop), **sizes, buffer=buffer)


def tile_rows(kv: TieredKV, layer: int, seats: Tensor, start: int, stop: int, lengths: Tensor | None = None) -> Tensor:
    """Rows of the tokens start .. stop - 1 of some requests in the pool where the layer lives: int64 [R, Hkv, stop - start].

    Args:
        lengths: int64 [R], ends of the requests, -1 stands beyond them; None where none ends before `stop`.
    """
    tokens = torch.arange(start, stop, device=kv.device)[None]
    index = tokens.expand(len(seats), -1) if lengths is None else torch.where(tokens < lengths[:, None], tokens, -1)
    pool, table = _home(kv, layer)
    return pool.rows_of(table[layer].index_select(0, seats), index[:, None])


def read_tile(kv: TieredKV, layer: int, seats: Tensor, start: int, stop: int, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """A buffer [N, 2, D] that attention can read, and rows [R, Hkv, T] in it of the tokens start .. stop - 1; see `tile_rows`."""
    return _read(kv, layer, tile_rows(kv, layer, seats, start, stop, lengths))


def read_tokens(kv: TieredKV, layer: int, seats: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The same of any tokens int64 [R, Hkv, B], -1 for none."""
    pool, table = _home(kv, layer)
    return _read(kv, layer, pool.rows_of(table[layer].index_select(0, seats), tokens))


def _read(kv: TieredKV, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the pool where a layer lives, copied to the device where attention cannot read them in place."""
    if in_reach(kv, layer):
        return _home(kv, layer)[0].rows, rows
    staging = kv.arena.rows.new_empty((rows.numel(), *kv.arena.rows.shape[1:]))
    place = torch.arange(rows.numel(), device=kv.device).view_as(rows)
    gather_rows(kv.host.rows, rows, staging, place)
    return staging, torch.where(rows >= 0, place, -1)


class HostTiles:
    """Rows of the host on their way to a GPU, one tile ahead of the one that is read.

    Args:
        tiles: rows of the host, int64 of any shape, of every tile in the order of reading; -1 leaves a place as it is.
        most_rows: rows of the largest tile.
    """

    def __init__(self, kv: TieredKV, tiles: Iterator[Tensor], most_rows: int) -> None:
        self._kv, self._tiles = kv, tiles
        rows = kv.arena.rows
        self._buffers = [rows.new_empty((most_rows, *rows.shape[1:])) for _ in range(2)]
        self._turn = 0
        self._coming: tuple[Tensor, int, Mark] | None = None
        self._fetch()

    def _fetch(self) -> None:
        wanted = next(self._tiles, None)
        if wanted is None:
            self._coming = None
            return
        streams, buffer = self._kv.streams, self._buffers[self._turn]
        place = torch.arange(wanted.numel(), device=wanted.device)
        # Compute has been given all that reads this buffer's last tile.
        streams.wait(PREFETCH, streams.record(COMPUTE))
        with streams.on(PREFETCH):
            gather_rows(self._kv.host.rows, wanted.reshape(-1), buffer, place)
        streams.keep(PREFETCH, wanted, place, buffer)
        self._coming = buffer, wanted.numel(), streams.record(PREFETCH)
        self._turn = 1 - self._turn

    def take(self) -> Tensor:
        """The next tile's rows [N, 2, D], in the order they were named; valid until the second `take` from now."""
        assert self._coming is not None, "more tiles are read than were announced"
        buffer, count, mark = self._coming
        self._kv.streams.wait(COMPUTE, mark)
        self._fetch()
        return buffer[:count]


def _home(kv: TieredKV, layer: int) -> tuple[PagePool, Tensor]:
    """The pool and the page tables [L, seats + 1, P] that hold all tokens of a layer."""
    if kv.resident[layer]:
        return kv.arena, kv.token_pages.table
    return kv.host, kv.host_pages.table

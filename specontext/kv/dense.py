"""Dense reading of the tokens that a layer has stored and attention can reach: in tiles, or any of them by number.

Rows of an offloaded layer are read where they lie on a CPU; on a GPU they come through `staging.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from specontext.kernels.paged_attention import tile_buffer, tokens_of_pages
from specontext.kernels.rows import gather_rows, gather_tokens
from specontext.kernels.spans import room_for, row_size
from specontext.kv.transfers import Transfers


def tiles_of(stop: int, tile: int) -> list[tuple[int, int]]:
    """Bounds of tiles of `tile` tokens, the last one perhaps shorter."""
    return [(start, min(start + tile, stop)) for start in range(0, stop, tile)]


def stored_tiles(transfers: Transfers, layer: int, seat: int, stop: int, tile: int) -> Iterator[Tensor]:
    """K and V of the tokens 0 .. stop - 1 of a request, in tiles [T, Hkv, *row], T at most `tile`, where they are in reach.

    A tile is a view of the pool or of a buffer that the next tile overwrites. On a GPU one kernel copies it.
    """
    if not stop:
        return
    assert transfers.in_reach(layer)
    home = transfers.home(layer)
    if transfers.asynchronous:
        whole = home.rows.new_empty((min(tile, stop), home.heads, *row_size(home.rows)))
        for first, end in tiles_of(stop, tile):
            part = whole[: end - first]
            gather_tokens(home, layer, seat, first, part)
            yield part
        return
    pages, rows = home.table_of(layer)[seat, : -(-stop // home.size)], home.by_page(layer)
    buffer = tile_buffer(rows, min(tile, stop))
    for bounds in tiles_of(stop, tile):
        yield tokens_of_pages(rows, pages, *bounds, buffer=buffer)


def read_tile(transfers: Transfers, layer: int, seats: Tensor, start: int, stop: int, ends: Tensor) -> tuple[Tensor, Tensor]:
    """A pool that attention can read, and rows [R, Hkv, T] in it of the tokens start .. stop - 1 of some requests.

    Args:
        ends: int64 [R], tokens of the requests; -1 stands beyond them.
    """
    tokens = torch.arange(start, stop, device=seats.device)[None]
    return read_tokens(transfers, layer, seats, torch.where(tokens < ends[:, None], tokens, -1)[:, None])


def read_tokens(transfers: Transfers, layer: int, seats: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The same of any tokens int64 [R, Hkv, B], -1 for none."""
    home = transfers.home(layer)
    rows = home.rows_of(layer, seats, tokens)
    if transfers.in_reach(layer):
        return home.rows, rows
    staging = room_for(home.rows, rows.numel(), home.size * home.heads, rows.device)
    place = torch.arange(rows.numel(), device=rows.device).view_as(rows)
    gather_rows(home.rows, rows, staging, place)
    return staging, torch.where(rows >= 0, place, -1)

"""Dense reading of the tokens that a layer has stored: prompt chunks and dense decoding read them all, page by page."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from specontext.kernels.paged_attention import tile_buffer, tokens_of_pages
from specontext.kv.pool import PagePool
from specontext.kv.tiered import TieredKV


def pages_in_reach(kv: TieredKV, layer: int, seats: Tensor) -> tuple[Tensor, Tensor] | None:
    """Rows and page table of a layer's tokens, where attention on the device can read them in place.

    On a CPU both tiers are in reach; a GPU reaches resident layers only.

    Returns:
        rows [N, 2, D] and int64 pages [R, P], or None.
    """
    pool, table = _home(kv, layer)
    if pool.rows.device.type != kv.device.type:
        return None
    return pool.rows, table[layer].index_select(0, seats)


def stored_tiles(kv: TieredKV, layer: int, seat: int, stop: int, tile: int) -> Iterator[Tensor]:
    """K and V of the tokens 0 .. stop - 1 of a request in tiles [T, Hkv, 2, D] on the device, T at most `tile`.

    A tile is a view of the pool or of a buffer that the next tile overwrites.
    """
    if not stop:
        return
    pool, table = _home(kv, layer)
    sizes = {"page_size": kv.page_size, "kv_heads": kv.shape.kv_heads}
    # Host rows are read by the CPU: bringing the page numbers there waits until all that was stored has arrived.
    pages = table[layer, seat, : -(-stop // kv.page_size)].to(pool.rows.device)
    buffer = tile_buffer(pool.rows, min(tile, stop), **sizes)
    for start in range(0, stop, tile):
        tokens = tokens_of_pages(pool.rows, pages, start, min(start + tile, stop), **sizes, buffer=buffer)
        yield tokens.to(kv.device, non_blocking=True)


def _home(kv: TieredKV, layer: int) -> tuple[PagePool, Tensor]:
    """The pool and the page tables [L, seats, P] that hold all tokens of a layer."""
    if kv.resident[layer]:
        return kv.arena, kv.device_table
    return kv.host, kv.host_table

"""Rows of many tokens, copied from pages to pages in all layers of a kind."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.rows import gather_rows, gather_rows_layers
from specontext.kv.pool import PagePool
from specontext.kv.streams import COMPUTE
from specontext.kv.tiered import TieredKV


def copy_pages(
    kv: TieredKV,
    source: tuple[PagePool, Tensor],
    target: tuple[PagePool, Tensor],
    tokens: int,
    *,
    skipped: Tensor,
    side: str,
) -> None:
    """Copy the first `tokens` tokens that lie in some pages of every layer into other pages.

    It happens on the stream `side`, after all that compute has been given; nothing waits for it yet.

    Args:
        source, target: pools, and pages int64 [L, P] in them, on the device.
        skipped: bool [L], layers that are passed over.
    """
    streams = kv.streams
    if not streams.asynchronous:  # whole pages, as they lie: what is behind the tokens means nothing
        pools = [pool.rows.view(pool.pages.num_pages, 2, -1) for pool, _ in (source, target)]
        pages = [pages[~skipped].flatten() for _, pages in (source, target)]
        gather_rows(pools[0], pages[0], pools[1], pages[1])
        return
    # The gather of layers leaves the device to what is computed beside it.
    index = torch.arange(tokens, device=kv.device)[None, None]
    seat = torch.zeros(1, dtype=torch.int64, device=kv.device)
    head_map = torch.zeros((kv.shape.layers, kv.shape.kv_heads), dtype=torch.int64, device=kv.device)
    missing = torch.ones_like(index, dtype=torch.bool)
    here, there = (pages[:, None].contiguous() for _, pages in (source, target))
    streams.wait(side, streams.record(COMPUTE))
    with streams.on(side):
        gather_rows_layers(
            source[0].rows,
            target[0].rows,
            here,
            there,
            kv.layers,
            seat,
            head_map,
            skipped,
            index,
            index,
            missing,
            kv.page_size,
        )
    streams.keep(side, here, there, seat, head_map, skipped, index, missing)

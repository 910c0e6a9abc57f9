"""Rows of many tokens, copied from pages to pages in all layers of a kind."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.rows import gather_rows_layers
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
    device, streams = kv.device, kv.streams
    index = torch.arange(tokens, device=device)[None, None]
    seat = torch.zeros(1, dtype=torch.int64, device=device)
    head_map = torch.zeros((kv.shape.layers, kv.shape.kv_heads), dtype=torch.int64, device=device)
    missing = torch.ones_like(index, dtype=torch.bool)
    source_pages, target_pages = (pages[:, None].contiguous() for _, pages in (source, target))
    # On a CPU the row numbers of all layers at once would be hundreds of megabytes for a long context.
    parts = kv.layers.split(kv.shape.layers if streams.asynchronous else 1)
    streams.wait(side, streams.record(COMPUTE))
    with streams.on(side):
        for layers in parts:
            gather_rows_layers(
                source[0].rows,
                target[0].rows,
                source_pages,
                target_pages,
                layers,
                seat,
                head_map,
                skipped,
                index,
                index,
                missing,
                kv.page_size,
            )
    streams.keep(side, index, seat, head_map, missing, source_pages, target_pages, skipped)

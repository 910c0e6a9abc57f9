"""Bytes of the device in pages of the host, whatever the number format of the rows that these pages are made for."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.rows import gather_rows
from specontext.kernels.spans import row_bytes, row_size, rows_like
from specontext.kv.streams import PREFETCH, WRITE_BACK
from specontext.kv.transfers import Transfers


def store_bytes(transfers: Transfers, each: Tensor, pages: Tensor) -> None:
    """Copy bytes to the host, beside what is computed; nothing waits for them yet.

    Args:
        each: uint8 [places, bytes].
        pages: int64 [pages of as many bytes, places], pages of the host.
    """
    host = transfers.tiers.host.rows
    rows = torch.nn.functional.pad(each, (0, -each.shape[1] % row_bytes(host))).view(host.dtype).view(-1, *row_size(host))
    here, there = torch.arange(len(rows), device=rows.device), _rows_of(transfers, each.shape[1], pages)
    with transfers.beside(WRITE_BACK, rows, here, there):
        gather_rows(rows, here, host, there)


def load_bytes(transfers: Transfers, count: int, pages: Tensor) -> Tensor:
    """uint8 [places, count] from each place's pages; what is computed next finds them there."""
    host = transfers.tiers.host.rows
    there = _rows_of(transfers, count, pages)
    here = torch.arange(len(there), device=there.device)
    rows = rows_like(host, len(there), there.device)
    with transfers.beside(PREFETCH, rows, here, there):
        gather_rows(host, there, rows, here)
    transfers.join(PREFETCH)
    return rows.view(torch.uint8).view(pages.shape[1], -1)[:, :count].contiguous()


def _rows_of(transfers: Transfers, count: int, pages: Tensor) -> Tensor:
    """Rows of the host that hold so many bytes in each place's pages, place after place: int64 [places * rows]."""
    host = transfers.tiers.host
    page_rows = host.size * host.heads * host.layers.count
    at = torch.arange(-(-count // row_bytes(host.rows)), device=pages.device)
    return (pages[at // page_rows] * page_rows + at[:, None] % page_rows).T.reshape(-1)

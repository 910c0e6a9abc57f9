"""What is kept of pages of prompts besides KV, in pages of the host behind those of the layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specontext.kernels.rows import gather_rows
from specontext.kernels.spans import row_bytes, row_size, rows_like
from specontext.kv.streams import PREFETCH, WRITE_BACK
from specontext.kv.transfers import Transfers


@dataclass(frozen=True)
class State:
    """What is known of pages of tokens besides KV, in the number format of the model.

    Attributes:
        each: [n, numbers], of every page.
        last: [n, numbers] of the last token of every page; of the very last page only where it comes back.
    """

    each: Tensor
    last: Tensor


class BlockState:
    """Rows of state, in whole rows of KV.

    Args:
        before: pages of each block that hold KV.
        page_rows: rows of a page of the host.
        dtype: number format of state, which divides a row.
        each, last: numbers of a block's state; see `State`.

    Attributes:
        pages: of the host, for each block.
    """

    def __init__(self, transfers: Transfers, before: int, page_rows: int, dtype: torch.dtype, *, each: int, last: int) -> None:
        self._transfers, self._sizes, self._before, self._page_rows = transfers, (each, last), before, page_rows
        self._dtype, self._width = dtype, row_bytes(transfers.tiers.host.rows) // dtype.itemsize
        self._each_rows, self._last_rows = -(-each // self._width), -(-last // self._width)
        self.pages = -(-(self._each_rows + self._last_rows) // self._page_rows)

    def keep(self, pages: Tensor, state: State) -> None:
        """Copy the state of some blocks to the host, beside what is computed.

        Args:
            pages: int64 [pages of a block, blocks].
        """
        rows_of_all = self._each_rows + self._last_rows
        if not rows_of_all:
            return
        host = self._transfers.tiers.host.rows
        numbers = torch.zeros((pages.shape[1], rows_of_all * self._width), dtype=self._dtype, device=pages.device)
        numbers[:, : self._sizes[0]] = state.each
        numbers[:, self._each_rows * self._width :][:, : self._sizes[1]] = state.last
        rows = numbers.view(host.dtype).view(-1, *row_size(host))
        here, there = torch.arange(len(rows), device=pages.device), self._rows(pages, 0, rows_of_all)
        with self._transfers.beside(WRITE_BACK, rows, here, there):
            gather_rows(rows, here, host, there)

    def bring(self, pages: Tensor) -> State:
        """The state of some blocks, on its way: what `keep` was given, and of the last block only `State.last`."""
        host = self._transfers.tiers.host.rows
        of_each = self._rows(pages, 0, self._each_rows)
        of_last = self._rows(pages[:, -1:], self._each_rows, self._each_rows + self._last_rows)
        there = torch.cat((of_each, of_last))
        here = torch.arange(len(there), device=pages.device)
        rows = rows_like(host, len(there), pages.device)
        with self._transfers.beside(PREFETCH, there, here, rows):
            gather_rows(host, there, rows, here)
        each, last = rows.flatten(1).view(self._dtype).split([len(of_each), len(of_last)])
        return State(
            each.reshape(pages.shape[1], self._each_rows * self._width)[:, : self._sizes[0]],
            last.reshape(1, self._last_rows * self._width)[:, : self._sizes[1]],
        )

    def _rows(self, pages: Tensor, start: int, stop: int) -> Tensor:
        """Host rows of the rows start .. stop - 1 of state, of one block after the other: int64 [blocks * rows]."""
        at = torch.arange(start, stop, device=pages.device)
        found = pages[self._before + at // self._page_rows] * self._page_rows + at[:, None] % self._page_rows
        return found.T.reshape(-1)

"""Rows in 8 bits as they lie in memory: the codes of a span of S rows, and behind them their scales.

    pool [spans, S, 2 * D + 4]     bytes of a span:  codes of S rows, 2 * D each | scales of S rows, 4 each

A pool's spans are its pages. Rows of 2 * D + 4 bytes one after the other would begin at multiples of 4 bytes, be read by as many,
and cross a bus in small requests. So the codes of a piece are read by 16 bytes, in whole lines of 128, and its scales in one more
request. Rows that stand for themselves, [..., 2 * D + 4], are spans of one row: buffers have them, and `read_rows` makes them.

A row of latents, each of which is key and value at once, has D + 4 bytes: one vector, and its scale twice. `vectors_in` tells
which rows are. A pool of numbers [N, *row] has no spans; what is said of one of 8 bits holds for it with the rows as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CODES = (torch.float8_e4m3fn, torch.int8)  # number formats of rows in 8 bits
SCALE_WORDS = 1  # of 4 bytes, both scales of a row


def span_of(pool: Tensor) -> int:
    """Rows of a span of a pool in 8 bits, [spans, S, row] or [N, row]; 0 for a pool of numbers."""
    if pool.dtype not in CODES:
        return 0
    return pool.shape[1] if pool.dim() == 3 else 1


def vectors_in(rows: Tensor, dim: int) -> int:
    """Vectors of `dim` numbers in a row of a pool, or in rows [..., *row]: 2, a key and a value, or a latent alone."""
    return (rows.shape[-1] - 4 * SCALE_WORDS) // dim if rows.dtype in CODES else rows.shape[-2]


def row_size(pool: Tensor) -> tuple[int, ...]:
    """Size of a row of a pool."""
    return tuple(pool.shape[2:] if pool.dtype in CODES and pool.dim() == 3 else pool.shape[1:])


def row_bytes(pool: Tensor) -> int:
    """Bytes of a row of a pool."""
    return math.prod(row_size(pool)) * pool.itemsize


def rows_like(pool: Tensor, count: int, device: torch.device | None = None) -> Tensor:
    """Room for rows of a pool, each by itself: [count, *row]."""
    return pool.new_empty((count, *row_size(pool)), device=pool.device if device is None else device)


def room_for(pool: Tensor, count: int, span: int, device: torch.device) -> Tensor:
    """Another pool for so many rows, in 8 bits in spans of `span` rows: what is read from a pool into it stays wide."""
    if pool.dtype not in CODES:
        return rows_like(pool, count, device)
    return rows_like(pool, -(-count // span) * span, device).view(-1, span, *row_size(pool))


def parts_of(pool: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a pool in 8 bits where they lie, by words of 4 bytes: int32 [spans, S, D / 2] and [spans, S, 1]."""
    span, (row,) = span_of(pool), row_size(pool)
    words = pool.view(torch.int32).view(-1, span * row // 4)
    codes = span * (row // 4 - SCALE_WORDS)
    return words[:, :codes].unflatten(1, (span, -1)), words[:, codes:].unflatten(1, (span, -1))


def read_rows(pool: Tensor, numbers: Tensor, buffer: Tensor | None = None) -> Tensor:
    """Rows of a pool, each by itself: [*numbers, *row] for integers of any shape on the pool's device.

    Args:
        buffer: where they are put, contiguous; new memory, which costs a CPU more than the copy, when None.
    """
    shape = (*numbers.shape, *row_size(pool))
    rows = pool.new_empty(shape) if buffer is None else buffer
    if pool.dtype not in CODES or pool.dim() == 2:
        torch.index_select(pool, 0, numbers.flatten(), out=rows.view(-1, *row_size(pool)))
        return rows
    codes, scales = parts_of(pool)
    at, words = (numbers // pool.shape[1], numbers % pool.shape[1]), rows.view(torch.int32)
    words[..., :-SCALE_WORDS], words[..., -SCALE_WORDS:] = codes[at], scales[at]
    return rows


def write_rows(pool: Tensor, numbers: Tensor, rows: Tensor) -> None:
    """Write rows [N, *row], each by itself, to the rows of a pool in 8 bits with these numbers, int64 [N]."""
    words = rows.view(torch.int32)
    codes, scales = parts_of(pool)
    at = numbers // codes.shape[1], numbers % codes.shape[1]
    codes[at], scales[at] = words[..., :-SCALE_WORDS], words[..., -SCALE_WORDS:]


@dataclass(frozen=True, eq=False)
class CodedPages:
    """Rows in 8 bits of one layer, page by page, where they lie.

    Attributes:
        pool: that has them.
        codes, scales: int32 [pages, size, Hkv, D / 2] and [pages, size, Hkv, 1], of any strides but the last.
    """

    pool: Tensor
    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """[pages, size, Hkv, *row]."""
        return (*self.codes.shape[:3], *row_size(self.pool))

    @property
    def dtype(self) -> torch.dtype:
        return self.pool.dtype

    @property
    def device(self) -> torch.device:
        return self.pool.device

    def read(self, pages: Tensor, buffer: Tensor | None = None) -> Tensor:
        """Rows of some pages, each by itself: [pages, size, Hkv, *row], in a buffer of that shape where there is one."""
        rows = self.pool.new_empty((len(pages), *self.shape[1:])) if buffer is None else buffer
        words = rows.view(torch.int32)
        words[..., :-SCALE_WORDS] = self.codes.index_select(0, pages)
        words[..., -SCALE_WORDS:] = self.scales.index_select(0, pages)
        return rows

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""New keys of the retrieval head into their pages: one program a token."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def append_keys(keys: Tensor, table: Tensor, seats: Tensor, positions: Tensor, new: Tensor) -> None:
    """See `specontext.kernels.key_rows.append_keys`."""
    tokens, groups, head_dim = new.shape
    if not tokens:
        return
    assert keys.stride(3) == 1 and keys.stride(2) == head_dim and table.stride(1) == 1
    numbers = groups * head_dim
    _append[(tokens,)](
        keys,
        table,
        seats.contiguous(),
        positions.contiguous(),
        new.contiguous(),
        keys.stride(0),
        keys.stride(1),
        table.stride(0),
        PAGE=keys.shape[1],
        NUMBERS=numbers,
        BLOCK=triton.next_power_of_2(numbers),
    )


@triton.jit
def _append(
    keys, table, seats, positions, new, page_stride, token_stride, table_stride,
    PAGE: tl.constexpr, NUMBERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token)
    page = tl.load(table + tl.load(seats + token) * table_stride + position // PAGE, mask=position >= 0, other=0)
    column = tl.arange(0, BLOCK)
    inside = column < tl.where(position >= 0, NUMBERS, 0)
    numbers = tl.load(new + token * NUMBERS + column, mask=inside)
    place = keys + page * page_stride + position % PAGE * token_stride + column
    tl.store(place, numbers.to(keys.dtype.element_ty), mask=inside)

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The merge of attention over parts of a context, in place: each number is read and written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS = 16


def merge_part(total: Tensor, total_lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """See `specontext.kernels.gpu_chunk.merge_part`."""
    queries, heads, head_dim = total.shape
    assert total.is_contiguous() and total_lse.is_contiguous() and part_lse.is_contiguous() and part.stride(2) == 1
    assert part.shape == total.shape and part_lse.shape == total_lse.shape == (heads, queries)
    _merge[(triton.cdiv(queries * heads, ROWS),)](
        total,
        total_lse,
        part,
        part_lse,
        queries * heads,
        queries,
        part.stride(0),
        part.stride(1),
        HEADS=heads,
        DIM=head_dim,
        BLOCK=triton.next_power_of_2(head_dim),
        ROWS=ROWS,
    )


@triton.jit(do_not_specialize=["count", "queries"])  # one kernel for chunks of any number of tokens
def _merge(
    total, total_lse, part, part_lse, count, queries, token_stride, head_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < count
    token, head = row // HEADS, row % HEADS
    at = head * queries + token
    before = tl.load(total_lse + at, mask=live, other=0.0)
    new = tl.load(part_lse + at, mask=live, other=0.0)
    top = tl.maximum(before, new)
    kept, added = tl.exp(before - top), tl.exp(new - top)
    weight = (added / (kept + added))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = live[:, None] & (column < DIM)
    here = total + row[:, None] * DIM + column
    old = tl.load(here, mask=mask, other=0.0)
    numbers = tl.load(part + (token * token_stride + head * head_stride)[:, None] + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(here, old + (numbers - old) * weight, mask=mask)
    tl.store(total_lse + at, top + tl.log(kept + added), mask=live)

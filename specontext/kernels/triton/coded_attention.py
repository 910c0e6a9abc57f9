"""Split-K decode attention over rows in 8 bits that an index list, or a page table, names; see `sparse_attention.py`.

A row of 16 bits is waited for as long as memory takes. One in 8 bits has half the bytes, but not half the instructions, which
would then be waited for. So

- products are made in float16, in which codes are numbers as they are (`coded_rows.py`);
- rows are the long side of both products, [rows, D] x [D, heads] and [D, rows] x [rows, heads]: a group of up to 8 query heads
  fills 8 columns. The other way about it would fill 16 rows, at twice the products and the logits, and queries would be laid out
  again for every block;
- a key's scale multiplies its logits. A value's multiplies its weights, in units of the greatest scale so far: so they are
  numbers of float16, whatever the size of values, and lose nothing beside the 8 bits;
- pages are looked up without masks: entries beyond the last stand for it, and have no weight.

Queries and weights of models in float32 are two numbers of float16 each, with the 22 bits of both.

Bytes: 2 * D + 4 a row, and the rest as in `sparse_attention.py`.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from specontext.kernels.spans import span_of
from specontext.kernels.triton.coded_rows import LEAST_UNIT, REACH, as_float16, first_code, fitted, scales_of, span_and_place
from specontext.kernels.triton.online_softmax import LN2, capped
from specontext.kernels.triton.pieces import as_copied

LEAST = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5) else 16  # columns of the narrowest product


@dataclass(frozen=True)
class Tile:
    """How a program is made.

    Attributes:
        rows: read and multiplied at once.
        warps: of a program.
        stages: of its pipeline, which hold the index and two blocks of rows of three where there are five.
    """

    rows: int
    warps: int = 4
    stages: int = 5


@triton.jit
def _greater_of_both(logit, scale, other_logit, other_scale):
    return tl.maximum(logit, other_logit), tl.maximum(scale, other_scale)


@triton.jit
def _greatest_of_both(logits, scales, COMPILED: tl.constexpr):
    """Greatest of each column, [GROUP_PAD]: compiled with one exchange between warps for both, which the interpreter cannot."""
    if COMPILED:
        top, unit = tl.reduce((logits, scales), 0, _greater_of_both)
    else:
        top, unit = tl.max(logits, 0), tl.max(scales, 0)
    return top, unit


@triton.jit(do_not_specialize=["width", "splits"])
def _attend(
    query_ptr,  # [R, Hq, D]
    arena_ptr,  # codes and scales in spans
    words_ptr,  # int32, the same memory
    index_ptr,  # rows [R, Hkv, B], or pages [R, P]
    lengths_ptr,  # [R], pages only
    output_ptr,  # [R, Hq, splits, D]
    lse_ptr,  # [R, Hq, splits], in base 2 unless FINAL
    scale_log2,
    cap_log2,  # a soft cap on logits in base 2, where CAPPED
    width,
    splits,
    kv_heads,
    query_r,
    query_h,
    index_r,
    index_h,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # 0 for rows
    SPAN: tl.constexpr,  # rows whose codes lie together, before their scales
    BY_PAGE: tl.constexpr,  # the rows of a page are those of a span
    TWICE: tl.constexpr,  # queries and weights are two numbers of float16 each
    FINAL: tl.constexpr,  # one split: the result itself
    CAPPED: tl.constexpr,
    COMPILED: tl.constexpr,  # for a GPU, not for the interpreter
):
    head, split, request = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    member = tl.arange(0, GROUP_PAD)
    dim = tl.arange(0, DIM_PAD)
    in_group, in_dim = member < GROUP, dim < DIM
    query_head = head * GROUP + member
    query = tl.load(
        query_ptr + request * query_r + query_head[:, None] * query_h + dim[None, :],
        mask=in_group[:, None] & in_dim[None, :],
        other=0.0,
    ).to(tl.float32)
    query, factor = fitted(query, scale_log2)
    queries = tl.trans(query.to(tl.float16))  # [DIM_PAD, GROUP_PAD]
    length = width
    if PAGE_SIZE:
        length = tl.load(lengths_ptr + request).to(tl.int32)
    index_ptr += request * index_r + head.to(tl.int64) * index_h
    share = tl.cdiv(tl.cdiv(length, splits), BLOCK) * BLOCK
    begin = split * share
    end = tl.minimum(begin + share, length)

    top = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK, GROUP_PAD], tl.float32)  # added up at the end, once
    unit = tl.full([GROUP_PAD], LEAST_UNIT, tl.float32)
    acc = tl.zeros([DIM_PAD, GROUP_PAD], tl.float32)  # in this unit
    for start in range(begin, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        present = entry < end
        known = tl.minimum(entry, end - 1).to(tl.uint32)
        if PAGE_SIZE:
            page = tl.load(index_ptr + known // PAGE_SIZE)
            within = (known % PAGE_SIZE).to(tl.int32) * kv_heads + head
            readable = tl.full([BLOCK], True, tl.int1)
        else:
            row = tl.load(index_ptr + known)
            readable = row >= 0
            present &= readable
        if BY_PAGE:
            span, place = page.to(tl.int32), within
        elif PAGE_SIZE:
            span, place = span_and_place(page.to(tl.int64) * (PAGE_SIZE * kv_heads) + within, SPAN)
        else:
            span, place = span_and_place(row, SPAN)
        codes = arena_ptr + first_code(span, place, DIM, SPAN)[:, None] + dim[None, :]
        read = tl.broadcast_to(readable[:, None], [BLOCK, DIM_PAD])
        if DIM < DIM_PAD:
            read &= in_dim[None, :]
        keys = as_float16(tl.load(codes, mask=read, other=0.0), False, COMPILED)
        values = as_float16(tl.load(codes + DIM, mask=read, other=0.0), True, COMPILED)
        key_scale, value_scale = scales_of(words_ptr, span, place, readable, DIM, SPAN)

        logits = tl.dot(keys, queries)  # [BLOCK, GROUP_PAD]
        if TWICE:
            rest = tl.trans((query - query.to(tl.float16).to(tl.float32)).to(tl.float16))
            logits += tl.dot(keys, rest)
        logits *= factor[None, :] * key_scale[:, None]
        if CAPPED:
            logits = capped(logits, cap_log2)
        logits = tl.where(present[:, None], logits, float("-inf"))
        scales = tl.broadcast_to(value_scale[:, None], [BLOCK, GROUP_PAD])
        new_top, new_unit = _greatest_of_both(logits, scales, COMPILED)
        new_top = tl.maximum(top, new_top)
        new_unit = tl.maximum(unit, new_unit / REACH)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing was present yet: no -inf - -inf
        weights = tl.exp2(logits - base[None, :])
        keep = tl.exp2(top - base)
        total = total * keep[None, :] + weights
        weights *= scales * (1.0 / new_unit)[None, :]
        rounded = weights.to(tl.float16)
        acc = acc * (keep * (unit / new_unit))[None, :] + tl.dot(tl.trans(values), rounded)
        if TWICE:
            acc += tl.dot(tl.trans(values), (weights - rounded.to(tl.float32)).to(tl.float16))
        top, unit = new_top, new_unit

    total_of_all = tl.sum(total, 0)
    empty = total_of_all == 0.0
    total_of_all = tl.where(empty, 1.0, total_of_all)
    lse = tl.where(empty, float("-inf"), top + tl.log2(total_of_all))
    if FINAL:
        lse *= LN2
    where = (request * kv_heads * GROUP + query_head) * splits + split
    tl.store(lse_ptr + where, lse, mask=in_group)
    result = tl.trans((acc * (unit / total_of_all)[None, :]).to(output_ptr.dtype.element_ty))
    tl.store(output_ptr + where[:, None] * DIM + dim[None, :], result, mask=in_group[:, None] & in_dim[None, :])


def attend(
    query: Tensor,
    arena: Tensor,
    index: Tensor,
    index_strides: tuple[int, int],
    lengths: Tensor | None,
    output: Tensor,
    lse: Tensor,
    width: int,
    kv_heads: int,
    scale: float,
    cap: float | None,
    *,
    page_size: int,
    splits: int,
    tile: Tile | None = None,
) -> None:
    """One result a split, of rows in 8 bits; arguments as those of `sparse_attention.launch`.

    Args:
        output: [R, Hq, splits, D], float32 where there are several.
        lse: float32 [R, Hq, splits].
        tile: `tile_of` the model when None.
    """
    requests, query_heads, head_dim = query.shape
    group, span = query_heads // kv_heads, span_of(arena)
    assert arena.shape[:-1].numel() < 2**31, "row numbers are computed in 32 bits"
    tile = tile or tile_of(head_dim, width, splits)
    _attend[(kv_heads, splits, requests)](
        query,
        arena,
        as_copied(arena),
        index,
        index if lengths is None else lengths,
        output,
        lse,
        scale / LN2.value,
        0.0 if cap is None else cap / LN2.value,
        width,
        splits,
        kv_heads,
        query.stride(0),
        query.stride(1),
        *index_strides,
        GROUP=group,
        GROUP_PAD=max(LEAST, triton.next_power_of_2(group)),
        DIM=head_dim,
        DIM_PAD=max(16, triton.next_power_of_2(head_dim)),
        BLOCK=tile.rows,
        PAGE_SIZE=page_size,
        SPAN=span,
        BY_PAGE=bool(page_size) and span == page_size * kv_heads,
        TWICE=query.dtype == torch.float32,
        FINAL=splits == 1,
        CAPPED=cap is not None,
        COMPILED=query.is_cuda,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def tile_of(head_dim: int, width: int, splits: int) -> Tile:
    """The tile for heads so wide, and splits of `width` entries."""
    rows = max(16, min(64, 8192 // triton.next_power_of_2(head_dim)))
    return Tile(min(rows, 32) if width <= 32 * splits else rows)

"""Attention of many query heads to one KV head whose rows are key and value at once: multi-head latent attention, absorbed.

A program takes one split of the entries of one request and a tile of the query heads, so a row is read once for both products of
as many heads; the tiles of a request read the same rows at about the same time, out of the device's cache. Rows are wide (576
numbers in DeepSeek's models) and their width is no power of two: a tile of them is two, the largest power of two below the width
and what is left.

Rows in 8 bits are dequantised as they are read: their scale multiplies logits, and weights before the second product.

Bytes: D * itemsize a row, or D + 4 in 8 bits, and tile of heads, of which all but the first come from the cache; the index as
everywhere.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specontext.kernels.spans import span_of
from specontext.kernels.triton.coded_rows import LEAST_UNIT, REACH, as_float16, stretch_of
from specontext.kernels.triton.online_softmax import LN2, capped
from specontext.kernels.triton.pieces import as_copied, first_of, scales_at

MOST_HEADS = 32  # of a tile: their sums stay in registers
FLOAT16 = tl.constexpr(tl.float16)
LEAST = 16  # what tensor cores want of every side


@triton.jit
def _split(first, HEADS: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    """Heads of a tile, columns of both parts of a row, and which of them there are."""
    head = first * TILE + tl.arange(0, TILE)
    column = tl.arange(0, MAIN)
    behind = MAIN + tl.arange(0, REST)
    return head, head < HEADS, column, column < DIM, behind, behind < DIM


@triton.jit
def _first(row, DIM: tl.constexpr, SPAN: tl.constexpr):
    """Where a row begins: its numbers, or where SPAN is not 0 its codes."""
    return 4 * first_of(row, DIM // 4, SPAN) if SPAN else row * DIM


@triton.jit
def _scale_of(words, row, present, DIM: tl.constexpr, SPAN: tl.constexpr):
    """The scale of rows in 8 bits, float32: each half of a word."""
    both = tl.load(words + scales_at(row, DIM // 4, SPAN), mask=present, other=0)
    return (both << 16).to(tl.float32, bitcast=True)


@triton.jit
def _factors(query, rest, scale, FORMAT: tl.constexpr, SPAN: tl.constexpr):
    """Both parts of queries as factors of products, and factors [TILE] of their logits."""
    if SPAN and FORMAT == FLOAT16:
        query, rest = query.to(tl.float32), rest.to(tl.float32)
        stretch, factor = stretch_of(tl.maximum(tl.max(tl.abs(query), 1), tl.max(tl.abs(rest), 1)), scale)
        query, rest = query * stretch[:, None], rest * stretch[:, None]
    else:
        factor = tl.full([query.shape[0]], 1.0, tl.float32) * scale
    return query.to(FORMAT), rest.to(FORMAT), factor


@triton.jit(do_not_specialize=["width", "splits"])
def _attend(
    query_ptr,  # [R, Hq, D]
    arena_ptr,  # [N, 1, D], or codes and scales in spans
    words_ptr,  # int32, the same memory where rows are codes
    index_ptr,  # rows [R, 1, B], or pages [R, P]
    lengths_ptr,  # [R], pages only
    output_ptr,  # [R, Hq, splits, D]
    lse_ptr,  # [R, Hq, splits], in base 2 unless FINAL
    scale_log2,
    cap_log2,  # a soft cap on logits in base 2, where CAPPED
    width,
    splits,
    query_r,
    query_h,
    index_r,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # 0 for rows
    FORMAT: tl.constexpr,  # of the factors of the products; sums are float32
    SPAN: tl.constexpr,  # rows whose codes lie together, before their scales; 0 for numbers
    COMPILED: tl.constexpr,  # for a GPU, not for the interpreter
    FINAL: tl.constexpr,  # one split: the result itself
    CAPPED: tl.constexpr,
):
    split, request = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head, live, column, in_main, behind, in_rest = _split(tl.program_id(0), HEADS, TILE, DIM, MAIN, REST)
    place = query_ptr + request * query_r + head[:, None] * query_h
    query = tl.load(place + column[None, :], mask=live[:, None] & in_main[None, :], other=0.0)
    query_rest = tl.load(place + behind[None, :], mask=live[:, None] & in_rest[None, :], other=0.0)
    query, query_rest, factor = _factors(query, query_rest, scale_log2, FORMAT, SPAN)
    length = width
    if PAGE_SIZE:
        length = tl.load(lengths_ptr + request).to(tl.int32)
    index_ptr += request * index_r
    share = tl.cdiv(tl.cdiv(length, splits), BLOCK) * BLOCK
    begin = split * share
    end = tl.minimum(begin + share, length)

    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, MAIN], tl.float32)
    acc_rest = tl.zeros([TILE, REST], tl.float32)
    unit = tl.full([TILE], LEAST_UNIT if SPAN and FORMAT == FLOAT16 else 1.0, tl.float32)  # of both
    for start in range(begin, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        present = entry < end
        if PAGE_SIZE:
            page = tl.load(index_ptr + entry // PAGE_SIZE, mask=present, other=0).to(tl.int64)
            row = page * PAGE_SIZE + entry % PAGE_SIZE
        else:
            row = tl.load(index_ptr + entry, mask=present, other=-1).to(tl.int64)
            present = row >= 0
        here = arena_ptr + _first(row, DIM, SPAN)[:, None]
        main = tl.load(here + column[None, :], mask=present[:, None] & in_main[None, :], other=0.0)
        rest = tl.load(here + behind[None, :], mask=present[:, None] & in_rest[None, :], other=0.0)
        if SPAN and FORMAT == FLOAT16:
            main, rest = as_float16(main, False, COMPILED), as_float16(rest, False, COMPILED)
        main, rest = main.to(FORMAT), rest.to(FORMAT)
        logits = tl.dot(query, tl.trans(main), input_precision="ieee")  # [TILE, BLOCK]
        logits += tl.dot(query_rest, tl.trans(rest), input_precision="ieee")
        logits *= factor[:, None]
        if SPAN:
            of_row = _scale_of(words_ptr, row, present, DIM, SPAN)
            logits *= of_row[None, :]
        if CAPPED:
            logits = capped(logits, cap_log2)
        logits = tl.where(present[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing was present yet: no -inf - -inf
        weights = tl.exp2(logits - base[:, None])
        keep = tl.exp2(top - base)
        total = total * keep + tl.sum(weights, 1)
        if SPAN and FORMAT == FLOAT16:  # in units of the greatest scale so far, as in `coded_attention.py`
            new_unit = tl.maximum(unit, tl.max(of_row, 0) / REACH)
            weights *= of_row[None, :] * (1.0 / new_unit)[:, None]
            keep *= unit / new_unit
            unit = new_unit
        elif SPAN:
            weights *= of_row[None, :]
        acc = acc * keep[:, None] + tl.dot(weights.to(FORMAT), main, input_precision="ieee")
        acc_rest = acc_rest * keep[:, None] + tl.dot(weights.to(FORMAT), rest, input_precision="ieee")
        top = new_top

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), top + tl.log2(total))
    if FINAL:
        lse *= LN2
    place = (request * HEADS + head) * splits + split
    tl.store(lse_ptr + place, lse, mask=live)
    place = output_ptr + place[:, None] * DIM
    kind = output_ptr.dtype.element_ty
    tl.store(place + column[None, :], (acc * (unit / total)[:, None]).to(kind), mask=live[:, None] & in_main[None, :])
    tl.store(place + behind[None, :], (acc_rest * (unit / total)[:, None]).to(kind), mask=live[:, None] & in_rest[None, :])


@triton.jit(do_not_specialize=["width", "rows_r"])
def _logits(
    query_ptr,  # [R, Hq, D]
    arena_ptr,  # [N, 1, D], or codes and scales in spans
    words_ptr,  # int32, the same memory where rows are codes
    rows_ptr,  # [R, 1, T]
    logits_ptr,  # [R, Hq, T]
    scale,
    width,
    query_r,
    query_h,
    rows_r,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    FORMAT: tl.constexpr,
    SPAN: tl.constexpr,
    COMPILED: tl.constexpr,
):
    block, request = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head, live, column, in_main, behind, in_rest = _split(tl.program_id(0), HEADS, TILE, DIM, MAIN, REST)
    place = query_ptr + request * query_r + head[:, None] * query_h
    query = tl.load(place + column[None, :], mask=live[:, None] & in_main[None, :], other=0.0)
    query_rest = tl.load(place + behind[None, :], mask=live[:, None] & in_rest[None, :], other=0.0)
    query, query_rest, factor = _factors(query, query_rest, scale, FORMAT, SPAN)
    entry = block * BLOCK + tl.arange(0, BLOCK)
    inside = entry < width
    row = tl.load(rows_ptr + request * rows_r + entry, mask=inside, other=-1).to(tl.int64)
    present = row >= 0
    place = arena_ptr + _first(row, DIM, SPAN)[:, None]
    main = tl.load(place + column[None, :], mask=present[:, None] & in_main[None, :], other=0.0)
    rest = tl.load(place + behind[None, :], mask=present[:, None] & in_rest[None, :], other=0.0)
    if SPAN and FORMAT == FLOAT16:
        main, rest = as_float16(main, False, COMPILED), as_float16(rest, False, COMPILED)
    main, rest = main.to(FORMAT), rest.to(FORMAT)
    logits = tl.dot(query, tl.trans(main), input_precision="ieee")
    logits += tl.dot(query_rest, tl.trans(rest), input_precision="ieee")
    if SPAN:
        logits *= _scale_of(words_ptr, row, present, DIM, SPAN)[None, :]
    logits = tl.where(present[None, :], logits * factor[:, None], float("-inf"))
    place = logits_ptr + (request * HEADS + head)[:, None] * width + entry[None, :]
    tl.store(place, logits, mask=live[:, None] & inside[None, :])


def tiles(query: Tensor) -> int:
    """Tiles of the heads of queries [R, Hq, D], each of which is a program."""
    heads = query.shape[1]
    return triton.cdiv(heads, _tile(heads))


def _tile(heads: int) -> int:
    return min(MOST_HEADS, max(LEAST, triton.next_power_of_2(heads)))


def attend(
    query: Tensor,
    arena: Tensor,
    index: Tensor,
    index_r: int,
    lengths: Tensor | None,
    partial: Tensor,
    partial_lse: Tensor,
    width: int,
    scale: float,
    cap: float | None,
    *,
    page_size: int,
    splits: int,
) -> None:
    """The first of the two kernels of `sparse_attention.launch`, for rows that are key and value at once; of one KV head."""
    requests, heads, _ = query.shape
    sizes, warps = tile_sizes(query, arena)
    _attend[(triton.cdiv(heads, sizes["TILE"]), splits, requests)](
        query,
        arena,
        as_copied(arena),
        index,
        index if lengths is None else lengths,
        partial,
        partial_lse,
        scale / LN2.value,
        0.0 if cap is None else cap / LN2.value,
        width,
        splits,
        query.stride(0),
        query.stride(1),
        index_r,
        PAGE_SIZE=page_size,
        FINAL=splits == 1,
        CAPPED=cap is not None,
        num_warps=warps,
        num_stages=2,
        **sizes,
    )


def attention_logits(query: Tensor, arena: Tensor, rows: Tensor, scale: float, logits: Tensor) -> None:
    """Write the logits float32 [R, Hq, T] of rows [R, 1, T]; see `kernels.attention_logits`."""
    requests, heads, width = logits.shape
    sizes, warps = tile_sizes(query, arena)
    _logits[(triton.cdiv(heads, sizes["TILE"]), triton.cdiv(width, sizes["BLOCK"]), requests)](
        query,
        arena,
        as_copied(arena),
        rows,
        logits,
        scale,
        width,
        query.stride(0),
        query.stride(1),
        rows.stride(0),
        num_warps=warps,
        **sizes,
    )


def tile_sizes(query: Tensor, arena: Tensor, *, on_gpu: bool | None = None) -> tuple[dict[str, Any], int]:
    """Compile-time sizes that fit a model, and warps of a program.

    Args:
        on_gpu: whether kernels are compiled; by default where the queries are on a GPU.
    """
    heads, dim = query.shape[1:]
    exact = (query.dtype != arena.dtype and not span_of(arena)) or query.dtype == torch.float32
    coded, on_gpu = span_of(arena) > 0, query.is_cuda if on_gpu is None else on_gpu
    kind = tl.float32 if exact else tl.float16 if coded or query.dtype == torch.float16 else tl.bfloat16
    if kind == tl.bfloat16 and not on_gpu:  # the interpreter multiplies bfloat16 as if it were integers
        kind = tl.float32
    main = max(LEAST, triton.next_power_of_2(dim) // 2)
    tile = _tile(heads)
    sizes = {
        "HEADS": heads,
        "TILE": tile,
        "DIM": dim,
        "MAIN": main,
        "REST": max(LEAST, triton.next_power_of_2(max(1, dim - main))),
        "BLOCK": LEAST if exact else 32,
        "FORMAT": kind,
        "SPAN": span_of(arena),
        "COMPILED": on_gpu,
    }
    return sizes, 4 if tile == LEAST else 8

"""Logits of one query a head over KV rows that an index list names.

A program takes one block of the rows of one (request, KV head) and all query heads of its group. Bytes: D * itemsize a row,
its index once, and 4 written for every query head and row.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specontext.kernels.spans import span_of, vectors_in
from specontext.kernels.triton import latent_attention
from specontext.kernels.triton.coded_rows import as_float16, first_code, fitted, scales_of, span_and_place
from specontext.kernels.triton.pieces import as_copied
from specontext.kernels.triton.sparse_attention import tile_shape

FLOAT16 = tl.constexpr(tl.float16)


@triton.jit(do_not_specialize=["width", "rows_r", "rows_h"])
def _logits(
    query_ptr,  # [R, Hq, D]
    arena_ptr,  # [N, 2, D], or codes and scales in spans
    words_ptr,  # int32, the same memory where rows are codes
    rows_ptr,  # [R, Hkv, T]
    logits_ptr,  # [R, Hq, T]
    scale,
    width,
    kv_heads,
    query_r,
    query_h,
    rows_r,
    rows_h,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    FORMAT: tl.constexpr,
    DOT: tl.constexpr,
    SPAN: tl.constexpr,  # rows whose codes lie together, before their scales; 0 for numbers
    COMPILED: tl.constexpr,  # for a GPU, not for the interpreter
):
    block, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    member = tl.arange(0, GROUP_PAD)
    dim = tl.arange(0, DIM_PAD)
    in_group, in_dim = member < GROUP, dim < DIM
    query_head = head * GROUP + member
    query = tl.load(
        query_ptr + request * query_r + query_head[:, None] * query_h + dim[None, :],
        mask=in_group[:, None] & in_dim[None, :],
        other=0.0,
    )
    if SPAN and FORMAT == FLOAT16:
        query, factor = fitted(query.to(tl.float32), scale)
    query = query.to(FORMAT)
    entry = block * BLOCK + tl.arange(0, BLOCK)
    inside = entry < width
    row = tl.load(rows_ptr + request * rows_r + head.to(tl.int64) * rows_h + entry, mask=inside, other=-1)
    present = row >= 0
    first = row.to(tl.int64) * (2 * DIM)
    if SPAN:
        span, place = span_and_place(row, SPAN)
        first = first_code(span, place, DIM, SPAN)
    numbers = arena_ptr + first[:, None] + dim[None, :]
    key = tl.load(numbers, mask=present[:, None] & in_dim[None, :], other=0.0)  # [BLOCK, DIM_PAD]
    if SPAN and FORMAT == FLOAT16:
        key = as_float16(key, False, COMPILED)
    key = key.to(FORMAT)
    if SPAN:
        key_scale, _ = scales_of(words_ptr, span, place, present, DIM, SPAN)
    if DOT:
        logits = tl.dot(query, tl.trans(key), input_precision="ieee")
    else:
        logits = tl.sum(query[:, None, :].to(tl.float32) * key[None, :, :].to(tl.float32), 2)
    if SPAN and FORMAT == FLOAT16:
        logits *= factor[:, None] * key_scale[None, :]
    elif SPAN:
        logits *= key_scale[None, :] * scale
    else:
        logits *= scale
    logits = tl.where(present[None, :], logits, float("-inf"))
    place = (request * kv_heads * GROUP + query_head)[:, None] * width + entry[None, :]
    tl.store(logits_ptr + place, logits, mask=in_group[:, None] & inside[None, :])


def attention_logits(query: Tensor, arena: Tensor, rows: Tensor, scale: float) -> Tensor:
    """See `kernels.attention_logits`."""
    requests, query_heads, _ = query.shape
    kv_heads, width = rows.shape[1:]
    assert arena.is_contiguous(), "rows must lie one after another"
    query = query if query.stride(-1) == 1 else query.contiguous()
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    logits = torch.empty((requests, query_heads, width), dtype=torch.float32, device=query.device)
    if vectors_in(arena, query.shape[2]) == 1:
        latent_attention.attention_logits(query, arena, rows, scale, logits)
        return logits
    shape = tile_shape(query, arena, query_heads // kv_heads)
    _logits[(triton.cdiv(width, shape["BLOCK"]), kv_heads, requests)](
        query,
        arena,
        as_copied(arena),
        rows,
        logits,
        scale,
        width,
        kv_heads,
        query.stride(0),
        query.stride(1),
        rows.stride(0),
        rows.stride(1),
        SPAN=span_of(arena),
        COMPILED=query.is_cuda,
        num_warps=4,
        **shape,
    )
    return logits

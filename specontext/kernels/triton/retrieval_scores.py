"""Triton kernels of `paged_retrieval_scores`: two launches, and every key is read from memory once.

1. One program per (key head, chunk of positions, request) writes the logits of the query heads that read this key, and, for each
   of them, the log-sum-exp of its chunk. Programs of neighbouring key heads run side by side, so the keys of a token are read
   together. `_chunk_logits` holds the queries of a narrow key (D up to 256, up to 32 query heads) in registers while keys stream
   by; `_wide_logits` multiplies tile by tile, piece by piece of D, and reads its queries again for each tile, from the L2 cache.
2. One program per (group, tile of positions, request) merges the log-sum-exps of the chunks, a few KB, and writes
   2 ** max over heads (logit - log-sum-exp).

Logits are in base 2 (scaled by log2 e). For bfloat16 keys and D = 128, keys are 256 bytes a position and key head and are read
from memory; logits are 4 bytes a query head, written and read, and mostly stay in the L2 cache; scores are 4 bytes a group.

Chunks are aligned to positions and merged in order, so a request's scores depend neither on the other requests nor on the span.
Candidates that are chosen in any case have infinite logits and no part in the log-sum-exps; without a call for them nothing of it
is compiled.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 512  # positions of one program of the first launch
TILE_BYTES = 32768  # of keys that one step of its loop loads; three such stages are in flight
WIDE_CHUNK = 128  # positions of one program of the first launch where keys are wide
WIDE_PIECE = 128  # bytes of a key, and of a query, that one step of its loop loads
MOST_HEADS = 128  # query heads of one such program
PARTS = 128  # chunks that are merged at a time
LEAST = tl.constexpr(-3.0e38)
TINY = tl.constexpr(1.0e-37)


@triton.jit
def _set_apart(x, rank_row, key_head, seen, reserved, RANKED: tl.constexpr):
    """Logits [positions, heads] to be stored and to compete: infinite and none of candidates that are chosen in any case."""
    stored = x
    x = tl.where(seen[:, None], x, float("-inf"))
    if RANKED:
        rank = tl.load(rank_row + key_head, mask=seen, other=0)
        closed = (rank > 0) & (rank <= reserved)
        stored = tl.where(closed[:, None], float("inf"), stored)
        x = tl.where(closed[:, None], float("-inf"), x)
    return stored, x


@triton.jit(do_not_specialize=["start", "span", "chunks"])
def _chunk_logits(
    query,
    keys,
    table,
    stops,
    logits,
    lse,
    start,
    span,
    width,
    chunks,
    key_heads,
    scale,
    key_stride_page,
    key_stride_token,
    key_stride_head,
    table_stride,
    ranks,
    reserved,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDEN: tl.constexpr,
    RANKED: tl.constexpr,
):
    key_head, chunk = tl.program_id(0), tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    stop = tl.minimum(tl.load(stops + request), span).to(tl.int32)
    head = tl.arange(0, HEADS_PADDED)
    dim = tl.arange(0, DIM_PADDED)
    first_head = (request * key_heads + key_head) * HEADS

    # Queries are the narrow operand [D, heads], so that positions fill the tall side of the tensor cores.
    present = (head[None, :] < HEADS) & (dim[:, None] < DIM)
    q = tl.load(query + (first_head + head[None, :]) * DIM + dim[:, None], mask=present, other=0.0)
    if WIDEN:
        q = q.to(tl.float32)

    # Running maxima and sums place by place of a block: nothing is reduced over threads before the end.
    top = tl.full([BLOCK, HEADS_PADDED], LEAST, tl.float32)
    total = tl.zeros([BLOCK, HEADS_PADDED], tl.float32)
    low = tl.maximum(chunk * CHUNK, start // BLOCK * BLOCK)
    high = tl.minimum(chunk * CHUNK + CHUNK, stop)
    high = tl.where(start < stop, high, low)
    for first in range(low, high, BLOCK):
        position = first + tl.arange(0, BLOCK)
        seen = (position >= start) & (position < stop)
        page = tl.load(table + request * table_stride + position // PAGE, mask=seen, other=0).to(tl.int64)
        row = page * key_stride_page + (position % PAGE) * key_stride_token
        address = keys + row[:, None] + key_head * key_stride_head + dim[None, :]
        k = tl.load(address, mask=seen[:, None] & (dim[None, :] < DIM), other=0.0, eviction_policy="evict_first")
        if WIDEN:
            k = k.to(tl.float32)
        x = tl.dot(k, q, input_precision="ieee") * scale
        stored, x = _set_apart(x, ranks + (page * PAGE + position % PAGE) * key_heads, key_head, seen, reserved, RANKED)
        out = logits + (first_head + head[None, :]) * width + position[:, None]
        tl.store(out, stored, mask=seen[:, None] & (head[None, :] < HEADS))
        before = top
        top = tl.maximum(top, x)
        total = total * tl.exp2(before - top) + tl.exp2(x - top)
    # A chunk without candidates is left at LEAST and weighs nothing.
    best = tl.max(top, 0)
    whole = tl.sum(total * tl.exp2(top - best[None, :]), 0)
    tl.store(lse + (first_head + head) * chunks + chunk, best + tl.log2(tl.maximum(whole, TINY)), mask=head < HEADS)


@triton.jit(do_not_specialize=["start", "span", "chunks"])
def _wide_logits(
    query,
    keys,
    table,
    stops,
    logits,
    lse,
    start,
    span,
    width,
    chunks,
    key_heads,
    scale,
    key_stride_page,
    key_stride_token,
    key_stride_head,
    table_stride,
    ranks,
    reserved,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PIECE: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDEN: tl.constexpr,
    RANKED: tl.constexpr,
):
    tiles: tl.constexpr = (HEADS + HEADS_TILE - 1) // HEADS_TILE
    key_head, chunk = tl.program_id(0) // tiles, tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    stop = tl.minimum(tl.load(stops + request), span).to(tl.int32)
    head = tl.program_id(0) % tiles * HEADS_TILE + tl.arange(0, HEADS_TILE)
    first_head = (request * key_heads + key_head) * HEADS
    position = chunk * CHUNK + tl.arange(0, CHUNK)
    seen = (position >= start) & (position < stop)
    page = tl.load(table + request * table_stride + position // PAGE, mask=seen, other=0).to(tl.int64)
    row = page * key_stride_page + (position % PAGE) * key_stride_token
    key = keys + row[:, None] + key_head * key_stride_head
    mine = query + (first_head + head[None, :]) * DIM
    present = head < HEADS

    x = tl.zeros([CHUNK, HEADS_TILE], tl.float32)
    some = (chunk * CHUNK < stop) & (chunk * CHUNK + CHUNK > start)
    for first in range(0, tl.where(some, DIM, 0), DIM_PIECE):
        dim = first + tl.arange(0, DIM_PIECE)
        inside = dim < DIM
        k = tl.load(key + dim[None, :], mask=seen[:, None] & inside[None, :], other=0.0)
        q = tl.load(mine + dim[:, None], mask=present[None, :] & inside[:, None], other=0.0)
        if WIDEN:
            k, q = k.to(tl.float32), q.to(tl.float32)
        x = tl.dot(k, q, x, input_precision="ieee")
    stored, x = _set_apart(x * scale, ranks + (page * PAGE + position % PAGE) * key_heads, key_head, seen, reserved, RANKED)
    out = logits + (first_head + head[None, :]) * width + position[:, None]
    tl.store(out, stored, mask=seen[:, None] & present[None, :])
    # A chunk without candidates is left at LEAST and weighs nothing.
    best = tl.maximum(tl.max(x, 0), LEAST)
    whole = tl.sum(tl.exp2(x - best[None, :]), 0)
    tl.store(lse + (first_head + head) * chunks + chunk, best + tl.log2(tl.maximum(whole, TINY)), mask=present)


@triton.jit(do_not_specialize=["start", "chunks", "steps"])
def _group_weights(
    logits,
    lse,
    stops,
    scores,
    start,
    span,
    width,
    chunks,
    groups,
    steps,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
):
    group, tile = tl.program_id(0), tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    stop = tl.minimum(tl.load(stops + request), span).to(tl.int32)
    head = tl.arange(0, HEADS_PADDED)
    row = request * groups + group
    first_head = row * HEADS
    low = tile * steps * BLOCK
    high = tl.minimum(low + steps * BLOCK, span)

    # Chunks beyond the last candidate are not read: a longer span changes nothing.
    used = tl.cdiv(stop, CHUNK)
    used = tl.where((low < stop) & (high > start), used, 0)
    part = tl.arange(0, PARTS)
    tops = tl.full([HEADS_PADDED, PARTS], LEAST, tl.float32)
    for first in range(0, used, PARTS):
        mask = (head[:, None] < HEADS) & (first + part[None, :] < used)
        x = tl.load(lse + (first_head + head[:, None]) * chunks + first + part[None, :], mask=mask, other=float("-inf"))
        tops = tl.maximum(tops, x)
    top = tl.max(tops, 1)
    totals = tl.zeros([HEADS_PADDED, PARTS], tl.float32)
    for first in range(0, used, PARTS):
        mask = (head[:, None] < HEADS) & (first + part[None, :] < used)
        x = tl.load(lse + (first_head + head[:, None]) * chunks + first + part[None, :], mask=mask, other=float("-inf"))
        totals += tl.exp2(x - top[:, None])
    whole = tl.where(head < HEADS, top + tl.log2(tl.maximum(tl.sum(totals, 1), TINY)), float("inf"))

    for first in range(low, high, BLOCK):
        position = first + tl.arange(0, BLOCK)
        out = scores + row * span + position
        if (first < stop) & (first + BLOCK > start):
            # Whole aligned vectors: what was never written beside the candidates is read and dropped.
            mask = (position[None, :] < width) & (head[:, None] < HEADS)
            x = tl.load(logits + (first_head + head[:, None]) * width + position[None, :], mask=mask, other=float("-inf"))
            best = tl.max(x - whole[:, None], 0)
            seen = (position >= start) & (position < stop)
            weight = tl.where(seen, tl.exp2(tl.where(seen, best, 0.0)), -1.0)
            tl.store(out, weight, mask=position < span)
        else:
            tl.store(out, tl.full([BLOCK], -1.0, tl.float32), mask=position < span)


def paged_retrieval_scores(
    query: Tensor,
    keys: Tensor,
    table: Tensor,
    start: int,
    stops: Tensor,
    span: int,
    groups: int | None = None,
    scale: float | None = None,
    ranks: Tensor | None = None,
    reserved: int = 0,
) -> Tensor:
    """See `specontext.kernels.retrieval_scores.paged_retrieval_scores`."""
    assert span <= table.shape[1] * keys.shape[1], "the page table ends before the span"
    requests, query_heads, dim = query.shape
    key_heads = keys.shape[2]
    groups = groups or key_heads
    readers = query_heads // key_heads
    query = query.contiguous()
    keys = keys if keys.stride(3) == 1 else keys.contiguous()
    stops = stops.contiguous()
    if table.stride(1) != 1:
        table = table.contiguous()
    # Float32 operands where the two formats differ, and in the interpreter, which has no bfloat16 products.
    widen = query.dtype != keys.dtype or not keys.is_cuda
    dim_padded, readers_padded = (max(16, triton.next_power_of_2(size)) for size in (dim, readers))
    narrow = dim_padded <= 256 and readers_padded <= 32
    chunk = CHUNK if narrow else WIDE_CHUNK
    width = -(-span // 16) * 16  # aligned rows
    chunks = triton.cdiv(span, chunk)
    logits = torch.empty((requests, query_heads, width), dtype=torch.float32, device=query.device)
    lse = torch.empty((requests, query_heads, chunks), dtype=torch.float32, device=query.device)
    scores = torch.empty((requests, groups, span), dtype=torch.float32, device=query.device)
    if scores.numel() == 0:
        return scores
    arguments = (
        *(query, keys, table, stops, logits, lse),
        *(start, span, width, chunks, key_heads, (dim**-0.5 if scale is None else scale) * math.log2(math.e)),
        *keys.stride()[:3],
        table.stride(0),
        stops if ranks is None else ranks.contiguous(),
        reserved,
    )
    sizes = {"PAGE": keys.shape[1], "HEADS": readers, "DIM": dim, "CHUNK": chunk, "WIDEN": widen, "RANKED": ranks is not None}
    if narrow:
        _chunk_logits[(key_heads, chunks, requests)](
            *arguments,
            **sizes,
            HEADS_PADDED=readers_padded,
            DIM_PADDED=dim_padded,
            BLOCK=min(128, max(16, TILE_BYTES // (dim_padded * keys.element_size()))),
            num_warps=4,
            num_stages=3,
        )
    else:
        tile = min(MOST_HEADS, readers_padded)
        _wide_logits[(key_heads * triton.cdiv(readers, tile), chunks, requests)](
            *arguments,
            **sizes,
            HEADS_TILE=tile,
            DIM_PIECE=max(16, min(dim_padded, WIDE_PIECE // keys.element_size())),
            num_warps=8 if tile > 32 else 4,
            num_stages=3,
        )
    heads = query_heads // groups
    heads_padded = triton.next_power_of_2(heads)
    block = max(64, min(1024, 4096 // heads_padded))
    steps = max(1, min(8, triton.next_power_of_2(span >> 16)))  # long rows: larger tiles, so that lse is read less often
    _group_weights[(groups, triton.cdiv(span, block * steps), requests)](
        logits,
        lse,
        stops,
        scores,
        start,
        span,
        width,
        chunks,
        groups,
        steps,
        HEADS=heads,
        HEADS_PADDED=heads_padded,
        BLOCK=block,
        CHUNK=chunk,
        PARTS=PARTS,
        num_warps=4,
    )
    return scores

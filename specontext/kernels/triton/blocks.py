"""Triton kernels of `specontext.kernels.blocks`, one launch each."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PLACES = 1024  # tokens that a program of `tokens_of_blocks` writes


def tokens_of_blocks(blocks: Tensor, weights: Tensor, size: int, first: int, ends: Tensor, room: int) -> Tensor:
    """See `specontext.kernels.blocks.tokens_of_blocks`. Every program looks at all blocks of its row, a few KB."""
    requests, groups, many = blocks.shape
    tokens = torch.empty((requests, groups, room), dtype=torch.int64, device=blocks.device)
    if tokens.numel():
        _tokens[(requests * groups, triton.cdiv(room, PLACES))](
            blocks.contiguous(),
            weights,
            *weights.stride(),
            ends.contiguous(),
            tokens,
            groups,
            many,
            first,
            room,
            SIZE=size,
            MANY=triton.next_power_of_2(many),
            PLACES=PLACES,
        )
    return tokens


def follow_bounds(bounds: Tensor, key: Tensor, positions: Tensor, seats: Tensor, size: int, first: int) -> None:
    """See `specontext.kernels.blocks.follow_bounds`."""
    nowhere, heads, dim = len(bounds) - 1, key.shape[1], key.shape[2]
    if key.numel():
        _widen[(len(key), heads)](
            *(bounds, *bounds.stride()[:4]),
            *(key, *key.stride()[:2]),
            *(positions.contiguous(), seats.contiguous(), nowhere, first),
            SIZE=size,
            DIM=dim,
            DIM_PADDED=triton.next_power_of_2(dim),
            num_warps=1,
        )


def follow_means(means: Tensor, sums: Tensor, key: Tensor, positions: Tensor, seats: Tensor, size: int, first: int) -> None:
    """See `specontext.kernels.blocks.follow_means`."""
    nowhere, heads, dim = len(means) - 1, key.shape[1], key.shape[2]
    if key.numel():
        _add[(len(key), heads)](
            *(means, *means.stride()[:3]),
            *(sums, *sums.stride()[:2]),
            *(key, *key.stride()[:2]),
            *(positions.contiguous(), seats.contiguous(), nowhere, first),
            SIZE=size,
            DIM=dim,
            DIM_PADDED=triton.next_power_of_2(dim),
            num_warps=1,
        )


@triton.jit
def _tokens(
    blocks,
    weights,
    by_request,
    by_group,
    by_block,
    ends,
    tokens,
    groups,
    many,
    first,
    room,
    SIZE: tl.constexpr,
    MANY: tl.constexpr,
    PLACES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    request, group = row // groups, row % groups
    end = tl.load(ends + request)
    blocks += row * many
    each = tl.arange(0, MANY)
    block = tl.load(blocks + each, mask=each < many, other=-1)
    there = block >= 0
    count = tl.where(there, tl.minimum(tl.maximum(end - first - block * SIZE, 0), SIZE), 0)
    weight = tl.load(weights + request * by_request + group * by_group + block * by_block, mask=there, other=float("inf"))
    least = tl.min(weight, 0)
    worst = tl.min(tl.where(there & (weight == least), each, MANY), 0)  # the first of equal ones
    left_out = tl.where(tl.sum(count, 0) > room, worst, MANY)

    place = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    number = place // SIZE
    number += (number >= left_out).to(tl.int32)
    mine = tl.load(blocks + number, mask=(number < many) & (place < room), other=-1)
    token = first + mine * SIZE + place % SIZE
    tl.store(tokens + row * room + place, tl.where((mine >= 0) & (token < end), token, -1), mask=place < room)


@triton.jit
def _place(positions, seats, nowhere, first, SIZE: tl.constexpr):
    """Row of the summaries, block, and place in it of the program's token."""
    request = tl.program_id(0)
    place = tl.load(positions + request) - first
    row = tl.where(place >= 0, tl.load(seats + request), nowhere)
    place = tl.maximum(place, 0)
    return row.to(tl.int64), place // SIZE, place % SIZE


@triton.jit
def _widen(
    bounds,
    by_row,
    by_head,
    by_block,
    by_bound,
    key,
    by_request,
    by_key_head,
    positions,
    seats,
    nowhere,
    first,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):
    row, block, place = _place(positions, seats, nowhere, first, SIZE)
    head, dim = tl.program_id(1), tl.arange(0, DIM_PADDED)
    inside = dim < DIM
    new = tl.load(key + tl.program_id(0).to(tl.int64) * by_request + head * by_key_head + dim, mask=inside).to(tl.float32)
    high = bounds + row * by_row + head * by_head + block * by_block + dim
    low = high + by_bound
    known, begins = tl.where(inside, place, 0) > 0, place == 0
    greatest = tl.load(high, mask=known, other=0.0).to(tl.float32)
    least = tl.load(low, mask=known, other=0.0).to(tl.float32)
    tl.store(high, tl.where(begins, new, tl.maximum(greatest, new)), mask=inside)
    tl.store(low, tl.where(begins, new, tl.minimum(least, new)), mask=inside)


@triton.jit
def _add(
    means,
    by_row,
    by_head,
    by_block,
    sums,
    sums_by_row,
    sums_by_head,
    key,
    by_request,
    by_key_head,
    positions,
    seats,
    nowhere,
    first,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):
    row, block, place = _place(positions, seats, nowhere, first, SIZE)
    head, dim = tl.program_id(1), tl.arange(0, DIM_PADDED)
    inside = dim < DIM
    new = tl.load(key + tl.program_id(0).to(tl.int64) * by_request + head * by_key_head + dim, mask=inside, other=0.0)
    total = sums + row * sums_by_row + head * sums_by_head + dim
    known = tl.load(total, mask=tl.where(inside, place, 0) > 0, other=0.0) + new.to(tl.float32)
    tl.store(total, known, mask=inside)
    mean = tl.div_rn(known, (place + 1).to(tl.float32))
    tl.store(means + row * by_row + head * by_head + block * by_block + dim, mean.to(means.dtype.element_ty), mask=inside)

"""Triton kernels of `quantized_experts`: for the few rows of a decode step, and in tiles of rows that chose the same expert.

Which expert a program works for is read on the device, and how many programs there are follows from shapes alone: a step that is
captured chooses other experts each time it runs. Codes are decoded where they are multiplied, and nothing is written out.

Bytes: in a decode step the codes, scales and zeros of each row's experts; in tiles those of every expert that was chosen, for
each tile of its rows.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specontext.kernels.quantized_linear import QuantizedMatrix
from specontext.kernels.triton.quantized_linear import (
    constants,
    few_tile,
    lanes_of,
    multiplied,
    row_products,
    tensors,
    tile_of,
    tile_products,
)

PAIRS = 64  # of a row and an expert, from which on they are worth sorting
TALLEST = 64  # rows of a tile


@triton.jit
def _pairs(
    x,
    chosen,
    codes,
    scales,
    zeros,
    out,
    each,
    n_rows,
    n_groups,
    row_bytes,
    offset,
    scale_stride,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    HARDWARE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
):
    pair = tl.program_id(1).to(tl.int64)
    expert = tl.load(chosen + pair).to(tl.int32)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < n_rows
    result = row_products(
        x + pair // each * (n_groups * GROUP),
        codes,
        scales,
        zeros,
        expert * n_rows + n,
        there,
        n_groups,
        row_bytes,
        offset,
        scale_stride,
        SCALE_ROWS,
        SCALE_COLUMNS,
        KIND,
        HARDWARE,
        HAS_ZEROS,
        BLOCK_N,
        LANES,
        GROUP,
        False,  # EARLY
    )
    tl.store(out + pair * n_rows + n, result.to(out.dtype.element_ty), mask=there)


@triton.jit
def _tiles(
    x,
    order,
    expert_of_tile,
    first_of_tile,
    ends,
    codes,
    scales,
    zeros,
    out,
    each,
    experts,
    n_rows,
    n_groups,
    row_bytes,
    offset,
    scale_stride,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    HARDWARE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    expert = tl.load(expert_of_tile + tl.program_id(1)).to(tl.int32)
    if expert < experts:
        place = tl.load(first_of_tile + tl.program_id(1)) + tl.arange(0, BLOCK_M)
        asked = place < tl.load(ends + expert)
        pair = tl.load(order + place, mask=asked, other=0)
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        there = n < n_rows
        acc = tile_products(
            x + pair // each * (n_groups * GROUP),
            asked,
            codes,
            scales,
            zeros,
            expert * n_rows + n,
            there,
            n_groups,
            row_bytes,
            offset,
            scale_stride,
            SCALE_ROWS,
            SCALE_COLUMNS,
            KIND,
            HARDWARE,
            HAS_ZEROS,
            FORMAT,
            BLOCK_M,
            BLOCK_N,
            GROUPS,
            GROUP,
        )
        tl.store(out + (pair * n_rows)[:, None] + n[None, :], acc.to(out.dtype.element_ty), mask=asked[:, None] & there[None, :])


def chosen_products(x: Tensor, chosen: Tensor, matrix: QuantizedMatrix, experts: int) -> Tensor:
    """See `kernels.quantized_experts.chosen_products`; of a matrix in groups that kernels take."""
    assert matrix.group and matrix.order is None
    out = x.new_empty((*chosen.shape, matrix.shape[0] // experts))
    x, chosen = x.contiguous(), chosen.contiguous()
    if chosen.numel() <= PAIRS:
        pairs(x, chosen, matrix, experts, out)
    else:
        tiles(x, chosen, matrix, experts, out)
    return out


def pairs(x: Tensor, chosen: Tensor, matrix: QuantizedMatrix, experts: int, out: Tensor) -> None:
    """Every row and each of its experts by itself."""
    n, tile = out.shape[2], tile_of([matrix])
    _pairs[(triton.cdiv(n, tile.rows), chosen.numel())](
        x,
        chosen,
        *tensors(matrix)[:3],
        out,
        chosen.shape[1],
        *_sizes(matrix, n),
        **constants(matrix),
        BLOCK_N=tile.rows,
        LANES=lanes_of(tile, matrix),
        GROUP=matrix.group,
        num_warps=tile.warps,
    )


def tiles(x: Tensor, chosen: Tensor, matrix: QuantizedMatrix, experts: int, out: Tensor) -> None:
    """Rows sorted by their experts, so that a tile of rows reads an expert's codes once."""
    n, count = out.shape[2], chosen.numel()
    tall = min(TALLEST, max(16, triton.next_power_of_2(count // experts)))
    order, ends, expert_of_tile, first_of_tile = tiles_of(chosen, experts, tall)
    tile = few_tile(n, tall, x.itemsize)
    _tiles[(triton.cdiv(n, tile.rows), len(expert_of_tile))](
        x,
        order,
        expert_of_tile,
        first_of_tile,
        ends,
        *tensors(matrix)[:3],
        out,
        chosen.shape[1],
        experts,
        *_sizes(matrix, n),
        **constants(matrix),
        FORMAT=multiplied(x),
        BLOCK_M=tall,
        BLOCK_N=tile.rows,
        GROUPS=tile.groups,
        GROUP=matrix.group,
        num_warps=tile.groups,
        num_stages=tile.stages,
    )


def tiles_of(chosen: Tensor, experts: int, tall: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs of rows and experts, divided into tiles of at most so many that have the same expert; the host waits for nothing.

    Returns:
        int64 all: the pairs sorted by expert [M * C]; where each expert's end there [experts]; and for as many tiles as there can
        be at most: its expert, `experts` where there is none, and its first pair's place in the order.
    """
    by_expert, order = chosen.flatten().sort(stable=True)
    numbers = torch.arange(experts, device=chosen.device)
    ends = torch.searchsorted(by_expert, numbers, right=True)
    starts = torch.searchsorted(by_expert, numbers)
    last = ((ends - starts + (tall - 1)) // tall).cumsum(0)  # number of tiles up to an expert, its own among them
    most = min(len(order), len(order) // tall + experts)
    tile = torch.arange(most, device=chosen.device)
    expert_of_tile = torch.searchsorted(last, tile, right=True)
    known = expert_of_tile.clamp(max=experts - 1)
    own = tile - (last - (ends - starts + (tall - 1)) // tall)[known]  # number of a tile among its expert's
    return order, ends, expert_of_tile, starts[known] + own * tall


def _sizes(matrix: QuantizedMatrix, n: int) -> tuple[int, int, int, int, int]:
    """Rows of an expert and groups of a row, bytes of a row of codes, the zero of all, and scales of a row."""
    return n, matrix.shape[1] // matrix.group, matrix.codes.shape[1], matrix.offset, matrix.scales.shape[1]

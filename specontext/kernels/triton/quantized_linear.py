"""Triton kernels of `quantized_linear`: for one row of x, for a few, and writing the matrix out where there are many.

One row (a decode step of one request) reads the codes once and does little else: a thread decodes the codes of 16 bytes to
float32 and sums their products before it looks at scale and zero, and threads add up what they have at the end. Such a product
takes as long to begin and to end as to read: matrices of the same row share a launch, and on Hopper codes are asked for while the
kernel before still runs (programmatic dependent launch). A few rows are a
tiled product on tensor cores, into which the codes go as exact 16-bit numbers: each warp takes another group of columns of the
same rows of W. From `MANY` rows on cuBLAS multiplies a matrix that was written out: what writing takes is then little beside the
product.

What a code costs besides its bytes are instructions: 4 bits are decoded in assembly, for float32 with one a code, for 16-bit
numbers with one for two (bits are put below an exponent with which they are 16 + n, or 128 + n), and 8-bit floats to bfloat16
two at a time.

Bytes: the codes, scales and zeros once, x for each program from the caches.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from specontext.kernels.dispatch import reference_of
from specontext.kernels.quantized_linear import FP8, INT4, INT8, QuantizedMatrix
from specontext.kernels.quantized_linear import dequantized as dequantized_here
from specontext.kernels.triton.weight_codes import IS_FP8, IS_INT4, decode, halves, integers, short_floats, short_halves

MANY = 65  # rows of x
NUMBERS = {FP8: 0, INT8: 1, INT4: 2}
NATIVE = (8, 9)  # the first capability whose hardware converts fp8
EARLIEST = (9, 0)  # the first on which kernels wait for those before them


@dataclass(frozen=True)
class Tile:
    """What a program of the kernel for one row takes at once.

    Attributes:
        rows: of W.
        lanes: of 16 bytes of codes, of each row.
    """

    rows: int
    lanes: int
    warps: int = 4


class FewTile(NamedTuple):
    """What a program of the kernel for a few rows takes at once: of W, and groups of columns, one a warp."""

    rows: int
    stages: int
    groups: int


@triton.jit
def wait_for_those_before():
    """Until the kernels before are done, and what they wrote can be read; from then on the next may come."""
    # As `tl.extra.cuda.gdc_wait` and `gdc_launch_dependents` have it, which Triton 3.4 cannot compile.
    tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def row_products(
    x,
    codes,
    scales,
    zeros,
    n,
    asked,
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
    EARLY: tl.constexpr,
):
    """float32 [BLOCK_N]: one row of x times rows n [BLOCK_N] of W, those that are asked for.

    EARLY: the kernel was launched before what makes x is done; codes are read meanwhile.
    """
    line = codes + (n.to(tl.int64) * row_bytes)[:, None, None]
    tables = ((n // SCALE_ROWS) * scale_stride)[:, None]
    inner = tl.arange(0, 16)[None, :]
    acc = tl.zeros((BLOCK_N, LANES), dtype=tl.float32)
    each: tl.constexpr = GROUP // 32 if KIND == IS_INT4 else GROUP // 16  # lanes of a group
    for start in range(0, n_groups * each, LANES):
        lane = start + tl.arange(0, LANES)
        group = lane // each
        known = group < n_groups
        there = asked[:, None] & known[None, :]
        code = tl.load(line + (lane[:, None] * 16 + inner)[None, :, :], mask=there[:, :, None], other=0)
        table = tables + (group * GROUP // SCALE_COLUMNS)[None, :]
        scale = tl.load(scales + table, mask=there, other=0.0).to(tl.float32)
        zero = tl.zeros((BLOCK_N, LANES), dtype=tl.float32) + offset
        if HAS_ZEROS:
            zero = tl.load(zeros + table, mask=there, other=0).to(tl.float32)
        if EARLY:
            wait_for_those_before()
        if KIND == IS_INT4:
            at = x + (group * GROUP + lane % each * 16)[:, None] + inner
            first = tl.load(at, mask=known[:, None], other=0.0).to(tl.float32)
            second = tl.load(at + GROUP // 2, mask=known[:, None], other=0.0).to(tl.float32)
            low, high = halves(code, HARDWARE)
            products = low * first[None, :, :] + high * second[None, :, :]
            partial = tl.sum(products, axis=2) - (zero + 16.0) * tl.sum(first + second, axis=1)[None, :]
        else:
            number = tl.load(x + lane[:, None] * 16 + inner, mask=known[:, None], other=0.0).to(tl.float32)
            partial = tl.sum(decode(code, KIND, HARDWARE) * number[None, :, :], axis=2)
            if KIND != IS_FP8:
                partial -= zero * tl.sum(number, axis=1)[None, :]
        acc += scale * partial
    return tl.sum(acc, axis=1)


@triton.jit
def _one_row(
    x,
    codes,
    scales,
    zeros,
    bias,
    out,
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
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Of matrices that differ in their rows alone, of which there are tuples: each program works for one of them."""
    block = tl.program_id(0)
    before = 0  # programs of the matrices before, and rows of theirs
    above = 0
    for part in tl.static_range(len(codes)):
        blocks = tl.cdiv(n_rows[part], BLOCK_N)
        if (block >= before) & (block < before + blocks):
            n = (block - before) * BLOCK_N + tl.arange(0, BLOCK_N)
            there = n < n_rows[part]
            result = row_products(
                x,
                codes[part],
                scales[part],
                zeros[part],
                n,
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
                EARLY,
            )
            if HAS_BIAS:
                result += tl.load(bias[part] + n, mask=there, other=0.0).to(tl.float32)
            tl.store(out + above + n, result.to(out.dtype.element_ty), mask=there)
        before += blocks
        above += n_rows[part]


@triton.jit
def tile_products(
    line,
    asked,
    codes,
    scales,
    zeros,
    n,
    there,
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
    """float32 [BLOCK_M, BLOCK_N]: rows of x, whose first numbers are at line [BLOCK_M], times rows n [BLOCK_N] of W.

    Each of GROUPS warps multiplies another group of columns.
    """
    column = codes + (n.to(tl.int64) * row_bytes)[None, None, :]
    tables = ((n // SCALE_ROWS) * scale_stride)[None, :]
    acc = tl.zeros((GROUPS, BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, n_groups, GROUPS):
        group = start + tl.arange(0, GROUPS)
        known = group < n_groups
        seen = known[:, None] & there[None, :]
        table = tables + (group * GROUP // SCALE_COLUMNS)[:, None]
        scale = tl.load(scales + table, mask=seen, other=0.0).to(tl.float32)
        zero = tl.zeros((GROUPS, BLOCK_N), dtype=tl.float32) + offset
        if HAS_ZEROS:
            zero = tl.load(zeros + table, mask=seen, other=0).to(tl.float32)
        rows = known[:, None, None] & asked[None, :, None]
        if KIND == IS_INT4:
            inner = tl.arange(0, GROUP // 2)
            at = group[:, None] * (GROUP // 2) + inner[None, :]
            pair = tl.load(column + at[:, :, None], mask=seen[:, None, :], other=0)  # [GROUPS, GROUP / 2, BLOCK_N]
            low, high = short_halves(pair, tl.broadcast_to(zero[:, None, :], pair.shape), FORMAT, HARDWARE)
            place = line[None, :, None] + (group[:, None] * GROUP + inner[None, :])[:, None, :]
            first = tl.load(place, mask=rows, other=0.0).to(FORMAT)
            second = tl.load(place + GROUP // 2, mask=rows, other=0.0).to(FORMAT)
            partial = tl.dot(second, high, acc=tl.dot(first, low, input_precision="ieee"), input_precision="ieee")
        else:
            at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            code = tl.load(column + at[:, :, None], mask=seen[:, None, :], other=0)  # [GROUPS, GROUP, BLOCK_N]
            if KIND == IS_FP8:
                value = short_floats(code, FORMAT, HARDWARE)
            else:
                value = (integers(code) - zero[:, None, :]).to(FORMAT)
            tile = tl.load(line[None, :, None] + at[:, None, :], mask=rows, other=0.0).to(FORMAT)
            partial = tl.dot(tile, value, input_precision="ieee")
        acc += partial * scale[:, None, :]
    return tl.sum(acc, axis=0)


@triton.jit(do_not_specialize=["m_rows"])
def _few_rows(
    x,
    codes,
    scales,
    zeros,
    bias,
    out,
    m_rows,
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
    HAS_BIAS: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    asked, there = m < m_rows, n < n_rows
    acc = tile_products(
        x + m.to(tl.int64) * (n_groups * GROUP),
        asked,
        codes,
        scales,
        zeros,
        n,
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
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)[None, :]
    place = (m.to(tl.int64) * n_rows)[:, None] + n[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=asked[:, None] & there[None, :])


@triton.jit
def _write_out(
    codes,
    scales,
    zeros,
    out,
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
    GROUP: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1)
    there = n < n_rows
    table = (n // SCALE_ROWS) * scale_stride + group * GROUP // SCALE_COLUMNS
    scale = tl.load(scales + table, mask=there, other=0.0).to(tl.float32)[:, None]
    zero = tl.zeros((BLOCK_N,), dtype=tl.float32) + offset
    if HAS_ZEROS:
        zero = tl.load(zeros + table, mask=there, other=0).to(tl.float32)
    line = codes + (n.to(tl.int64) * row_bytes)[:, None]
    to = out + (n.to(tl.int64) * (n_groups * GROUP))[:, None] + group * GROUP
    if KIND == IS_INT4:
        inner = tl.arange(0, GROUP // 2)[None, :]
        pair = tl.load(line + group * (GROUP // 2) + inner, mask=there[:, None], other=0)
        low = (integers(pair & 15) - zero[:, None]) * scale
        high = (integers(pair >> 4) - zero[:, None]) * scale
        tl.store(to + inner, low.to(out.dtype.element_ty), mask=there[:, None])
        tl.store(to + GROUP // 2 + inner, high.to(out.dtype.element_ty), mask=there[:, None])
    else:
        inner = tl.arange(0, GROUP)[None, :]
        value = decode(tl.load(line + group * GROUP + inner, mask=there[:, None], other=0), KIND, HARDWARE)
        if KIND != IS_FP8:
            value -= zero[:, None]
        tl.store(to + inner, (value * scale).to(out.dtype.element_ty), mask=there[:, None])


def product(x: Tensor, matrix: QuantizedMatrix, bias: Tensor | None) -> Tensor:
    """See `kernels.quantized_linear.product`."""
    if len(x) >= MANY or not matrix.group:
        return torch.nn.functional.linear(x, dequantized_here(matrix, x.dtype), bias)
    if len(x) > 1:
        return few_rows(x if matrix.order is None else x.index_select(1, matrix.order), matrix, bias)
    return products(x, [matrix], None if bias is None else [bias])


def products(x: Tensor, matrices: Sequence[QuantizedMatrix], biases: Sequence[Tensor] | None) -> Tensor:
    """See `kernels.quantized_linear.products`."""
    first = matrices[0]
    if len(x) > 1 or not first.group:
        each: Sequence[Tensor | None] = biases or (None,) * len(matrices)
        return torch.cat([product(x, matrix, bias) for matrix, bias in zip(matrices, each, strict=True)], dim=1)
    return one_row(x if first.order is None else x.index_select(1, first.order), matrices, biases, tile_of(matrices))


def tile_of(matrices: Sequence[QuantizedMatrix]) -> Tile:
    """As measured on an H200; matrices with few rows are cut into more programs, so that all of the device reads."""
    many = sum(matrix.shape[0] for matrix in matrices) >= 2048
    if matrices[0].kind == INT4:
        return Tile(4, 64, warps=2) if many else Tile(4, 128)
    return Tile(4, 128) if many else Tile(1, 128)


def few_tile(n: int, tall: int, itemsize: int) -> FewTile:
    """For N rows of W and so many of x at once, of numbers of so many bytes; as measured on an H200 for 16 and 64 rows.

    What lies in shared memory is less than the 99 KiB that smaller cards have.
    """
    groups = 4 if itemsize == 2 else 1
    return FewTile(32 if n >= 8192 and tall == 16 else 16, stages=3 if tall < 64 and groups > 1 else 2, groups=groups)


def lanes_of(tile: Tile, matrix: QuantizedMatrix) -> int:
    """Lanes of a tile: no more than a row has."""
    return min(tile.lanes, triton.next_power_of_2(triton.cdiv(matrix.codes.shape[1], 16)))


def one_row(x: Tensor, matrices: Sequence[QuantizedMatrix], biases: Sequence[Tensor] | None, tile: Tile) -> Tensor:
    """`products` for x [1, K], its columns in the order of the codes."""
    first, rows = matrices[0], [matrix.shape[0] for matrix in matrices]
    out = x.new_empty((1, sum(rows)))
    parts = [tensors(matrix, bias) for matrix, bias in zip(matrices, biases or (None,) * len(rows), strict=True)]
    early = comes_early(x)
    _one_row[(sum(triton.cdiv(n, tile.rows) for n in rows),)](
        x.contiguous(),
        *zip(*parts, strict=True),
        out,
        tuple(rows),
        first.shape[1] // first.group,
        first.codes.shape[1],
        first.offset,
        first.scales.shape[1],
        **constants(first) | {"SCALE_ROWS": max(matrix.rows for matrix in matrices)},
        HAS_BIAS=biases is not None,
        BLOCK_N=tile.rows,
        LANES=lanes_of(tile, first),
        GROUP=first.group,
        EARLY=early,
        num_warps=tile.warps,
        **({"launch_pdl": True} if early else {}),
    )
    return out


def few_rows(x: Tensor, matrix: QuantizedMatrix, bias: Tensor | None) -> Tensor:
    """`product` for x [M, K]."""
    (m, _), (n, k), group = x.shape, matrix.shape, matrix.group
    out = x.new_empty((m, n))
    tall = max(16, triton.next_power_of_2(m))  # all of x at once, so that codes are read once
    tile = few_tile(n, tall, x.itemsize)
    _few_rows[(triton.cdiv(n, tile.rows), triton.cdiv(m, tall))](
        x.contiguous(),
        *tensors(matrix, bias),
        out,
        m,
        n,
        k // group,
        matrix.codes.shape[1],
        matrix.offset,
        matrix.scales.shape[1],
        **constants(matrix),
        HAS_BIAS=bias is not None,
        FORMAT=multiplied(x),
        BLOCK_M=tall,
        BLOCK_N=tile.rows,
        GROUPS=tile.groups,
        GROUP=group,
        num_warps=tile.groups,
        num_stages=tile.stages,
    )
    return out


def dequantized(matrix: QuantizedMatrix, dtype: torch.dtype) -> Tensor:
    """See `kernels.quantized_linear.dequantized`."""
    (n, k), group = matrix.shape, matrix.group
    if not group or dtype == torch.float64:
        return reference_of(dequantized_here)(matrix, dtype)
    out = torch.empty((n, k), dtype=dtype, device=matrix.codes.device)
    codes, scales, zeros, _ = tensors(matrix)
    _write_out[(triton.cdiv(n, 16), k // group)](
        codes,
        scales,
        zeros,
        out,
        n,
        k // group,
        matrix.codes.shape[1],
        matrix.offset,
        matrix.scales.shape[1],
        **constants(matrix),
        BLOCK_N=16,
        GROUP=group,
    )
    return out if matrix.order is None else torch.empty_like(out).index_copy_(1, matrix.order, out)


def tensors(matrix: QuantizedMatrix, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What kernels are handed; in place of what is not there, something that they do not read."""
    zeros = matrix.codes if matrix.zeros is None else matrix.zeros
    return matrix.codes, matrix.scales, zeros, matrix.scales if bias is None else bias


def multiplied(x: Tensor) -> tl.dtype:
    """The format of products on tensor cores; the interpreter has no bfloat16."""
    if x.dtype == torch.float32 or not x.is_cuda:
        return tl.float32
    return tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16


def comes_early(x: Tensor) -> bool:
    """Whether a kernel may be launched before those before it are done, and wait for them itself."""
    return x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= EARLIEST


def constants(matrix: QuantizedMatrix) -> dict[str, int | bool]:
    """What kernels are compiled for."""
    on_gpu = matrix.codes.is_cuda and torch.version.hip is None
    return {
        "SCALE_ROWS": matrix.rows,
        "SCALE_COLUMNS": matrix.columns,
        "KIND": NUMBERS[matrix.kind],
        "HARDWARE": on_gpu and torch.cuda.get_device_capability(matrix.codes.device) >= NATIVE,
        "HAS_ZEROS": matrix.zeros is not None,
    }

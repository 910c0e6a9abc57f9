"""Triton kernels of `quantized_linear`: for one row of x, for a few, and writing the matrix out where there are many.

One row (a decode step of one request) reads the codes once and does little else: a program takes some rows of W, decodes them
to float32, and sums each group before its scale is applied, so neither scales nor zeros are read once a number. A few rows are a
tiled product on tensor cores, into which the codes go as exact 16-bit numbers. From `MANY` rows on cuBLAS multiplies a matrix
that was written out: what writing takes is then little beside the product.

Bytes: the codes, scales and zeros once, x for each program from the caches.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from specontext.kernels.dispatch import reference_of
from specontext.kernels.quantized_linear import FP8, INT4, INT8, QuantizedMatrix
from specontext.kernels.quantized_linear import dequantized as dequantized_here

MANY = 65  # rows of x
NUMBERS = {FP8: 0, INT8: 1, INT4: 2}
IS_FP8, IS_INT4 = tl.constexpr(0), tl.constexpr(2)
NATIVE = (8, 9)  # the first capability whose hardware converts fp8


@dataclass(frozen=True)
class Tile:
    """What a program of the kernel for one row takes at once.

    Attributes:
        rows: of W.
        codes: of each row, a multiple of 128.
    """

    rows: int
    codes: int
    warps: int = 4


@triton.jit
def _integers(codes):
    """float32 of unsigned integers below 2^23: as the lowest bits of 2^23, which is faster than a conversion."""
    bits = codes.to(tl.int32) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _floats(codes, HARDWARE: tl.constexpr):
    """float32 of the bits of float8_e4m3fn, exactly: as float16 with an exponent that is 8 too small where hardware has none."""
    if HARDWARE:
        value = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        bits = codes.to(tl.int16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return value


@triton.jit
def _decode(codes, KIND: tl.constexpr, HARDWARE: tl.constexpr):
    if KIND == IS_FP8:
        value = _floats(codes, HARDWARE)
    else:
        value = _integers(codes)
    return value


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
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """float32 [BLOCK_N]: one row of x times rows n [BLOCK_N] of W, those that are asked for."""
    line = n.to(tl.int64)[:, None, None] * row_bytes
    acc = tl.zeros((BLOCK_N, GROUPS), dtype=tl.float32)
    for start in range(0, n_groups, GROUPS):
        group = start + tl.arange(0, GROUPS)
        known = (group < n_groups)[:, None]
        there = asked[:, None] & (group < n_groups)[None, :]
        table = (n // SCALE_ROWS)[:, None] * scale_stride + (group * GROUP // SCALE_COLUMNS)[None, :]
        scale = tl.load(scales + table, mask=there, other=0.0).to(tl.float32)
        if KIND == IS_INT4:
            inner = tl.arange(0, GROUP // 2)[None, :]
            place = line + (group[:, None] * (GROUP // 2) + inner)[None, :, :]
            pair = tl.load(codes + place, mask=there[:, :, None], other=0)
            first = tl.load(x + group[:, None] * GROUP + inner, mask=known, other=0.0).to(tl.float32)
            second = tl.load(x + group[:, None] * GROUP + GROUP // 2 + inner, mask=known, other=0.0).to(tl.float32)
            products = _integers(pair & 15) * first[None, :, :] + _integers(pair >> 4) * second[None, :, :]
            total = tl.sum(first + second, axis=1)
        else:
            at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            code = tl.load(codes + line + at[None, :, :], mask=there[:, :, None], other=0)
            number = tl.load(x + at, mask=known, other=0.0).to(tl.float32)
            products = _decode(code, KIND, HARDWARE) * number[None, :, :]
            total = tl.sum(number, axis=1)
        partial = tl.sum(products, axis=2)  # [BLOCK_N, GROUPS]
        if HAS_ZEROS:
            partial -= tl.load(zeros + table, mask=there, other=0).to(tl.float32) * total[None, :]
        elif KIND != IS_FP8:
            partial -= offset * total[None, :]
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
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < n_rows
    result = row_products(
        x,
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
        BLOCK_N,
        GROUPS,
        GROUP,
    )
    if HAS_BIAS:
        result += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)
    tl.store(out + n, result.to(out.dtype.element_ty), mask=there)


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
    GROUP: tl.constexpr,
):
    """float32 [BLOCK_M, BLOCK_N]: rows of x, whose first numbers are at line [BLOCK_M, 1], times rows n [BLOCK_N] of W."""
    column = codes + (n.to(tl.int64) * row_bytes)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for group in range(0, n_groups):
        table = (n // SCALE_ROWS) * scale_stride + group * GROUP // SCALE_COLUMNS
        scale = tl.load(scales + table, mask=there, other=0.0).to(tl.float32)
        zero = tl.zeros((BLOCK_N,), dtype=tl.float32) + offset
        if HAS_ZEROS:
            zero = tl.load(zeros + table, mask=there, other=0).to(tl.float32)
        if KIND == IS_INT4:
            inner = tl.arange(0, GROUP // 2)
            pair = tl.load(column + (group * (GROUP // 2) + inner)[:, None], mask=there[None, :], other=0)  # [GROUP / 2, BLOCK_N]
            low = (_integers(pair & 15) - zero[None, :]).to(FORMAT)
            high = (_integers(pair >> 4) - zero[None, :]).to(FORMAT)
            first = tl.load(line + (group * GROUP + inner)[None, :], mask=asked, other=0.0).to(FORMAT)
            second = tl.load(line + (group * GROUP + GROUP // 2 + inner)[None, :], mask=asked, other=0.0).to(FORMAT)
            partial = tl.dot(second, high, acc=tl.dot(first, low, input_precision="ieee"), input_precision="ieee")
        else:
            at = group * GROUP + tl.arange(0, GROUP)
            value = _decode(tl.load(column + at[:, None], mask=there[None, :], other=0), KIND, HARDWARE)  # [GROUP, BLOCK_N]
            if KIND != IS_FP8:
                value -= zero[None, :]
            tile = tl.load(line + at[None, :], mask=asked, other=0.0).to(FORMAT)
            partial = tl.dot(tile, value.to(FORMAT), input_precision="ieee")
        acc += partial * scale[None, :]
    return acc


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
    GROUP: tl.constexpr,
):
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    asked, there = (m < m_rows)[:, None], n < n_rows
    acc = tile_products(
        x + (m.to(tl.int64) * (n_groups * GROUP))[:, None],
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
        GROUP,
    )
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)[None, :]
    place = (m.to(tl.int64) * n_rows)[:, None] + n[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=asked & there[None, :])


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
        low = (_integers(pair & 15) - zero[:, None]) * scale
        high = (_integers(pair >> 4) - zero[:, None]) * scale
        tl.store(to + inner, low.to(out.dtype.element_ty), mask=there[:, None])
        tl.store(to + GROUP // 2 + inner, high.to(out.dtype.element_ty), mask=there[:, None])
    else:
        inner = tl.arange(0, GROUP)[None, :]
        value = _decode(tl.load(line + group * GROUP + inner, mask=there[:, None], other=0), KIND, HARDWARE)
        if KIND != IS_FP8:
            value -= zero[:, None]
        tl.store(to + inner, (value * scale).to(out.dtype.element_ty), mask=there[:, None])


def product(x: Tensor, matrix: QuantizedMatrix, bias: Tensor | None) -> Tensor:
    """See `kernels.quantized_linear.product`."""
    if len(x) >= MANY or not matrix.group:
        return torch.nn.functional.linear(x, dequantized_here(matrix, x.dtype), bias)
    x = x if matrix.order is None else x.index_select(1, matrix.order)
    return one_row(x, matrix, bias, tile_of(matrix)) if len(x) == 1 else few_rows(x, matrix, bias)


def tile_of(matrix: QuantizedMatrix) -> Tile:
    """A matrix with few rows is cut into more programs, so that all of the device reads."""
    rows = 4 if matrix.shape[0] >= 2048 else 2
    return Tile(rows, (8192 if matrix.kind == INT4 else 4096) // rows)


def one_row(x: Tensor, matrix: QuantizedMatrix, bias: Tensor | None, tile: Tile) -> Tensor:
    """`product` for x [1, K]."""
    n, k = matrix.shape
    out = x.new_empty((1, n))
    group = matrix.group
    groups = max(1, min(tile.codes, triton.next_power_of_2(k)) // group)
    _one_row[(triton.cdiv(n, tile.rows),)](
        x.contiguous(),
        *tensors(matrix, bias),
        out,
        n,
        k // group,
        matrix.codes.shape[1],
        matrix.offset,
        matrix.scales.shape[1],
        **constants(matrix),
        HAS_BIAS=bias is not None,
        BLOCK_N=tile.rows,
        GROUPS=groups,
        GROUP=group,
        num_warps=tile.warps,
    )
    return out


def few_rows(x: Tensor, matrix: QuantizedMatrix, bias: Tensor | None) -> Tensor:
    """`product` for x [M, K]."""
    (m, _), (n, k), group = x.shape, matrix.shape, matrix.group
    out = x.new_empty((m, n))
    block = 32 if n >= 8192 else 16
    tall = max(16, triton.next_power_of_2(m))  # all of x at once, so that codes are read once
    _few_rows[(triton.cdiv(n, block), triton.cdiv(m, tall))](
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
        BLOCK_N=block,
        GROUP=group,
        num_warps=4,
        num_stages=4,
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


def constants(matrix: QuantizedMatrix) -> dict[str, int | bool]:
    """What kernels are compiled for."""
    on_gpu = matrix.codes.is_cuda
    return {
        "SCALE_ROWS": matrix.rows,
        "SCALE_COLUMNS": matrix.columns,
        "KIND": NUMBERS[matrix.kind],
        "HARDWARE": on_gpu and torch.cuda.get_device_capability(matrix.codes.device) >= NATIVE,
        "HAS_ZEROS": matrix.zeros is not None,
    }

"""Triton kernels of `quantized_linear`: for one row of x, for a few, and writing the matrix out where there are many.

One row (a decode step of one request) reads the codes once and does little else: a thread decodes the codes of 16 bytes to
float32 and sums their products before it looks at scale and zero, and threads add up what they have at the end. A few rows are a
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

from dataclasses import dataclass
from typing import NamedTuple

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
def _halves(pair, HARDWARE: tl.constexpr):
    """float32 16 + n of the low and of the high half of bytes."""
    if HARDWARE:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, exponent;
            mov.b32 exponent, 0x41000000;
            shl.b32 low, $8, 3;
            shr.u32 high, $8, 1;
            lop3.b32 low, low, 0x78787878, 0x80808080, 0xEA;
            lop3.b32 high, high, 0x78787878, 0x80808080, 0xEA;
            prmt.b32 $0, low, exponent, 0x7044;
            prmt.b32 $1, low, exponent, 0x7144;
            prmt.b32 $2, low, exponent, 0x7244;
            prmt.b32 $3, low, exponent, 0x7344;
            prmt.b32 $4, high, exponent, 0x7044;
            prmt.b32 $5, high, exponent, 0x7144;
            prmt.b32 $6, high, exponent, 0x7244;
            prmt.b32 $7, high, exponent, 0x7344;
            }""",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
            [pair],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
    else:
        low, high = _integers(pair & 15) + 16.0, _integers(pair >> 4) + 16.0
    return low, high


@triton.jit
def _short_halves(pair, zero, FORMAT: tl.constexpr, HARDWARE: tl.constexpr):
    """n - zero of the low and of the high half of bytes; zeros of the same shape, of at most 128."""
    if HARDWARE and tl.bfloat16 == FORMAT:  # 128 + n, and once that less 128 + zero
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, exponents, ones;
            mov.b32 exponents, 0x43434343;
            mov.b32 ones, 0x3F803F80;
            and.b32 low, $4, 0x0F0F0F0F;
            shr.u32 high, $4, 4;
            and.b32 high, high, 0x0F0F0F0F;
            prmt.b32 $0, low, exponents, 0x4140;
            prmt.b32 $1, low, exponents, 0x4342;
            prmt.b32 $2, high, exponents, 0x4140;
            prmt.b32 $3, high, exponents, 0x4342;
            fma.rn.bf16x2 $0, $0, ones, $5;
            fma.rn.bf16x2 $1, $1, ones, $6;
            fma.rn.bf16x2 $2, $2, ones, $5;
            fma.rn.bf16x2 $3, $3, ones, $6;
            }""",
            "=&r,=&r,=&r,=&r,r,r,r",
            [pair, (-128.0 - zero).to(tl.bfloat16)],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    elif HARDWARE and tl.float16 == FORMAT:  # the same with 1024
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, exponents;
            mov.b32 exponents, 0x64646464;
            and.b32 low, $4, 0x0F0F0F0F;
            shr.u32 high, $4, 4;
            and.b32 high, high, 0x0F0F0F0F;
            prmt.b32 $0, low, exponents, 0x4140;
            prmt.b32 $1, low, exponents, 0x4342;
            prmt.b32 $2, high, exponents, 0x4140;
            prmt.b32 $3, high, exponents, 0x4342;
            add.rn.f16x2 $0, $0, $5;
            add.rn.f16x2 $1, $1, $6;
            add.rn.f16x2 $2, $2, $5;
            add.rn.f16x2 $3, $3, $6;
            }""",
            "=&r,=&r,=&r,=&r,r,r,r",
            [pair, (-1024.0 - zero).to(tl.float16)],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        low, high = (_integers(pair & 15) - zero).to(FORMAT), (_integers(pair >> 4) - zero).to(FORMAT)
    return low, high


@triton.jit
def _short_floats(codes, FORMAT: tl.constexpr, HARDWARE: tl.constexpr):
    """Numbers of the bits of float8_e4m3fn; compilers convert to bfloat16 one by one, with an instruction that takes long."""
    if HARDWARE and tl.bfloat16 == FORMAT:
        value = tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high, a, b, c, d;
            .reg .b32 first, second;
            .reg .f32 e, f, g, h;
            mov.b32 {low, high}, $2;
            cvt.rn.f16x2.e4m3x2 first, low;
            cvt.rn.f16x2.e4m3x2 second, high;
            mov.b32 {a, b}, first;
            mov.b32 {c, d}, second;
            cvt.f32.f16 e, a;
            cvt.f32.f16 f, b;
            cvt.f32.f16 g, c;
            cvt.f32.f16 h, d;
            cvt.rn.bf16x2.f32 $0, f, e;
            cvt.rn.bf16x2.f32 $1, h, g;
            }""",
            "=&r,=&r,r",
            [codes],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    else:
        value = _floats(codes, HARDWARE).to(FORMAT)
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
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """float32 [BLOCK_N]: one row of x times rows n [BLOCK_N] of W, those that are asked for."""
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
        if KIND == IS_INT4:
            at = x + (group * GROUP + lane % each * 16)[:, None] + inner
            first = tl.load(at, mask=known[:, None], other=0.0).to(tl.float32)
            second = tl.load(at + GROUP // 2, mask=known[:, None], other=0.0).to(tl.float32)
            low, high = _halves(code, HARDWARE)
            products = low * first[None, :, :] + high * second[None, :, :]
            partial = tl.sum(products, axis=2) - (zero + 16.0) * tl.sum(first + second, axis=1)[None, :]
        else:
            number = tl.load(x + lane[:, None] * 16 + inner, mask=known[:, None], other=0.0).to(tl.float32)
            partial = tl.sum(_decode(code, KIND, HARDWARE) * number[None, :, :], axis=2)
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
        LANES,
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
            low, high = _short_halves(pair, tl.broadcast_to(zero[:, None, :], pair.shape), FORMAT, HARDWARE)
            place = line[None, :, None] + (group[:, None] * GROUP + inner[None, :])[:, None, :]
            first = tl.load(place, mask=rows, other=0.0).to(FORMAT)
            second = tl.load(place + GROUP // 2, mask=rows, other=0.0).to(FORMAT)
            partial = tl.dot(second, high, acc=tl.dot(first, low, input_precision="ieee"), input_precision="ieee")
        else:
            at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            code = tl.load(column + at[:, :, None], mask=seen[:, None, :], other=0)  # [GROUPS, GROUP, BLOCK_N]
            if KIND == IS_FP8:
                value = _short_floats(code, FORMAT, HARDWARE)
            else:
                value = (_integers(code) - zero[:, None, :]).to(FORMAT)
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
    """As measured on an H200; a matrix with few rows is cut into more programs, so that all of the device reads."""
    if matrix.kind == INT4:
        return Tile(4, 64, warps=2) if matrix.shape[0] >= 2048 else Tile(4, 128)
    return Tile(4, 128) if matrix.shape[0] >= 2048 else Tile(1, 128)


def few_tile(n: int, tall: int, itemsize: int) -> FewTile:
    """For N rows of W and so many of x at once, of numbers of so many bytes; as measured on an H200 for 16 and 64 rows.

    What lies in shared memory is less than the 99 KiB that smaller cards have.
    """
    groups = 4 if itemsize == 2 else 1
    return FewTile(32 if n >= 8192 and tall == 16 else 16, stages=3 if tall < 64 and groups > 1 else 2, groups=groups)


def lanes_of(tile: Tile, matrix: QuantizedMatrix) -> int:
    """Lanes of a tile: no more than a row has."""
    return min(tile.lanes, triton.next_power_of_2(triton.cdiv(matrix.codes.shape[1], 16)))


def one_row(x: Tensor, matrix: QuantizedMatrix, bias: Tensor | None, tile: Tile) -> Tensor:
    """`product` for x [1, K]."""
    n, k = matrix.shape
    out = x.new_empty((1, n))
    _one_row[(triton.cdiv(n, tile.rows),)](
        x.contiguous(),
        *tensors(matrix, bias),
        out,
        n,
        k // matrix.group,
        matrix.codes.shape[1],
        matrix.offset,
        matrix.scales.shape[1],
        **constants(matrix),
        HAS_BIAS=bias is not None,
        BLOCK_N=tile.rows,
        LANES=lanes_of(tile, matrix),
        GROUP=matrix.group,
        num_warps=tile.warps,
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

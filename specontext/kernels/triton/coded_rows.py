# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Rows in 8 bits as kernels read them: where their codes and scales are, and codes as factors of products.

Every code, fp8 (e4m3) or int8, is a number of float16 as it is, and becomes one in a half or one and a quarter instructions.
bfloat16 takes a conversion of each number, at a quarter of the rate or less. So products with codes are made in float16, whose
range is what has to be seen to: a query is multiplied by a power of two that brings its greatest entry near the end of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

REACH = tl.constexpr(2.0**14)  # the greatest factors are so large, or twice; four times as much float16 has no number for
LEAST_UNIT = tl.constexpr(2.0**-124)  # less than any scale of a row over REACH
LEAST_QUERY = tl.constexpr(2.0**-100)  # magnitude that a query is taken to have; one of zeros has one, too


@triton.jit
def span_and_place(row, SPAN: tl.constexpr):
    """The spans of rows below 2 ** 31, and places in them, int32; of -1 those of row 0."""
    row = tl.maximum(row, 0).to(tl.uint32)
    return (row // SPAN).to(tl.int32), (row % SPAN).to(tl.int32)


@triton.jit
def first_code(span, place, DIM: tl.constexpr, SPAN: tl.constexpr):
    """Where the codes of a row begin, in bytes; see `specontext.kernels.spans`."""
    word = span.to(tl.int64) * (SPAN * (DIM // 2 + 1)) + place * (DIM // 2)
    # Triton 3.6 takes rows that follow each other for aligned like the first of them, if it is not told.
    return 4 * tl.multiple_of(word, 4 if DIM % 8 == 0 and SPAN % 4 == 0 else 1)


@triton.jit
def scales_of(words, span, place, present, DIM: tl.constexpr, SPAN: tl.constexpr):
    """Scales of K and V of rows in 8 bits, float32, 0 of those that are not present: four bytes are both, in bfloat16."""
    word = span.to(tl.int64) * (SPAN * (DIM // 2 + 1)) + (place + SPAN * (DIM // 2))
    both = tl.load(words + word, mask=present, other=0)
    return (both << 16).to(tl.float32, bitcast=True), (both & -65536).to(tl.float32, bitcast=True)


@triton.jit
def stretch_of(most, scale):
    """Powers of two by which queries of these greatest magnitudes, float32 [M], fit float16, and factors of their logits beside
    `scale`."""
    bits = tl.maximum(most, LEAST_QUERY).to(tl.int32, bitcast=True) & 0x7F800000
    power = bits.to(tl.float32, bitcast=True)  # the greatest power of two below, 2 ** e
    stretch = (0x43000000 - bits + 0x43000000).to(tl.float32, bitcast=True)  # 2 ** (14 - e)
    return stretch, power * (scale / REACH)


@triton.jit
def fitted(query, scale):
    """Queries [M, D], float32, stretched to fit float16, and factors [M] of their logits."""
    stretch, factor = stretch_of(tl.max(tl.abs(query), 1), scale)
    return query * stretch[:, None], factor


@triton.jit
def as_float16(codes, IN_PLACE: tl.constexpr, COMPILED: tl.constexpr):
    """Codes as numbers of float16, exactly.

    Args:
        IN_PLACE: they are made before they are laid out for a product, and not after it: a matrix of numbers that is transposed
            on the way is laid out by instructions of its own, one of codes byte by byte.
        COMPILED: for a GPU; the interpreter knows no assembly.
    """
    if not COMPILED:
        numbers = codes.to(tl.float16)
    elif codes.dtype == tl.int8:
        # A byte b behind 0x64 is the number 1024 + b; four codes come in a word and leave in two.
        numbers = tl.inline_asm_elementwise(
            """
            {
                .reg .b32 bytes, middle;
                mov.b32 middle, 0x64806480;
                xor.b32 bytes, $2, 0x80808080;
                prmt.b32 $0, bytes, 0x64646464, 0x4140;
                prmt.b32 $1, bytes, 0x64646464, 0x4342;
                sub.f16x2 $0, $0, middle;
                sub.f16x2 $1, $1, middle;
            }
            """,
            "=r,=r,r", [codes], dtype=tl.float16, is_pure=not IN_PLACE, pack=4,
        )  # fmt: skip
    else:
        numbers = codes.to(tl.float16)
        if IN_PLACE:
            numbers = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [numbers], dtype=tl.float16, is_pure=False, pack=2)
    return numbers

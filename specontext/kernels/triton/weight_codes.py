"""Numbers that codes of weights stand for, before zeros and scales.

In assembly on NVIDIA's GPUs (HARDWARE, from the first that converts fp8 on), where a compiler takes several times as many
instructions; elsewhere, and in the interpreter, as the compiler has it. All of it is exact.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

IS_FP8, IS_INT4 = tl.constexpr(0), tl.constexpr(2)


def _halves_of_bytes(exponent: int, one: int, form: str) -> str:
    """PTX for 16-bit numbers: four bytes to their low halves and their high ones, as the lowest bits of a number with this
    exponent, and a number added to each."""
    added = "\n".join(f"    fma.rn.{form}x2 ${i}, ${i}, ones, ${5 + i % 2};" for i in range(4))
    return f"""{{
    .reg .b32 low, high, exponents, ones;
    mov.b32 exponents, {exponent * 0x01010101:#x};
    mov.b32 ones, {one * 0x00010001:#x};
    and.b32 low, $4, 0x0F0F0F0F;
    shr.u32 high, $4, 4;
    and.b32 high, high, 0x0F0F0F0F;
    prmt.b32 $0, low, exponents, 0x4140;
    prmt.b32 $1, low, exponents, 0x4342;
    prmt.b32 $2, high, exponents, 0x4140;
    prmt.b32 $3, high, exponents, 0x4342;
{added}
    }}"""


BFLOAT16_HALVES = tl.constexpr(_halves_of_bytes(0x43, 0x3F80, "bf16"))  # of 128
FLOAT16_HALVES = tl.constexpr(_halves_of_bytes(0x64, 0x3C00, "f16"))  # of 1024
REGISTERS = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r")


@triton.jit
def integers(codes):
    """float32 of unsigned integers below 2^23: as the lowest bits of 2^23, which is faster than a conversion."""
    bits = codes.to(tl.int32) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def floats(codes, HARDWARE: tl.constexpr):
    """float32 of the bits of float8_e4m3fn, exactly: as float16 with an exponent that is 8 too small where hardware has none."""
    if HARDWARE:
        value = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        bits = codes.to(tl.int16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return value


@triton.jit
def decode(codes, KIND: tl.constexpr, HARDWARE: tl.constexpr):
    if KIND == IS_FP8:
        value = floats(codes, HARDWARE)
    else:
        value = integers(codes)
    return value


@triton.jit
def halves(pair, HARDWARE: tl.constexpr):
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
        low, high = integers(pair & 15) + 16.0, integers(pair >> 4) + 16.0
    return low, high


@triton.jit
def short_halves(pair, zero, FORMAT: tl.constexpr, HARDWARE: tl.constexpr):
    """n - zero of the low and of the high half of bytes; zeros of the same shape, of at most 128."""
    if HARDWARE and tl.bfloat16 == FORMAT:
        less = (-128.0 - zero).to(tl.bfloat16)
        low, high = tl.inline_asm_elementwise(
            BFLOAT16_HALVES, REGISTERS, [pair, less], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    elif HARDWARE and tl.float16 == FORMAT:
        less = (-1024.0 - zero).to(tl.float16)
        low, high = tl.inline_asm_elementwise(
            FLOAT16_HALVES, REGISTERS, [pair, less], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        low, high = (integers(pair & 15) - zero).to(FORMAT), (integers(pair >> 4) - zero).to(FORMAT)
    return low, high


@triton.jit
def short_floats(codes, FORMAT: tl.constexpr, HARDWARE: tl.constexpr):
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
        value = floats(codes, HARDWARE).to(FORMAT)
    return value

"""Rows of KV in 8 bits: how numbers become codes with a scale, and codes numbers.

A row of a pool is [2, D] numbers in the model's format; or 2 * D + 4 bytes, and the pool's number format is that of the codes:

    codes of K, D | codes of V, D | scale of K, bfloat16 | scale of V, bfloat16            260 bytes at D = 128

The scales are in the row, because another random read costs as much as the row. A number is its code times the scale. Scales of
float8_e4m3 are powers of two: its precision is the same anywhere in its range, and so numbers are exact in every format that has
their range, whoever multiplies. Those of int8 are the greatest magnitude over 127, rounded up to bfloat16. Of a key or value that
is not finite the scale is no number, and so is all that is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.core import SCALE_BYTES

FORMATS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}  # of codes, as settings call them
SCALES = 2 * SCALE_BYTES
LEAST = 2.0**-100  # magnitude that a scale is made of: a row of zeros has one, too


def is_quantised(rows: Tensor) -> bool:
    """Whether rows of a pool are codes and scales."""
    return rows.dtype in FORMATS.values()


def head_dim_of(rows: Tensor) -> int:
    """D of rows [..., 2, D], or [..., 2 * D + 4] in 8 bits."""
    return (rows.shape[-1] - SCALES) // 2 if is_quantised(rows) else rows.shape[-1]


def row_of(key: Tensor, value: Tensor, pool: Tensor) -> Tensor:
    """K and V [..., D] as rows of a pool: [..., 2, D], or quantised [..., 2 * D + 4]."""
    numbers = torch.stack((key, value), dim=-2)
    return quantise(numbers, pool.dtype) if is_quantised(pool) else numbers.to(pool.dtype)


def quantise(numbers: Tensor, codes: torch.dtype) -> Tensor:
    """Rows [..., 2 * D + 4] of K and V [..., 2, D], a scale for each."""
    numbers = numbers.float()
    scales = _scales(numbers.abs().amax(-1), codes)
    scaled = numbers / scales[..., None]
    if codes == torch.int8:
        scaled = scaled.round_().clamp_(-127, 127)
    return torch.cat((scaled.to(codes).flatten(-2), scales.to(torch.bfloat16).view(codes)), dim=-1)


def dequantise(rows: Tensor, out: Tensor) -> Tensor:
    """K and V of rows [..., 2 * D + 4], written to [..., 2, D]; or K alone, to [..., 1, D]."""
    parts, head_dim = out.shape[-2:]
    scales = rows[..., rows.shape[-1] - SCALES :].view(torch.bfloat16)[..., :parts]
    codes = rows[..., : parts * head_dim].unflatten(-1, (parts, head_dim))
    if codes.dtype == torch.float8_e4m3fn and codes.device.type == "cpu":
        # Eight times as fast as its conversion: as float16 the same bits are the number over 256.
        bits = codes.view(torch.int8).to(torch.int16)
        codes, scales = ((bits & 0x7F) << 7 | (bits & -0x8000)).view(torch.float16), scales.float() * 256
    return out.copy_(codes).mul_(scales[..., None])


def keys_of(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys [..., D] of rows of a pool, dequantised to a number format where they have to be."""
    if not is_quantised(rows):
        return rows[..., 0, :]
    return dequantise(rows, rows.new_empty((*rows.shape[:-1], 1, head_dim_of(rows)), dtype=dtype)).squeeze(-2)


def as_stored(key: Tensor, value: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
    """New K and V [..., D] as they will be read from a pool, so that it makes no difference from where attention takes them."""
    if not is_quantised(pool):
        return key, value
    read = dequantise(row_of(key, value, pool), key.new_empty((*key.shape[:-1], 2, key.shape[-1])))
    return read[..., 0, :], read[..., 1, :]


def _scales(most: Tensor, codes: torch.dtype) -> Tensor:
    """Scales, float32 and exact in bfloat16, of numbers of at most these magnitudes float32."""
    finite, most = most.isfinite(), most.clamp(min=LEAST)
    if codes == torch.int8:
        bits = ((most * (1 / 127)).view(torch.int32) + 0xFFFF) & -0x10000
    else:  # the greatest code, 448, is 1.75 * 2^8: above 1.75 the next power of two has to serve
        bits = ((most.view(torch.int32) + 0x1FFFFF) & 0x7F800000) - (8 << 23)
    return bits.view(torch.float32).masked_fill_(~finite, torch.nan)

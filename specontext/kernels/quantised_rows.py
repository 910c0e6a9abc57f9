"""Rows of KV in 8 bits: how numbers become codes with a scale, and codes numbers.

A row is [2, D] numbers in the model's format; or 2 * D + 4 bytes, and the number format is that of the codes:

    codes of K, D | codes of V, D | scale of K, bfloat16 | scale of V, bfloat16            260 bytes at D = 128
    codes of a latent, D | its scale | its scale                                           580 bytes at D = 576

In a pool the codes of a page lie before its scales (`spans.py`). A number is its code times the scale. Of int8 the
scale is the greatest magnitude over 127. float8_e4m3 has a mantissa of three bits wherever the scale puts a number, and a key
loses mostly what its few greatest numbers lose; so of `SCALES_TRIED` scales that divide an octave the one is taken whose greatest
error is least. Of a key or value that is not finite the scale is no number, and so is all that is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.spans import CODES
from specontext.kernels.tables import is_quantised
from specontext.layer_sizes import SCALE_BYTES

FORMATS = dict(zip(("fp8", "int8"), CODES, strict=True))  # as settings call them
SCALES = 2 * SCALE_BYTES
LEAST = 2.0**-100  # magnitude that a scale is made of: a row of zeros has one, too
SCALES_TRIED = 8


def quantise(numbers: Tensor, codes: torch.dtype) -> Tensor:
    """Rows [..., 2 * D + 4] of K and V [..., 2, D], a scale for each; [..., D + 4] of latents [..., 1, D]."""
    numbers = numbers.float()
    most = numbers.abs().amax(-1, keepdim=True)
    finite, most = most.isfinite(), most.clamp(min=LEAST)
    scales = (most * (1 / 127)).bfloat16().float() if codes == torch.int8 else _scales_of_fp8(numbers, most)
    scaled = numbers * (1 / scales)
    if codes == torch.int8:
        scaled = scaled.round_().clamp_(-127, 127)
    scales = scales.masked_fill_(~finite, torch.nan).squeeze(-1).to(torch.bfloat16)
    scales = scales.repeat_interleave(2 // scales.shape[-1], -1)  # of a latent twice
    return torch.cat((scaled.to(codes).flatten(-2), scales.view(codes)), dim=-1)


def _scales_of_fp8(numbers: Tensor, most: Tensor) -> Tensor:
    """Scales [..., 1], exact in bfloat16, of numbers [..., D] of at most these magnitudes [..., 1]."""
    best = torch.zeros_like(most)
    least = torch.full_like(most, torch.inf)
    for i in range(SCALES_TRIED):
        scales = (most * (2.0 ** (i / SCALES_TRIED) / 448)).bfloat16().float()
        scaled = numbers * (1 / scales)
        bits = scaled.view(
            torch.int32
        )  # to three bits of a mantissa, ties to even; smaller numbers than normal ones do not matter
        rounded = ((bits + 0x7FFFF + (bits >> 20 & 1)) & -0x100000).view(torch.float32)
        error = (rounded - scaled).abs_().amax(-1, keepdim=True) * scales
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return torch.where(best > 0, best, most / 448)


def dequantise(rows: Tensor, out: Tensor) -> Tensor:
    """K and V of rows [..., 2 * D + 4], written to [..., 2, D]; or K alone, or latents of [..., D + 4], to [..., 1, D]."""
    parts, head_dim = out.shape[-2:]
    scales = rows[..., rows.shape[-1] - SCALES :].view(torch.bfloat16)[..., :parts]
    codes = rows[..., : parts * head_dim].unflatten(-1, (parts, head_dim))
    if codes.dtype == torch.float8_e4m3fn and codes.device.type == "cpu":
        # Eight times as fast as its conversion: as float16 the same bits are the number over 256.
        bits = codes.view(torch.int8).to(torch.int16)
        codes, scales = ((bits & 0x7F) << 7 | (bits & -0x8000)).view(torch.float16), scales.float() * 256
    return out.copy_(codes).mul_(scales[..., None])


def dequantised(rows: Tensor, like: Tensor) -> Tensor:
    """Rows in 8 bits [..., row] as the rows [..., K|V, D] of a pool of numbers hold them, or latents [..., 1, D]."""
    return dequantise(rows, rows.new_empty((*rows.shape[:-1], *like.shape[-2:]), dtype=like.dtype))


def keys_of(rows: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Keys [..., D], or latents, of rows of a pool, dequantised to a number format where they have to be."""
    if not is_quantised(rows):
        return rows[..., 0, :]
    return dequantise(rows, rows.new_empty((*rows.shape[:-1], 1, dim), dtype=dtype)).squeeze(-2)

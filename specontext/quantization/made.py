"""Quantised matrices that are made here: of 16-bit weights when they are loaded, and random ones, in the shape of a format."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from specontext.kernels.quantized_linear import FP8, INT4, INT8, LARGEST_FP8, QuantizedMatrix, packed

GROUP = 128  # columns of a scale of 4-bit weights
MADE = (FP8, INT4)  # what weights are quantised to when they are loaded


@dataclass(frozen=True)
class Form:
    """How matrices of a format are divided.

    Attributes:
        kind: as of `QuantizedMatrix`.
        rows, columns: of a scale; 0 means all.
        zeros: whether each scale has a zero of its own.
        scale_bytes: of a scale.
    """

    kind: str
    rows: int
    columns: int
    zeros: bool = False
    scale_bytes: int = 2

    def fitted(self, n: int, k: int) -> tuple[int, int]:
        """Rows and columns of a scale of a matrix [n, k]. Groups of a row are not cut: those of other widths are smaller."""
        columns = self.columns or k
        return self.rows or n, columns if self.rows > 1 else math.gcd(k, columns)

    def fits(self, k: int) -> bool:
        """Whether matrices with k columns are divided so, in groups that are worth a scale, two codes of 4 bits in a byte."""
        return (self.kind != INT4 or k % 2 == 0) and self.fitted(1, k)[1] >= min(32, self.columns or 32)

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of a matrix [n, k]."""
        rows, columns = self.fitted(n, k)
        scales = -(-n // rows) * -(-k // columns)
        return n * k // (2 if self.kind == INT4 else 1) + scales * (self.scale_bytes + self.zeros)


FORMS = {FP8: Form(FP8, 1, 0, scale_bytes=4), INT4: Form(INT4, 1, GROUP, zeros=True)}


def quantized(weight: Tensor, kind: str) -> QuantizedMatrix:
    """Weights [N, K] rounded to 'fp8', with a scale for each row, or to 'int4', with a scale and a zero for each group of a row.

    A group has 128 columns, or the largest power of two below that divides K.
    """
    n, k = weight.shape
    values = weight.float()
    if kind == FP8:
        scales = (values.abs().amax(dim=1, keepdim=True) / LARGEST_FP8).clamp(min=torch.finfo(torch.float32).tiny)
        codes = (values / scales).clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn)
        return QuantizedMatrix(FP8, codes.view(torch.uint8), scales, 1, k)
    group = FORMS[INT4].fitted(n, k)[1]
    groups = values.view(n, k // group, group)
    low, high = groups.amin(dim=2).clamp(max=0.0), groups.amax(dim=2).clamp(min=0.0)
    least = torch.finfo(torch.float16).tiny
    scales = ((high - low) / 15).clamp(min=least).to(weight.dtype if weight.dtype.itemsize == 2 else torch.float16)
    zeros = (-low / scales.float()).round().clamp(0, 15)
    found = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15)
    return QuantizedMatrix(INT4, packed(found.to(torch.uint8).view(n, k), group), scales, 1, group, zeros.to(torch.uint8))


def random_matrix(form: Form, n: int, k: int, *, deviation: float, dtype: torch.dtype, device: torch.device) -> QuantizedMatrix:
    """Random codes; the numbers that they stand for have about this standard deviation. Drawn from PyTorch's generator.

    Args:
        dtype: of the model, and of scales with two bytes where it has as many.
    """
    rows, columns = form.fitted(n, k)
    table = (-(-n // rows), -(-k // columns))
    narrow = dtype if dtype.itemsize == 2 else torch.float16
    scales = torch.empty(table, dtype=torch.float32 if form.scale_bytes == 4 else narrow, device=device)
    if form.kind == FP8:
        codes = torch.randn((n, k), dtype=torch.bfloat16, device=device).to(torch.float8_e4m3fn).view(torch.uint8)
        return QuantizedMatrix(FP8, codes, scales.fill_(deviation), rows, columns)
    bytes_ = k // 2 if form.kind == INT4 else k
    codes = torch.randint(0, 256, (n, bytes_), dtype=torch.uint8, device=device)
    middle = 8 if form.kind == INT4 else 128
    scales.fill_(deviation * math.sqrt(12) / (2 * middle))  # of numbers that are spread evenly
    zeros = torch.full(table, middle, dtype=torch.uint8, device=device) if form.zeros else None
    assert form.kind in (INT4, INT8)
    return QuantizedMatrix(form.kind, codes, scales, rows, columns, zeros, middle)

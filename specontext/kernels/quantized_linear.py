"""Products with matrices of 8-bit and 4-bit numbers: y = x W^T (+ b), where W is never written out for a few rows of x.

All formats that people download are brought into one form, `QuantizedMatrix`:

    W[n, k] = (code[n, k] - zero[n / rows, k / columns]) * scale[n / rows, k / columns]

with divisions rounded down. A scale for the whole matrix, for each row, for blocks and for groups of a row differ in `rows` and
`columns` alone. Codes, zeros and the products of both are exact in every number format of x; sums and scales are float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from specontext.kernels.dispatch import operation, reference_of

FP8, INT8, INT4 = "fp8", "int8", "int4"
LARGEST_FP8 = 448.0  # of float8_e4m3fn
SCHEMA = (
    "(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? order, Tensor? bias, str kind, int rows, int columns, "
    "int offset) -> Tensor"
)
SCHEMA_OF_SEVERAL = (
    "(Tensor x, Tensor[] codes, Tensor[] scales, Tensor[] zeros, Tensor[] biases, str kind, int[] rows, int columns, int offset) "
    "-> Tensor"
)


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """A matrix [N, K] of codes, as a linear layer has it.

    Attributes:
        kind: what a code is: 'fp8' (the bits of a float8_e4m3fn), 'int8' or 'int4' (unsigned integers).
        codes: uint8 [N, K]; of int4 [N, K / 2], as `packed` packs them.
        scales: [ceil(N / rows), ceil(K / columns)], of any floating-point format.
        zeros: uint8, like scales, of int4 at most 128; None where every zero is `offset`.
        order: int64 [K], the column of x that column k multiplies; None for k itself.
    """

    kind: str
    codes: Tensor
    scales: Tensor
    rows: int
    columns: int
    zeros: Tensor | None = None
    offset: int = 0
    order: Tensor | None = None

    def __post_init__(self) -> None:
        n, k = self.shape
        assert self.codes.dtype == torch.uint8 and self.kind in (FP8, INT8, INT4)
        assert all(tensor.is_contiguous() for tensor in self.tensors.values())
        assert tuple(self.scales.shape) == (-(-n // self.rows), -(-k // self.columns)), (self.scales.shape, self.shape)
        assert self.zeros is None or (self.zeros.shape == self.scales.shape and self.zeros.dtype == torch.uint8)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return int(self.codes.shape[0]), int(self.codes.shape[1]) * (2 if self.kind == INT4 else 1)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that it is made of, by name."""
        named = {"codes": self.codes, "scales": self.scales, "zeros": self.zeros, "order": self.order}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to(self, device: torch.device) -> QuantizedMatrix:
        """The same matrix on a device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, **moved)

    @property
    def group(self) -> int:
        """Columns that kernels take at once; 0 where they do not take the matrix."""
        return group_of(self.shape[1], self.columns)


def group_of(k: int, columns: int) -> int:
    """The power of two, 32 to 128, that divides k columns and those of a scale; 0 for none."""
    return math.gcd(k, 128 if columns >= k else columns, 128) if k % 32 == 0 and (columns >= k or columns % 32 == 0) else 0


def codes_of(matrix: QuantizedMatrix, dtype: torch.dtype) -> Tensor:
    """The numbers [N, K] that the codes stand for, before zeros and scales."""
    if matrix.kind == FP8:
        return matrix.codes.view(torch.float8_e4m3fn).to(dtype)
    if matrix.kind == INT8:
        return matrix.codes.to(dtype)
    n, k = matrix.shape
    bytes_ = matrix.codes.view(n, -1, (matrix.group or k) // 2)
    return torch.stack((bytes_ & 15, bytes_ >> 4), dim=2).view(n, k).to(dtype)


def packed(codes: Tensor, columns: int) -> Tensor:
    """Two codes of 4 bits a byte: uint8 [N, K] to [N, K / 2].

    The low halves of a group's bytes are its first columns, so that kernels read x in order.

    Args:
        columns: of a scale.
    """
    n, k = codes.shape
    low, high = codes.view(n, -1, 2, (group_of(k, columns) or k) // 2).unbind(2)
    return (low | (high << 4)).flatten(1)


@operation("matrix.codes")
def dequantized(matrix: QuantizedMatrix, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K], its columns in the order of x's, in a number format; computed in float32, or in float64 for float64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    n, k = matrix.shape
    values = codes_of(matrix, wide)

    def spread(table: Tensor) -> Tensor:
        table = table.to(wide)
        if matrix.rows > 1 and table.shape[0] > 1:
            table = table.repeat_interleave(matrix.rows, dim=0)[:n]
        return table.repeat_interleave(matrix.columns, dim=1)[:, :k] if table.shape[1] > 1 else table

    if matrix.zeros is not None:
        values -= spread(matrix.zeros)
    elif matrix.offset:
        values -= matrix.offset
    values = (values * spread(matrix.scales)).to(dtype)
    return values if matrix.order is None else torch.empty_like(values).index_copy_(1, matrix.order, values)


@operation("x")
def product(x: Tensor, matrix: QuantizedMatrix, bias: Tensor | None) -> Tensor:
    """x W^T + b, for x [M, K] -> [M, N] in the format of x."""
    return torch.nn.functional.linear(x, dequantized(matrix, x.dtype), bias)


@operation("x")
def products(x: Tensor, matrices: Sequence[QuantizedMatrix], biases: Sequence[Tensor] | None) -> Tensor:
    """x W^T (+ b) of matrices one beside the other, for x [M, K] -> [M, N1 + N2 + ..] in the format of x.

    The matrices are alike but for their rows, and those for which a scale stands: `rows` of tables with more than one row are
    equal.
    """
    each: Sequence[Tensor | None] = biases or (None,) * len(matrices)
    return torch.cat([product(x, matrix, bias) for matrix, bias in zip(matrices, each, strict=True)], dim=1)


@torch.library.custom_op("specontext::quantized_linear", mutates_args=(), schema=SCHEMA)
def quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    kind: str,
    rows: int,
    columns: int,
    offset: int,
) -> Tensor:
    """`product` of x [.., K] and the matrix that the others make: [.., N].

    For torch.compile it is one operation into which it does not look; gradients pass it to x.
    """
    matrix = QuantizedMatrix(kind, codes, scales, rows, columns, zeros, offset, order)
    return product(x.reshape(-1, x.shape[-1]), matrix, bias).view(*x.shape[:-1], codes.shape[0])


@quantized_linear.register_fake
def _(x, codes, scales, zeros, order, bias, kind, rows, columns, offset):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    codes, scales, zeros, order, _, kind, rows, columns, offset = inputs[1:]
    ctx.matrix = QuantizedMatrix(kind, codes, scales, rows, columns, zeros, offset, order)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    """Of x alone: codes are not trained, nor is a bias beside them. A compiler looks into it, so no kernel of ours is in it."""
    return (grad @ reference_of(dequantized)(ctx.matrix, grad.dtype), *(None,) * 9)


quantized_linear.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("specontext::quantized_linears", mutates_args=(), schema=SCHEMA_OF_SEVERAL)
def quantized_linears(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    biases: Sequence[Tensor],
    kind: str,
    rows: Sequence[int],
    columns: int,
    offset: int,
) -> Tensor:
    """`products` of x [.., K] and the matrices that the others make; without zeros and biases where lists of them are empty."""
    parts = zip(codes, scales, zeros or (None,) * len(codes), rows, strict=True)
    matrices = [QuantizedMatrix(kind, c, s, r, columns, z, offset) for c, s, z, r in parts]
    made = products(x.reshape(-1, x.shape[-1]), matrices, biases or None)
    return made.view(*x.shape[:-1], made.shape[1])


@quantized_linears.register_fake
def _(x, codes, scales, zeros, biases, kind, rows, columns, offset):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], sum(one.shape[0] for one in codes)))

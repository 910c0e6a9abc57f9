"""Products with the matrices of experts, codes of 8 or 4 bits each, of which every row of x goes to a few that it chose.

The matrices [N, K] of a table's experts lie one behind the other: they are one `QuantizedMatrix` [experts * N, K], in which no
scale reaches from one expert into the next.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from specontext.kernels.dispatch import operation
from specontext.kernels.quantized_linear import INT4, QuantizedMatrix, dequantized

CODES = "Tensor codes, Tensor scales, Tensor? zeros, str kind, int rows, int columns, int offset, int experts"


def expert_of(matrix: QuantizedMatrix, experts: int, number: int) -> QuantizedMatrix:
    """One expert's matrix [N, K]; nothing is copied."""

    def own(table: Tensor) -> Tensor:
        return table.view(experts, -1, table.shape[1])[number]

    zeros = None if matrix.zeros is None else own(matrix.zeros)
    return replace(matrix, codes=own(matrix.codes), scales=own(matrix.scales), zeros=zeros)


@operation("x")
def chosen_products(x: Tensor, chosen: Tensor, matrix: QuantizedMatrix, experts: int) -> Tensor:
    """Rows of x [M, K] times the matrices of the experts that each chose, int64 [M, C]: [M, C, N] in the format of x.

    One expert is written out at a time.
    """
    result = x.new_empty((*chosen.shape, matrix.shape[0] // experts))
    for number in range(experts):
        rows, places = (chosen == number).nonzero(as_tuple=True)
        if len(rows):
            result[rows, places] = x[rows] @ dequantized(expert_of(matrix, experts, number), x.dtype).T
    return result


@torch.library.custom_op("specontext::quantized_experts", mutates_args=(), schema=f"(Tensor x, Tensor chosen, {CODES}) -> Tensor")
def quantized_experts(
    x: Tensor,
    chosen: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    rows: int,
    columns: int,
    offset: int,
    experts: int,
) -> Tensor:
    """`chosen_products` with the matrix that the others make; for torch.compile one operation, whose gradients pass to x."""
    return chosen_products(x, chosen, QuantizedMatrix(kind, codes, scales, rows, columns, zeros, offset), experts)


@quantized_experts.register_fake
def _(x, chosen, codes, scales, zeros, kind, rows, columns, offset, experts):  # type: ignore[no-untyped-def]
    return x.new_empty((*chosen.shape, codes.shape[0] // experts))


@torch.library.custom_op(
    "specontext::quantized_experts_backward", mutates_args=(), schema=f"(Tensor grad, Tensor chosen, {CODES}) -> Tensor"
)
def _gradient(
    grad: Tensor,
    chosen: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    kind: str,
    rows: int,
    columns: int,
    offset: int,
    experts: int,
) -> Tensor:
    """What x [M, K] has of a gradient [M, C, N]."""
    matrix = QuantizedMatrix(kind, codes, scales, rows, columns, zeros, offset)
    found = grad.new_zeros((len(grad), matrix.shape[1]))
    for number in range(experts):
        row, place = (chosen == number).nonzero(as_tuple=True)
        if len(row):
            found.index_add_(0, row, grad[row, place] @ dequantized(expert_of(matrix, experts, number), grad.dtype))
    return found


@_gradient.register_fake
def _(grad, chosen, codes, scales, zeros, kind, rows, columns, offset, experts):  # type: ignore[no-untyped-def]
    return grad.new_empty((grad.shape[0], codes.shape[1] * (2 if kind == INT4 else 1)))


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.others = inputs[1:]


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    """Of x alone: neither codes nor choices are trained by it."""
    return (_gradient(grad, *ctx.others), *(None,) * 9)


quantized_experts.register_autograd(_backward, setup_context=_keep)

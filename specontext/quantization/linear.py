"""Weights that stay quantised in a model: linear layers in place of nn.Linear, and tables of experts in place of parameters."""

from __future__ import annotations

from torch import Tensor, nn

from specontext.kernels.quantized_experts import quantized_experts
from specontext.kernels.quantized_linear import QuantizedMatrix, quantized_linear


class Codes(nn.Module):
    """A quantised matrix; its tensors are buffers, since nothing trains them.

    Codes are bytes whatever they stand for, so changing the number format of a model leaves them alone.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None

    def __init__(self, matrix: QuantizedMatrix) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        self.kind, self.rows, self.columns, self.offset = matrix.kind, matrix.rows, matrix.columns, matrix.offset
        for name in ("codes", "scales", "zeros", "order"):
            self.register_buffer(name, getattr(matrix, name))

    @property
    def numbers(self) -> int:
        """How many parameters it has, as codes and beside them."""
        return self.out_features * self.in_features

    @property
    def matrix(self) -> QuantizedMatrix:
        return QuantizedMatrix(self.kind, self.codes, self.scales, self.rows, self.columns, self.zeros, self.offset, self.order)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


class QuantizedLinear(Codes):
    """y = x W^T (+ b)."""

    bias: Tensor | None

    def __init__(self, matrix: QuantizedMatrix, bias: Tensor | None) -> None:
        super().__init__(matrix)
        self.register_buffer("bias", bias)

    @property
    def numbers(self) -> int:
        """See `Codes.numbers`."""
        return super().numbers + (0 if self.bias is None else self.bias.numel())

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.codes, self.scales, self.zeros, self.order
        return quantized_linear(x, *matrix, self.bias, self.kind, self.rows, self.columns, self.offset)


class QuantizedExperts(Codes):
    """The matrices of a table's experts, one behind the other: rows of x [M, K] and the experts that each chose, int64 [M, C], to
    [M, C, N]."""

    def __init__(self, matrix: QuantizedMatrix, experts: int) -> None:
        super().__init__(matrix)
        self.experts = experts

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        matrix = self.codes, self.scales, self.zeros
        return quantized_experts(x, chosen, *matrix, self.kind, self.rows, self.columns, self.offset, self.experts)

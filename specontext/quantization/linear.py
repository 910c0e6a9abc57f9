"""A linear layer whose weights stay quantised, in place of nn.Linear."""

from __future__ import annotations

from torch import Tensor, nn

from specontext.kernels.quantized_linear import QuantizedMatrix, quantized_linear


class QuantizedLinear(nn.Module):
    """y = x W^T (+ b); its tensors are buffers, since nothing trains them.

    Codes are bytes whatever they stand for, so changing the number format of a model leaves them alone.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    bias: Tensor | None

    def __init__(self, matrix: QuantizedMatrix, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        self.kind, self.rows, self.columns, self.offset = matrix.kind, matrix.rows, matrix.columns, matrix.offset
        for name in ("codes", "scales", "zeros", "order"):
            self.register_buffer(name, getattr(matrix, name))
        self.register_buffer("bias", bias)

    @property
    def matrix(self) -> QuantizedMatrix:
        return QuantizedMatrix(self.kind, self.codes, self.scales, self.rows, self.columns, self.zeros, self.offset, self.order)

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.codes, self.scales, self.zeros, self.order
        return quantized_linear(x, *matrix, self.bias, self.kind, self.rows, self.columns, self.offset)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"

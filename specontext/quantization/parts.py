"""Parts of quantised matrices, such as ranks have: some rows or some columns, in the same codes.

A scale that a border runs through stands in both parts, so a part is what the whole matrix has there, number for number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from specontext.kernels.quantized_linear import INT4, QuantizedMatrix, codes_of, group_of, packed


def some_rows(matrix: QuantizedMatrix, pieces: Sequence[slice]) -> QuantizedMatrix:
    """The rows of these pieces, one piece behind the other.

    Args:
        pieces: consecutive rows each, in their order.
    """
    rows = sum(piece.stop - piece.start for piece in pieces)
    codes = torch.cat([matrix.codes[piece] for piece in pieces])
    if len(matrix.scales) == 1:
        return replace(matrix, codes=codes, rows=rows)
    borders = [edge for piece in pieces for edge in (piece.start, piece.stop)]
    fine = math.gcd(matrix.rows, *borders[:-1])  # a block may be cut short where all ends

    def table(values: Tensor) -> Tensor:
        spread = values.repeat_interleave(matrix.rows // fine, dim=0)
        return torch.cat([spread[piece.start // fine : -(-piece.stop // fine)] for piece in pieces])

    zeros = None if matrix.zeros is None else table(matrix.zeros)
    return replace(matrix, codes=codes, scales=table(matrix.scales), zeros=zeros, rows=fine)


def some_columns(matrix: QuantizedMatrix, own: slice) -> QuantizedMatrix | None:
    """Consecutive columns; None where these are no matrix in groups that kernels take: where the columns stand in another order
    than those of x, or a border leaves groups that are too narrow."""
    width = own.stop - own.start
    single = matrix.scales.shape[1] == 1
    fine = width if single else math.gcd(matrix.columns, own.start)
    if matrix.order is not None or not group_of(width, fine):
        return None
    codes = matrix.codes[:, own].contiguous() if matrix.kind != INT4 else packed(codes_of(matrix, torch.uint8)[:, own], fine)

    def table(values: Tensor) -> Tensor:
        if single:
            return values
        spread = values.repeat_interleave(matrix.columns // fine, dim=1)
        return spread[:, own.start // fine : -(-own.stop // fine)].contiguous()

    zeros = None if matrix.zeros is None else table(matrix.zeros)
    return replace(matrix, codes=codes, scales=table(matrix.scales), zeros=zeros, columns=fine)


def joined(matrices: Sequence[QuantizedMatrix]) -> QuantizedMatrix | None:
    """Matrices as one, each below the one before, with no scale that reaches from one into the next; None where they do not go
    together: of several kinds, widths or groups, or with columns in another order than those of x."""
    first = matrices[0]
    if any(one.order is not None or _form(one) != _form(first) for one in matrices):
        return None
    fine = math.gcd(*(size for one in matrices for size in (one.rows, one.shape[0])))

    def table(values: Tensor, one: QuantizedMatrix) -> Tensor:
        spread = values.repeat_interleave(one.rows // fine, dim=0) if one.rows > fine else values
        return spread[: one.shape[0] // fine]

    zeros = None
    if any(one.zeros is not None or one.offset != first.offset for one in matrices):
        each = [
            torch.full_like(one.scales, one.offset, dtype=torch.uint8) if one.zeros is None else one.zeros for one in matrices
        ]
        zeros = torch.cat([table(values, one) for values, one in zip(each, matrices, strict=True)])
    scales = torch.cat([table(one.scales, one) for one in matrices])
    return replace(first, codes=torch.cat([one.codes for one in matrices]), scales=scales, zeros=zeros, rows=fine)


def _form(matrix: QuantizedMatrix) -> tuple[str, int, int]:
    """What must be the same for codes to lie in one table."""
    return matrix.kind, matrix.shape[1], matrix.columns

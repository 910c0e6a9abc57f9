"""When two ways of computing the same give other results, and not only other roundings."""

from __future__ import annotations

from torch import Tensor

# Largest relative difference, of what a part gets and of what it gives: in float32, and in 16 bits, where results of one
# product may differ in the last bit and attention rounds its weights.
TOLERANCE = {4: (1e-3, 1e-2), 2: (2e-2, 6e-2)}


def of_states(like: Tensor) -> float:
    """For what a part gets."""
    return TOLERANCE[4 if like.dtype.itemsize >= 4 else 2][0]


def of_outputs(like: Tensor) -> float:
    """For what it gives."""
    return TOLERANCE[4 if like.dtype.itemsize >= 4 else 2][1]


def differ(mine: Tensor, theirs: Tensor, tolerance: float) -> bool:
    """Whether two tensors differ by more than a share of the second's norm, over the numbers that are finite in both."""
    if mine.shape != theirs.shape:
        return True
    a, b = mine.float(), theirs.float()
    finite = a.isfinite() & b.isfinite()
    a, b = a.where(finite, 0.0), b.where(finite, 0.0)
    return bool((a - b).norm() > tolerance * b.norm())

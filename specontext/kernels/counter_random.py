"""Counter-based random numbers: a hash of integers, so that nothing but its key decides a number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


def mix(x: Tensor) -> Tensor:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014) on int64, whose products wrap around."""
    x = (x ^ logical_shift(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ logical_shift(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ logical_shift(x, 31)


def logical_shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def combine_keys(parts: Sequence[Tensor]) -> Tensor:
    """One int64 key from several int64 tensors that broadcast together."""
    key = torch.zeros_like(parts[0])
    for part in parts:
        key = mix((key ^ part) + _GOLDEN)
    return key


def counter_uniform(key: Tensor, counter: Tensor) -> Tensor:
    """Numbers strictly between 0 and 1, float64, for int64 keys and counters that broadcast together."""
    bits = logical_shift(mix(key + (counter + 1) * _GOLDEN), 12)  # 52 bits, so that adding a half stays exact and below 1
    return (bits.double() + 0.5) * 2.0**-52

"""Integers of a few bits out of the int32 words that checkpoints pack them into."""

from __future__ import annotations

import torch
from torch import Tensor

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # place in a word of columns 0 .. 7


def unpacked(words: Tensor, bits: int, count: int, *, dim: int) -> Tensor:
    """uint8 of the first `count` numbers that lie one after the other in the words along a dimension, lowest bits first.

    Numbers whose bits do not divide 32 reach from one word into the next, as compressed-tensors has them.
    """
    words, last = words.movedim(dim, -1), 2**bits - 1
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
        spread = ((words[..., None] >> shifts) & last).to(torch.uint8)
        return spread.flatten(-2)[..., :count].movedim(-1, dim)
    places = torch.arange(count, device=words.device) * bits
    first, shift = places // 32, places % 32
    wide = words.to(torch.int64) & 0xFFFFFFFF
    after = (first + 1).clamp(max=words.shape[-1] - 1)
    both = (wide.index_select(-1, first) >> shift) | (wide.index_select(-1, after) << (32 - shift))
    return (both & last).to(torch.uint8).movedim(-1, dim)


def unpacked_awq(words: Tensor) -> Tensor:
    """uint8 [R, 8 C] of AWQ's int32 [R, C], whose columns are interleaved within a word."""
    shifts = torch.tensor(AWQ_ORDER, device=words.device) * 4
    return ((words[..., None] >> shifts) & 15).to(torch.uint8).flatten(-2)

"""Runs of consecutive tokens that are read as a whole: pages and chunks.

Blocks are counted from the end of the sinks, which are read in any case. So only the last block can be cut, by the recent window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.top_k import top_k_positions


def whole_blocks(weights: Tensor, size: int, first: int, ends: Tensor, room: int) -> Tensor:
    """Tokens of the best blocks, as many as fit whole; of equal blocks the later one is better.

    Args:
        weights: float [R, G, N], not negative; -1 for blocks that no candidate is in.
        size: tokens of a block.
        first: first candidate, where block 0 begins.
        ends: int64 [R], end of the candidates; the block in which it lies counts with its candidates only.
        room: tokens that may be chosen.

    Returns:
        int64 [R, G, room]: ascending positions, then -1.
    """
    fit = room // size
    blocks = top_k_positions(weights, fit + 1)  # one more fits, if one of them is short
    left = ends[:, None, None] - first - blocks * size
    counts = torch.where(blocks >= 0, left.clamp(0, size), 0)
    best = torch.nn.functional.pad(top_k_positions(weights, fit), (0, 1), value=-1) if fit else torch.full_like(blocks, -1)
    blocks = torch.where(counts.sum(-1, keepdim=True) <= room, blocks, best)
    tokens = first + blocks[..., None] * size + torch.arange(size, device=blocks.device)
    there = (blocks[..., None] >= 0) & (tokens < ends[:, None, None, None])
    return torch.where(there, tokens, -1).flatten(-2)[..., :room]


def candidate_blocks(ends: Tensor, size: int, first: int) -> Tensor:
    """Blocks that hold candidates: int64 [R]."""
    return (ends - first + size - 1) // size


def place_of(positions: Tensor, seats: Tensor, size: int, first: int, nowhere: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where new tokens belong: row of the state, block, and place in it, int64 [R] each; the row `nowhere` for sinks."""
    place = positions - first
    return torch.where(place >= 0, seats, nowhere), place.clamp(min=0) // size, place.clamp(min=0) % size

"""Blocks of consecutive tokens, which methods know by a summary of their keys and read as a whole: pages and chunks.

Blocks are counted from the end of the sinks, which are read in any case. So only the last block can be cut, by the recent window.
Their summaries are kept by seat; the row behind the last seat belongs to no request, and takes what is to be dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.dispatch import operation
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
    blocks = top_k_positions(weights, room // size + 1)  # one more fits, if one of them is short
    return tokens_of_blocks(blocks, weights, size, first, ends, room)


@operation(decided_by="weights")
def tokens_of_blocks(blocks: Tensor, weights: Tensor, size: int, first: int, ends: Tensor, room: int) -> Tensor:
    """Candidates in some blocks; where they are more than there is room for, the worst block is left out.

    Args:
        blocks: int64 [R, G, room // size + 1], ascending, then -1 where there is none.
        weights, size, first, ends, room: as in `whole_blocks`.

    Returns:
        int64 [R, G, room]: ascending positions, then -1.
    """
    there = blocks >= 0
    counts = torch.where(there, (ends[:, None, None] - first - blocks * size).clamp(0, size), 0)
    weight = torch.where(there, weights.gather(-1, blocks.clamp(min=0)), torch.inf)
    worst = weight.argmin(-1, keepdim=True)  # the first of equal ones
    left_out = torch.where(counts.sum(-1, keepdim=True) > room, worst, blocks.shape[-1])
    place = torch.arange(room, device=blocks.device).expand(*blocks.shape[:2], -1)
    number = place // size
    number = number + (number >= left_out)
    block = torch.where(number < blocks.shape[-1], blocks.gather(-1, number.clamp(max=blocks.shape[-1] - 1)), -1)
    tokens = first + block * size + place % size
    return torch.where((block >= 0) & (tokens < ends[:, None, None]), tokens, -1)


@operation(decided_by="bounds")
def follow_bounds(bounds: Tensor, key: Tensor, positions: Tensor, seats: Tensor, size: int, first: int) -> None:
    """Widen the bounds of the blocks in which new tokens lie, one a request; a block's first token sets them.

    Args:
        bounds: [seats + 1, Hkv, N, 2, D]: maximum and minimum of the keys of each block, changed in place.
        key: [R, Hkv, D].
        positions, seats: int64 [R]; tokens before `first` are dropped.
        size: tokens of a block.
        first: position where block 0 begins.
    """
    rows, blocks, places = _place_of(positions, seats, size, first, len(bounds) - 1)
    known, begins = bounds[rows, :, blocks], (places == 0)[:, None, None]  # known [R, Hkv, 2, D]
    high = torch.where(begins, key, torch.maximum(known[:, :, 0], key))
    low = torch.where(begins, key, torch.minimum(known[:, :, 1], key))
    bounds[rows, :, blocks] = torch.stack((high, low), dim=2)


@operation(decided_by="means")
def follow_means(means: Tensor, sums: Tensor, key: Tensor, positions: Tensor, seats: Tensor, size: int, first: int) -> None:
    """Add new tokens, one a request, to the means of the blocks in which they lie.

    Args:
        means: [seats + 1, Hkv, N, D], of the keys of each block, changed in place.
        sums: float32 [seats + 1, Hkv, D], of the keys of the last block, changed in place.
        key, positions, seats, size, first: as in `follow_bounds`.
    """
    rows, blocks, places = _place_of(positions, seats, size, first, len(means) - 1)
    places = places[:, None, None]
    total = torch.where(places == 0, 0.0, sums[rows]) + key.float()
    sums[rows] = total
    means[rows, :, blocks] = (total / (places + 1)).to(means.dtype)


def _place_of(positions: Tensor, seats: Tensor, size: int, first: int, nowhere: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row of the summaries, block, and place in it of new tokens, int64 [R] each; the row `nowhere` for what is dropped."""
    place = positions - first
    return torch.where(place >= 0, seats, nowhere), place.clamp(min=0) // size, place.clamp(min=0) % size

"""Exact top-k of long rows in a reproducible order."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_positions(scores: Tensor, k: int) -> Tensor:
    """Positions of the k greatest scores of each row, ascending; equal scores are won by the later position.

    Args:
        scores: float [..., S]; negative scores are never chosen.
        k: at least 1.

    Returns:
        int64 [..., k], padded with -1 at the end where fewer than k scores are not negative.
    """
    span = scores.shape[-1]
    taken = min(k, span)
    least = scores.topk(taken, dim=-1, sorted=True).values[..., -1:].clamp(min=0.0)
    above = scores > least
    equal = scores == least
    room = taken - above.sum(-1, keepdim=True)
    later = equal.flip(-1).cumsum(-1).flip(-1)  # how many equal scores stand here or later
    chosen = above | (equal & (later <= room))
    place = chosen.cumsum(-1) - 1
    out = scores.new_full((*scores.shape[:-1], k + 1), -1, dtype=torch.int64)
    position = torch.arange(span, device=scores.device).expand_as(place)
    # Positions that were not chosen all go to a column beyond the result.
    return out.scatter_(-1, torch.where(chosen, place, k), position)[..., :k]

"""How the scores of several retrieval groups become token sets: one for each group, or one for all (paper, C1)."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.top_k import top_k_positions


def groups_of(granularity: str, groups: int) -> int:
    """Number of token sets that `choose` returns for scores of `groups` groups."""
    return groups if granularity == "head" else 1


def choose(scores: Tensor, granularity: str, k: int) -> Tensor:
    """The tokens of highest score.

    'head': the k best of every group. 'batch': the k best by the greatest score that any group gives. 'union': the best k' of
    every group, k' being the greatest share for which all of them together are at most k tokens; places that are left over
    go to tokens of rank k'.

    Args:
        scores: float [..., G, S]; negative scores are never chosen.

    Returns:
        int64 [..., groups_of(granularity, G), k], ascending positions, padded with -1 at the end.
    """
    if granularity == "head":
        return top_k_positions(scores, k)
    if granularity == "batch":
        return top_k_positions(scores.amax(-2, keepdim=True), k)
    best = top_k_by_rank(scores, k)
    return top_k_positions(best.amax(-2, keepdim=True), k)


def top_k_by_rank(scores: Tensor, k: int) -> Tensor:
    """k for the best token of each row, k - 1 for the next and so on, -1 for tokens beyond the k best.

    Args:
        scores: float [..., S]; among equal scores the later position ranks first, and negative ones are among no best.

    Returns:
        float32 [..., S].
    """
    span = scores.shape[-1]
    chosen = top_k_positions(scores, k).flip(-1)
    present = chosen >= 0
    # A stable sort of the few that were chosen, in reverse order, keeps the later of two equal scores first.
    best = torch.where(present, scores.gather(-1, chosen.clamp(min=0)), -1.0)
    order = chosen.gather(-1, best.argsort(dim=-1, descending=True, stable=True))
    value = torch.arange(k, 0, -1, device=scores.device, dtype=torch.float32).expand(order.shape)
    # What is not there goes to a column beyond the result.
    ranks = torch.full((*scores.shape[:-1], span + 1), -1.0, device=scores.device)
    return ranks.scatter_(-1, torch.where(order >= 0, order, span), value)[..., :span]

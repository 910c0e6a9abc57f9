"""Scores of all keys for one query a head: attention weights, element-wise maximum in a group (paper, section on GQA)."""

from __future__ import annotations

import torch
from torch import Tensor


def retrieval_scores(query: Tensor, keys: Tensor, start: int, stops: Tensor) -> Tensor:
    """Attention weights over the candidates start .. stops[r] - 1, maximised over the query heads of each group.

    The weights are normalised over the candidates only: sinks and recent tokens are read in any case and do not compete.

    Args:
        query: [R, Hq, D].
        keys: [R, S, G, D]; query heads g * Hq / G and up belong to group g.
        start: first candidate.
        stops: int64 [R], end of the candidates of each request.

    Returns:
        float32 [R, G, S]; -1 where there is no candidate.
    """
    requests, query_heads, head_dim = query.shape
    groups = keys.shape[2]
    grouped = query.float().view(requests, groups, query_heads // groups, head_dim)
    logits = grouped @ keys.float().permute(0, 2, 3, 1) * head_dim**-0.5  # [R, G, Hq / G, S]
    return group_weights(logits, start, stops)


def group_weights(logits: Tensor, start: int, stops: Tensor) -> Tensor:
    """Softmax over the candidates, then the maximum over the heads of a group.

    Args:
        logits: float32 [R, G, heads, S], changed in place.
        start, stops: as in `retrieval_scores`.

    Returns:
        float32 [R, G, S]; -1 where there is no candidate.
    """
    position = torch.arange(logits.shape[-1], device=logits.device)
    absent = (position < start) | (position >= stops[:, None])  # [R, S]
    logits.masked_fill_(absent[:, None, None], -torch.inf)
    weights = torch.softmax(logits, dim=-1).nan_to_num_(0.0).amax(2)
    return weights.masked_fill_(absent[:, None], -1.0)

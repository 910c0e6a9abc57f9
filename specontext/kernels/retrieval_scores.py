"""Scores of all keys for one query a head: attention weights, element-wise maximum in a group (paper, section on GQA)."""

from __future__ import annotations

import torch
from torch import Tensor


def retrieval_scores(query: Tensor, keys: Tensor, lengths: Tensor, first_key: int) -> Tensor:
    """Attention weights over all keys, maximised over the query heads of each group.

    Args:
        query: [R, Hq, D].
        keys: [R, S, G, D]; the keys of request r are at first_key .. lengths[r] - 1.
        lengths: int64 [R].
        first_key: first position that has a key.

    Returns:
        float32 [R, G, S]; -1 where there is no key.
    """
    requests, query_heads, head_dim = query.shape
    span, groups = keys.shape[1:3]
    grouped = query.float().view(requests, groups, query_heads // groups, head_dim)
    logits = grouped @ keys.float().permute(0, 2, 3, 1) * head_dim**-0.5  # [R, G, Hq / G, S]
    position = torch.arange(span, device=query.device)
    absent = (position < first_key) | (position >= lengths[:, None])  # [R, S]
    logits.masked_fill_(absent[:, None, None], -torch.inf)
    weights = torch.softmax(logits, dim=-1).nan_to_num_(0.0).amax(2)
    return weights.masked_fill_(absent[:, None], -1.0)

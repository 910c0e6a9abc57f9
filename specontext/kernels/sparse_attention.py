"""Decode attention over rows that an index list names, and the merge of partial results."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_attention(query: Tensor, arena: Tensor, rows: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention of one query a head over the KV rows that `rows` names, visited in that order.

    Args:
        query: [R, Hq, D].
        arena: [N, 2, D], K and V of each row.
        rows: int64 [R, Hkv, B] row indices, -1 is skipped. Query heads h * Hq / Hkv and up read the rows of KV head h.
        scale: factor of the logits.

    Returns:
        output [R, Hq, D] in the query's dtype, and float32 log-sum-exp of the logits [R, Hq], -inf where nothing was read.
    """
    requests, query_heads, head_dim = query.shape
    kv_heads, width = rows.shape[1:]
    skipped = rows < 0
    gathered = arena.index_select(0, rows.clamp(min=0).flatten()).view(requests, kv_heads, width, 2, head_dim)
    grouped = query.view(requests, kv_heads, query_heads // kv_heads, head_dim).float()
    logits = grouped @ gathered[..., 0, :].float().mT * scale  # [R, Hkv, Hq / Hkv, B]
    logits.masked_fill_(skipped[:, :, None], -torch.inf)
    output, lse = weighted_sum(logits, gathered[..., 1, :].float())
    return output.view(requests, query_heads, head_dim).to(query.dtype), lse.view(requests, query_heads)


def weighted_sum(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax-weighted sum of values, and log-sum-exp: zeros and -inf for a row of logits that are all -inf.

    Args:
        logits: float32 [..., Q, S].
        values: float32 [..., S, D].
    """
    top = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = (logits - top).exp_()
    total = weights.sum(-1, keepdim=True)
    output = (weights @ values) / total.clamp(min=torch.finfo(torch.float32).tiny)
    return output, (total.log() + top).squeeze(-1)


def merge_partials(outputs: Tensor, lses: Tensor) -> Tensor:
    """Attention over a union of disjoint parts from the attention over each part (flash-decoding's merge).

    Args:
        outputs: [P, ..., D], one result a part.
        lses: float32 [P, ...].

    Returns:
        [..., D] in the outputs' dtype; zeros where no part read anything.
    """
    weights = torch.softmax(lses.clamp(min=torch.finfo(torch.float32).min), dim=0)
    return (outputs.float() * weights[..., None]).sum(0).to(outputs.dtype)

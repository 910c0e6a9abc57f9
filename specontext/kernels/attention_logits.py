"""Logits of one query a head over rows that an index list names: the true attention, before its softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.dispatch import use_triton
from specontext.kernels.quantised_rows import keys_of
from specontext.kernels.spans import read_rows
from specontext.kernels.tables import is_quantised


def attention_logits(query: Tensor, arena: Tensor, rows: Tensor, scale: float) -> Tensor:
    """Scaled dot products of queries and the keys of rows, accumulated in float32.

    Args:
        query: [R, Hq, D].
        arena: [N, 2, D], K and V of each row, or [N, 1, D], where a row is both; in 8 bits [N, 2 * D + 4] or
            [spans, S, 2 * D + 4], see `spans.py`.
        rows: int64 or int32 [R, Hkv, T], -1 is skipped.

    Returns:
        float32 [R, Hq, T]; -inf where a row is skipped.
    """
    if use_triton(query):
        from specontext.kernels.triton.attention_logits import attention_logits as on_gpu

        return on_gpu(query, arena, rows, scale)
    return attention_logits_reference(query, arena, rows, scale)


def attention_logits_reference(query: Tensor, arena: Tensor, rows: Tensor, scale: float) -> Tensor:
    """`attention_logits` in PyTorch. CPUs have no product of 16-bit numbers with a float32 result, so keys are converted."""
    requests, query_heads, head_dim = query.shape
    kv_heads, width = rows.shape[1:]
    read = arena if is_quantised(arena) else arena[:, :1]
    read = read_rows(read, rows.clamp(min=0).flatten())
    keys = keys_of(read, head_dim, torch.float32).view(requests, kv_heads, width, head_dim)
    grouped = query.float().reshape(requests, kv_heads, query_heads // kv_heads, head_dim) * scale
    logits = grouped @ keys.float().mT
    return logits.masked_fill_((rows < 0)[:, :, None], -torch.inf).view(requests, query_heads, width)

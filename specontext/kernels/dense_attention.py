"""Dense attention of a chunk of queries over a tile of keys, with the log-sum-exp that merges tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.sparse_attention import weighted_sum


def dense_attention_tile(query: Tensor, tile: Tensor, scale: float, past: int | None = None) -> tuple[Tensor, Tensor]:
    """Attention of C queries over one tile of T tokens.

    Args:
        query: [C, Hq, D].
        tile: [T, Hkv, 2, D], K and V of consecutive tokens.
        scale: factor of the logits.
        past: None when every query sees the whole tile; else query i sees the tile's tokens 0 .. past + i.

    Returns:
        output [C, Hq, D] float32 and log-sum-exp [C, Hq] float32.
    """
    chunk, query_heads, head_dim = query.shape
    kv_heads = tile.shape[1]
    grouped = query.float().view(chunk, kv_heads, query_heads // kv_heads, head_dim).permute(1, 2, 0, 3)
    keys, values = tile.float().permute(2, 1, 0, 3)[:, :, None].unbind(0)  # each [Hkv, 1, T, D]
    logits = (grouped * scale) @ keys.mT  # [Hkv, Hq / Hkv, C, T]
    if past is not None:
        visible = torch.ones(chunk, tile.shape[0], dtype=torch.bool, device=query.device).tril(past)
        logits.masked_fill_(~visible, -torch.inf)
    output, lse = weighted_sum(logits, values)
    return output.permute(2, 0, 1, 3).reshape(chunk, query_heads, head_dim), lse.permute(2, 0, 1).reshape(chunk, query_heads)

"""Causal attention of a chunk of queries: over the chunk itself, and over tiles of what was stored before it.

Every query of a chunk sees all that is stored, so stored tokens need no mask and each tile is read where it lies; partial
results are merged by their log-sum-exp as they come, and memory stays that of one tile.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from specontext.kernels.fused_attention import as_multiplied, attention_with_lse


def chunk_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, past: Iterable[Tensor] = ()) -> Tensor:
    """Attention of C consecutive tokens over stored ones and, causally, over themselves.

    Args:
        query: [C, Hq, D].
        key, value: [C, Hkv, D], of the chunk itself.
        scale: factor of the logits.
        past: tiles [T, Hkv, 2, D], K and V of the tokens before the chunk, in any number and length above 0.

    Returns:
        [C, Hq, D] in the query's dtype.
    """
    chunk, query_heads, head_dim = query.shape
    kv_heads = key.shape[1]
    heads, keys, values = (x.transpose(0, 1)[None] for x in (query, key, value))  # [1, H, C, D]
    tiles = iter(past)
    tile = next(tiles, None)
    if tile is None:
        return _causal(heads, keys, values, scale)[0].transpose(0, 1)
    heads = heads.contiguous()
    part, lse = attention_with_lse(heads, keys, values, scale, causal=True)
    # The queries of a group are one longer list of queries for the stored tokens, which are not masked.
    folded = heads.view(kv_heads, 1, -1, head_dim)  # [Hkv, 1, Hq / Hkv * C, D]
    output, lse = part.float().reshape(folded.shape), lse.reshape(kv_heads, 1, -1)
    while tile is not None:
        tile = as_multiplied(tile)
        if tile.dtype == torch.float32:
            folded = folded.float()
        keys, values = tile.permute(2, 1, 0, 3)[:, :, None].unbind(0)  # each [Hkv, 1, T, D]
        part, part_lse = attention_with_lse(folded, keys, values, scale)
        output.lerp_(part.float(), torch.sigmoid(part_lse - lse)[..., None])
        lse = torch.logaddexp(lse, part_lse)
        tile = next(tiles, None)
    return output.view(query_heads, chunk, head_dim).transpose(0, 1).to(query.dtype)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    ratio = query.shape[1] // key.shape[1]
    if not query.is_cuda:
        return attention_with_lse(query, key, value, scale, causal=True)[0]
    if query.dtype == torch.float32 and ratio > 1:  # PyTorch has no fused kernel for this, and would write out all logits
        key, value = key.repeat_interleave(ratio, 1), value.repeat_interleave(ratio, 1)
    grouped = query.shape[1] != key.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)

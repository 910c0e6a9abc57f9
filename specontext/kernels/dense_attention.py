"""Causal attention of a chunk of queries: over the chunk itself, and over tiles of what was stored before it.

Every query of a chunk sees all that is stored, so stored tokens need no mask and each tile is read where it lies; partial
results are merged by their log-sum-exp as they come, and memory stays that of one tile. On a GPU 16-bit formats have kernels of
their own (`gpu_chunk.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.fused_attention import as_multiplied, attention_with_lse
from specontext.kernels.gpu_chunk import GpuChunk, regular_kernel, serves
from specontext.kernels.softmax import PLAIN, Softmax, with_sinks


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, softmax: Softmax = PLAIN) -> Tensor:
    """Attention of the first C tokens of a request over themselves.

    Args:
        query: [C, Hq, D].
        key, value: [C, Hkv, D].
        scale: factor of the logits.
        softmax: what becomes of them then.

    Returns:
        [C, Hq, D] in the query's dtype.
    """
    if serves(query) or not softmax.plain:
        return chunk_attention(query, key, value, scale, softmax).result()
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))  # [1, H, C, D]
    return _causal(query, key, value, scale)[0].transpose(0, 1)


def chunk_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softmax: Softmax = PLAIN
) -> ChunkAttention | GpuChunk:
    """Attention of a chunk, to which tiles are to be added: what serves its device and format; see `ChunkAttention`."""
    if serves(query) and softmax.plain:
        return GpuChunk(query, key, value, scale, regular=regular_kernel(query, key))
    return ChunkAttention(query, key, value, scale, softmax)


class ChunkAttention:
    """Attention of C consecutive tokens over themselves, causally, and over stored tokens, whose tiles are added one by one.

    Args:
        query: [C, Hq, D].
        key, value: [C, Hkv, D], of the chunk itself.
        scale: factor of the logits.
        softmax: what becomes of them then.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, scale: float, softmax: Softmax = PLAIN) -> None:
        self._softmax = softmax
        self._scale, self._shape, self._dtype = scale, query.shape, query.dtype
        kv_heads, head_dim = key.shape[1:]
        heads, keys, values = (x.transpose(0, 1)[None] for x in (query, key, value))  # [1, H, C, D]
        heads = heads.contiguous()
        part, lse = attention_with_lse(heads, keys, values, scale, causal=True, cap=softmax.cap)
        # The queries of a group are one longer list of queries for the stored tokens, which are not masked.
        self._folded = heads.view(kv_heads, 1, -1, head_dim)  # [Hkv, 1, Hq / Hkv * C, D]
        self._output, self._lse = part.float().reshape(self._folded.shape), lse.reshape(kv_heads, 1, -1)

    def add(self, tile: Tensor) -> None:
        """Attend to the rows [T, Hkv, *row] of T tokens, at least one, before the chunk."""
        tile = as_multiplied(tile, self._folded.shape[-1], self._dtype)
        if tile.dtype == torch.float32:
            self._folded = self._folded.float()
        heads = tile.transpose(0, 1)[:, None]  # [Hkv, 1, T, K|V, D]
        keys, values = heads.select(3, 0), heads.select(3, -1)
        part, lse = attention_with_lse(self._folded, keys, values, self._scale, cap=self._softmax.cap)
        self._output.lerp_(part.float(), torch.sigmoid(lse - self._lse)[..., None])
        self._lse = torch.logaddexp(self._lse, lse)

    def result(self) -> Tensor:
        """[C, Hq, D] in the query's dtype."""
        chunk, query_heads, head_dim = self._shape
        output = self._output.view(query_heads, chunk, head_dim).transpose(0, 1)
        return with_sinks(output, self._lse.view(query_heads, chunk).T, self._softmax).to(self._dtype)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    ratio = query.shape[1] // key.shape[1]
    if not query.is_cuda:
        return attention_with_lse(query, key, value, scale, causal=True)[0]
    if query.dtype == torch.float32 and ratio > 1:  # PyTorch has no fused kernel for this, and would write out all logits
        key, value = key.repeat_interleave(ratio, 1), value.repeat_interleave(ratio, 1)
    grouped = query.shape[1] != key.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)

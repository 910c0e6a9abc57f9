"""Attention of a chunk of queries in a layer with a window: over the chunk itself and the stored tokens that the window reaches.

Queries go in blocks, and each block reads the keys from its first query's window on: so products grow with the window and not
with the chunk. Inside of a block a mask says what each query sees.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from specontext.kernels.dense_attention import causal_attention
from specontext.kernels.fused_attention import weighted_sum
from specontext.kernels.softmax import PLAIN, Softmax, capped, with_sinks
from specontext.layer_sizes import Window

BLOCK = 512  # queries
MOST_LOGITS = 1 << 24  # of a block, where they are written out


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: Window,
    start: int = 0,
    softmax: Softmax = PLAIN,
) -> Tensor:
    """Attention of the last C of some consecutive tokens over the tokens of their windows.

    Args:
        query: [C, Hq, D].
        key, value: [P + C, Hkv, D], of the chunk and of the P tokens before it, which hold all that its windows reach.
        scale: factor of the logits.
        start: position of the first key.
        softmax: what becomes of the logits then.

    Returns:
        [C, Hq, D] in the query's dtype.
    """
    chunk, query_heads, _ = query.shape
    before = len(key) - chunk
    if not before and window.first(start + chunk - 1) <= start:  # the window leaves nothing out
        return causal_attention(query, key, value, scale, softmax)
    output = torch.empty_like(query)
    for first, stop in _blocks(chunk, query_heads, window.size, written=not softmax.plain):
        begin = max(0, window.first(start + before + first) - start)
        end = before + stop
        places = torch.arange(before + first, end, device=query.device)[:, None] + start
        keys = torch.arange(begin, end, device=query.device) + start
        seen = (keys <= places) & (keys >= window.first(places))  # [Q, S]
        output[first:stop] = _masked(query[first:stop], key[begin:end], value[begin:end], scale, seen, softmax)
    return output


def _blocks(chunk: int, query_heads: int, size: int, *, written: bool) -> Iterator[tuple[int, int]]:
    most = BLOCK
    while written and most > 16 and most * (most + size) * query_heads > MOST_LOGITS:
        most //= 2
    return ((first, min(first + most, chunk)) for first in range(0, chunk, most))


def _masked(query: Tensor, key: Tensor, value: Tensor, scale: float, seen: Tensor, softmax: Softmax) -> Tensor:
    """Attention of queries [Q, Hq, D] over the keys [S, Hkv, D] that each of them sees, bool [Q, S]."""
    kv_heads = key.shape[1]
    grouped = query.transpose(0, 1).unflatten(0, (kv_heads, -1))  # [Hkv, Hq / Hkv, Q, D]
    keys, values = key.transpose(0, 1)[:, None], value.transpose(0, 1)[:, None]  # [Hkv, 1, S, D]
    if softmax.plain and query.dtype != torch.float64:
        ratio = grouped.shape[1]
        keys, values = (x.expand(-1, ratio, -1, -1) for x in (keys, values))
        output = torch.nn.functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=seen, scale=scale)
        return output.flatten(0, 1).transpose(0, 1)
    logits = capped(grouped.float() @ keys.float().mT * scale, softmax.cap).masked_fill_(~seen, -torch.inf)
    output, lse = weighted_sum(logits, values.float())
    output = with_sinks(output.flatten(0, 1).transpose(0, 1), lse.flatten(0, 1).T, softmax)
    return output.to(query.dtype)

"""Scores of all keys for one query a head: attention weights, element-wise maximum in a group (paper, section on GQA).

The references copy keys, tile by tile, into a float32 buffer that stays in the cache, and multiply there. One core takes 15 to
25 ms for 32K tokens of 8 groups x 128 numbers and 16 or 32 query heads, whether in pages or not, in float32 or bfloat16. A
gather of all keys, a float32 copy and one product took 115 to 165 ms, most of it in fresh memory; looking for runs of pages to
use in place gains nothing over the copy. Products in bfloat16 itself are no alternative: on a CPU torch rounds their results to
bfloat16, which would make ties of different scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.dispatch import use_triton

TILE_BYTES = 1 << 21  # of float32 keys that are multiplied at a time


def retrieval_scores(query: Tensor, keys: Tensor, start: int, stops: Tensor) -> Tensor:
    """Attention weights over the candidates start .. stops[r] - 1, maximised over the query heads of each group.

    The weights are normalised over the candidates only: sinks and recent tokens are read in any case and do not compete.

    Args:
        query: [R, Hq, D].
        keys: [R, S, G, D]; query heads g * Hq / G and up belong to group g.
        start: first candidate.
        stops: integers [R], end of the candidates of each request; S where it is greater.

    Returns:
        float32 [R, G, S]; -1 where there is no candidate. A request's scores do not depend on the others.
    """
    if use_triton(query):
        from specontext.kernels.triton.retrieval_scores import retrieval_scores as triton_scores

        return triton_scores(query, keys, start, stops)
    return retrieval_scores_reference(query, keys, start, stops)


def paged_retrieval_scores(query: Tensor, keys: Tensor, table: Tensor, start: int, stops: Tensor, span: int) -> Tensor:
    """`retrieval_scores` of keys that lie in pages, read where they are.

    Args:
        query: [R, Hq, D].
        keys: [pages, page_size, G, D].
        table: integers [R, P], pages of each request: position p is entry p % page_size of page table[r, p // page_size].
        start, stops: as in `retrieval_scores`.
        span: number of positions that compete and are returned, at most P * page_size.

    Returns:
        float32 [R, G, span]; -1 where there is no candidate. A request's scores depend neither on the others nor on the span.
    """
    assert span <= table.shape[1] * keys.shape[1], "the page table ends before the span"
    if use_triton(query):
        from specontext.kernels.triton.retrieval_scores import paged_retrieval_scores as triton_scores

        return triton_scores(query, keys, table, start, stops, span)
    return paged_retrieval_scores_reference(query, keys, table, start, stops, span)


def retrieval_scores_reference(query: Tensor, keys: Tensor, start: int, stops: Tensor) -> Tensor:
    """`retrieval_scores` in PyTorch."""
    groups, span = keys.shape[2], keys.shape[1]
    grouped = _grouped(query, groups)
    logits = query.new_empty((*grouped.shape[:-1], span), dtype=torch.float32)
    tile = _tile_tokens(keys)
    buffer = query.new_empty((min(tile, span), *keys.shape[2:]), dtype=torch.float32)
    for r, end in enumerate(_ends(stops, span)):
        for first in range(0, end, tile):
            part = keys[r, first : min(first + tile, end)]
            _tile_logits(grouped[r], buffer[: len(part)].copy_(part), logits[r, ..., first : first + len(part)])
    return group_weights(logits, start, stops)


def paged_retrieval_scores_reference(query: Tensor, keys: Tensor, table: Tensor, start: int, stops: Tensor, span: int) -> Tensor:
    """`paged_retrieval_scores` in PyTorch: gathers a tile of pages at a time."""
    page_size, groups = keys.shape[1:3]
    grouped = _grouped(query, groups)
    logits = query.new_empty((*grouped.shape[:-1], span), dtype=torch.float32)
    tile = max(1, _tile_tokens(keys) // page_size)  # pages
    tile = min(tile, -(-span // page_size))
    gathered = keys.new_empty((tile, *keys.shape[1:]))
    buffer = gathered if keys.dtype == torch.float32 else torch.empty_like(gathered, dtype=torch.float32)
    for r, end in enumerate(_ends(stops, span)):
        for first in range(0, -(-end // page_size), tile):
            pages = table[r, first : min(first + tile, -(-end // page_size))]
            raw = torch.index_select(keys, 0, pages, out=gathered[: len(pages)])
            part = raw if buffer is gathered else buffer[: len(pages)].copy_(raw)
            out = logits[r, ..., first * page_size : min((first + len(pages)) * page_size, end)]
            _tile_logits(grouped[r], part.flatten(0, 1)[: out.shape[-1]], out)
    return group_weights(logits, start, stops)


def _grouped(query: Tensor, groups: int) -> Tensor:
    """Scaled queries, float32 [R, G, Hq / G, D]."""
    requests, query_heads, head_dim = query.shape
    return query.float().view(requests, groups, query_heads // groups, head_dim) * head_dim**-0.5


def _tile_tokens(keys: Tensor) -> int:
    return max(16, TILE_BYTES // (keys.shape[2] * keys.shape[3] * 4))


def _ends(stops: Tensor, span: int) -> list[int]:
    """Where each request's keys may end; on a GPU the host does not know and takes all."""
    return [min(stop, span) for stop in stops.tolist()] if stops.device.type == "cpu" else [span] * len(stops)


def _tile_logits(query: Tensor, keys: Tensor, out: Tensor) -> None:
    """out [G, Hq / G, T] = query [G, Hq / G, D] times keys [T, G, D], all float32."""
    out.copy_(torch.bmm(query, keys.permute(1, 2, 0)))


def group_weights(logits: Tensor, start: int, stops: Tensor) -> Tensor:
    """Softmax over the candidates, then the maximum over the heads of a group.

    Args:
        logits: float32 [R, G, heads, S], changed in place; what is not a candidate may hold anything.
        start, stops: as in `retrieval_scores`.

    Returns:
        float32 [R, G, S]; -1 where there is no candidate.
    """
    position = torch.arange(logits.shape[-1], device=logits.device)
    absent = (position < start) | (position >= stops[:, None])  # [R, S]
    logits.masked_fill_(absent[:, None, None], -torch.inf)
    weights = torch.softmax(logits, dim=-1).nan_to_num_(0.0).amax(2)
    return weights.masked_fill_(absent[:, None], -1.0)

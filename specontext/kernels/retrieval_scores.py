"""Scores of all keys for one query a head: attention weights, element-wise maximum in a group (paper, section on GQA).

The references cut the keys of all requests into blocks of about 128 tokens and work through the list of blocks, a few MiB at a
time: gather, copy to float32 group by group, multiply. A block's product has the same shape whatever else is in the list, and
no loop runs over requests. Two cores take 19 ms for 32K tokens of 8 groups x 128 bfloat16 numbers and 16 query heads, as much as
one request after the other, and 1.6 ms instead of 3.9 for 32 requests of 64 tokens. Products in bfloat16 itself are no
alternative: on a CPU torch rounds their results to bfloat16, which would make ties of different scores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specontext.kernels.dispatch import operation, scratch, use_triton

TILE_BYTES = 4 << 20  # of float32 keys that are multiplied at a time
BLOCK = 128  # tokens of one product, at least
VECTOR = 64  # a block is a multiple of as many tokens


@operation(decided_by="query")
def paged_retrieval_scores(
    query: Tensor,
    keys: Tensor,
    table: Tensor,
    start: int,
    stops: Tensor,
    span: int,
    groups: int | None = None,
    scale: float | None = None,
    ranks: Tensor | None = None,
    reserved: int = 0,
) -> Tensor:
    """Attention weights over the candidates start .. stops[r] - 1, maximised over the query heads of each group.

    The weights are normalised over the candidates only: sinks and recent tokens are read in any case and do not compete. Keys lie
    in pages and are read where they are.

    Args:
        query: [R, Hq, D]; query heads g * Hq / G and up belong to group g.
        keys: [pages, page_size, K, D]; query heads k * Hq / K and up, and so their groups, read key head k.
        table: integers [R, P], pages of each request: position p is entry p % page_size of page table[r, p // page_size].
        start: first candidate.
        stops: integers [R], end of the candidates of each request; the span where it is greater.
        groups: G, a multiple of K; None for K.
        span: number of positions that compete and are returned, at most P * page_size.
        scale: factor of the logits; None for D ** -0.5.
        ranks: uint8 [pages, page_size, K], or None. Candidates of the ranks 1 .. `reserved` are chosen whatever the query is:
            they do not compete, and have infinite scores.

    Returns:
        float32 [R, G, span]; -1 where there is no candidate. A request's scores depend neither on the others nor on the span.
    """
    assert span <= table.shape[1] * keys.shape[1], "the page table ends before the span"
    requests, query_heads, head_dim = query.shape
    page_size, key_heads = keys.shape[1:3]
    # Whole vectors: the last numbers of a softmax over an odd width are computed another way than the others.
    step = VECTOR // math.gcd(VECTOR, page_size)
    pages_a_block = -(-BLOCK // (step * page_size)) * step
    block = pages_a_block * page_size
    blocks = -(-span // block)
    grouped = query.float().view(requests, key_heads, -1, head_dim) * (head_dim**-0.5 if scale is None else scale)
    logits = query.new_full((requests, query_heads, blocks * block), -torch.inf, dtype=torch.float32)
    rows = logits.view(-1, block)
    row_of = torch.arange(len(rows), device=logits.device).view(requests, -1, blocks)  # [R, Hq, blocks]
    owner, number = _blocks_of(stops.clamp(max=span), block, blocks)
    places = (number[:, None] * pages_a_block + torch.arange(pages_a_block, device=table.device)).clamp(max=table.shape[1] - 1)
    pages = table[owner[:, None], places]  # [blocks of all requests, pages_a_block]
    tile = max(1, TILE_BYTES // (block * key_heads * head_dim * 4))
    for first in range(0, len(owner), tile):
        part = slice(first, first + tile)
        places = row_of[owner[part], :, number[part]].view(-1, *grouped.shape[1:3]).transpose(0, 1)  # [K, W, heads]
        rows.index_copy_(0, places.flatten(), _products(grouped, keys, owner[part], pages[part]))
    pooled = logits.view(requests, groups or key_heads, -1, blocks * block)
    closed = None
    if ranks is not None:
        rank = torch.nn.functional.pad(ranks[table].flatten(1, 2)[:, :span].mT, (0, blocks * block - span))  # [R, K, ...]
        closed = ((rank > 0) & (rank <= reserved)).repeat_interleave(pooled.shape[1] // key_heads, dim=1)
        pooled.masked_fill_(closed[:, :, None], -torch.inf)
    weights = group_weights(pooled, start, stops.clamp(max=span))
    if closed is not None:
        weights.masked_fill_(closed & (weights >= 0), torch.inf)
    return weights[..., :span]


def _blocks_of(ends: Tensor, block: int, most: int) -> tuple[Tensor, Tensor]:
    """Request and number in it of every block that holds candidates, requests in order: int64 [blocks of all requests] each.

    On a GPU the host does not know the ends, and takes `most` blocks of every request.
    """
    every = torch.arange(len(ends), device=ends.device)
    if ends.device.type != "cpu":
        return every.repeat_interleave(most), torch.arange(most, device=ends.device).repeat(len(ends))
    counts = -(-ends.clamp(min=0) // block)
    owner = every.repeat_interleave(counts)
    return owner, torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]


def _products(query: Tensor, keys: Tensor, owner: Tensor, pages: Tensor) -> Tensor:
    """Logits of some blocks: float32 [K * W * heads, block].

    Args:
        query: scaled, float32 [R, K, heads, D].
        keys: [pages, page_size, K, D].
        owner: int64 [W], the request of a block; pages: integers [W, pages a block].
    """
    count, key_heads, head_dim = len(owner), *keys.shape[2:]
    shape = (pages.numel(), *keys.shape[1:])
    raw = torch.index_select(keys, 0, pages.flatten(), out=scratch("scores.gathered", shape, keys.dtype, keys.device))
    raw = raw.view(count, -1, key_heads, head_dim)
    ordered = scratch("scores.float32", (key_heads, *raw.shape[:2], head_dim), torch.float32, keys.device)
    ordered.copy_(raw.permute(2, 0, 1, 3))
    queries = query.transpose(0, 1).index_select(1, owner).flatten(0, 1)  # [K * W, heads, D]
    return torch.bmm(queries, ordered.flatten(0, 1).mT).flatten(0, 1)


def group_weights(logits: Tensor, start: int, stops: Tensor) -> Tensor:
    """Softmax over the candidates, then the maximum over the heads of a group.

    Args:
        logits: float32 [R, G, heads, S], changed in place; what is not a candidate may hold anything.
        start, stops: as in `paged_retrieval_scores`.

    Returns:
        float32 [R, G, S]; -1 where there is no candidate.
    """
    # Up to the first stop requests differ in nothing, and need no mask of their own. A GPU is not asked for it.
    common = max(start, int(stops.min())) if len(stops) and not use_triton(stops) else start
    position = torch.arange(common, max(common, logits.shape[-1]), device=logits.device)
    absent = position >= stops[:, None]  # [R, S - common]
    logits[..., :start].fill_(-torch.inf)
    logits[..., common:].masked_fill_(absent[:, None, None], -torch.inf)
    weights = torch.softmax(logits, dim=-1).nan_to_num_(0.0).amax(2)
    weights[..., :start].fill_(-1.0)
    weights[..., common:].masked_fill_(absent[:, None], -1.0)
    return weights

"""Decode attention over all tokens of a context that lies in pages, read without copying them."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.dispatch import use_triton
from specontext.kernels.fused_attention import attention_with_lse
from specontext.kernels.sparse_attention import merge_partials


def paged_attention(
    query: Tensor,
    arena: Tensor,
    pages: Tensor,
    lengths: Tensor,
    scale: float,
    *,
    page_size: int,
    kv_heads: int,
    tile: int = 1024,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one query a head over the first `lengths[r]` tokens of each request.

    Args:
        query: [R, Hq, D].
        arena: [N, 2, D], K and V of each row; row (page * page_size + t) * Hkv + h holds KV head h of a page's token t.
        pages: int64 or int32 [R, P], pages of each request's tokens in their order.
        lengths: int64 or int32 [R], tokens of each request, at most P * page_size.
        scale: factor of the logits.
        tile: tokens that the PyTorch implementation attends to at once.
        workspace: scratch of the GPU kernel (`triton.sparse_attention.make_workspace`), allocated when None.

    Returns:
        output [R, Hq, D] in the query's dtype, and float32 log-sum-exp of the logits [R, Hq], -inf where a length is 0.
    """
    if use_triton(query):
        from specontext.kernels.triton.paged_attention import paged_attention as on_gpu

        return on_gpu(query, arena, pages, lengths, scale, page_size=page_size, kv_heads=kv_heads, workspace=workspace)
    return paged_attention_reference(query, arena, pages, lengths, scale, page_size=page_size, kv_heads=kv_heads, tile=tile)


def paged_attention_reference(
    query: Tensor, arena: Tensor, pages: Tensor, lengths: Tensor, scale: float, *, page_size: int, kv_heads: int, tile: int = 1024
) -> tuple[Tensor, Tensor]:
    """`paged_attention` in PyTorch, request by request. Tiles are cut by token numbers, so a result does not depend on where
    the pages lie or on the other requests."""
    requests, query_heads, head_dim = query.shape
    buffer = tile_buffer(arena, tile, page_size=page_size, kv_heads=kv_heads)
    output = torch.zeros_like(query, memory_format=torch.contiguous_format)
    lse = query.new_full((requests, query_heads), -torch.inf, dtype=torch.float32)
    for r, length in enumerate(lengths.tolist()):
        grouped = query[r].reshape(kv_heads, 1, -1, head_dim)
        parts = []
        for start in range(0, length, tile):
            stop = min(start + tile, length)
            tokens = tokens_of_pages(arena, pages[r], start, stop, page_size=page_size, kv_heads=kv_heads, buffer=buffer)
            keys, values = tokens.permute(2, 1, 0, 3)[:, :, None].unbind(0)  # each [Hkv, 1, T, D]
            parts.append(attention_with_lse(grouped, keys, values, scale))
        if parts:
            outputs, lses = (torch.stack(part) for part in zip(*parts, strict=True))
            output[r] = merge_partials(outputs, lses).view(query_heads, head_dim)
            lse[r] = torch.logsumexp(lses, 0).view(query_heads)
    return output, lse


def tokens_of_pages(
    arena: Tensor, pages: Tensor, start: int, stop: int, *, page_size: int, kv_heads: int, buffer: Tensor | None = None
) -> Tensor:
    """K and V of the tokens start .. stop - 1 of one request.

    On a CPU pages that follow one another are read in place; others are copied whole. On a GPU they are always copied, because
    looking at page numbers would wait for the device.

    Args:
        arena: [N, 2, D], laid out as `paged_attention` says.
        pages: int64 or int32 [P], pages of the request's tokens in their order, on the arena's device.
        buffer: `tile_buffer` of at least stop - start tokens that a copy may overwrite; new memory when None. Fresh memory for
            every tile costs a CPU more than the copy.

    Returns:
        [stop - start, Hkv, 2, D].
    """
    first, end = start // page_size, -(-stop // page_size)
    wanted = pages[first:end]
    paged = arena.view(-1, page_size, kv_heads, *arena.shape[1:])
    if not arena.is_cuda and bool((wanted.diff() == 1).all()):
        page = int(wanted[0])
        tokens = paged[page : page + end - first]
    elif buffer is None:
        tokens = paged.index_select(0, wanted)
    else:
        tokens = torch.index_select(paged, 0, wanted, out=buffer[: end - first])
    return tokens.flatten(0, 1)[start - first * page_size : stop - first * page_size]


def tile_buffer(arena: Tensor, tokens: int, *, page_size: int, kv_heads: int) -> Tensor:
    """Room for the pages of any `tokens` consecutive tokens: [pages, page_size, Hkv, 2, D]."""
    most = -(-tokens // page_size) + 1
    return arena.new_empty((most, page_size, kv_heads, *arena.shape[1:]))

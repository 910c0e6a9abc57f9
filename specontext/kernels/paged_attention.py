"""Decode attention over all tokens of a context that lies in pages, read without copying them."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.dispatch import scratch, use_triton
from specontext.kernels.fused_attention import as_multiplied, attention_with_lse
from specontext.kernels.spans import CodedPages
from specontext.kernels.sparse_attention import TILE_BYTES, bias_beyond, of_like_width, parts_of
from specontext.kernels.tables import is_quantised


def paged_attention(
    query: Tensor,
    rows: Tensor | CodedPages,
    pages: Tensor,
    lengths: Tensor,
    scale: float,
    cap: float | None = None,
    *,
    tile: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one query a head over the first `lengths[r]` tokens of each request.

    Args:
        query: [R, Hq, D].
        rows: [N, page_size, Hkv, *row], K and V of the tokens of every page, rows as `Pages` has them; on a GPU contiguous.
        pages: int64 or int32 [R, P], pages of each request's tokens in their order.
        lengths: int64 or int32 [R], tokens of each request, at most P * page_size.
        scale: factor of the logits.
        cap: soft cap on them, see `Softmax`.
        tile: tokens that the PyTorch implementation attends to at once.

    Returns:
        output [R, Hq, D] in the query's dtype, and float32 log-sum-exp of the logits [R, Hq], -inf where a length is 0.
    """
    if use_triton(query):
        from specontext.kernels.triton.paged_attention import paged_attention as on_gpu

        size, heads = rows.shape[1:3]
        arena = rows.pool if isinstance(rows, CodedPages) else rows.view(-1, *rows.shape[3:])
        return on_gpu(query, arena, pages, lengths, scale, cap, page_size=size, kv_heads=heads)
    return paged_attention_reference(query, rows, pages, lengths, scale, cap, tile=tile)


def paged_attention_reference(
    query: Tensor,
    rows: Tensor | CodedPages,
    pages: Tensor,
    lengths: Tensor,
    scale: float,
    cap: float | None = None,
    *,
    tile: int = 1024,
) -> tuple[Tensor, Tensor]:
    """`paged_attention` in PyTorch, tile by tile and all requests that reach a tile together, as many as TILE_BYTES allow.

    Tiles are cut by token numbers and merged one after the other, and a request's last tile is as wide as its own length asks
    for; so a result depends neither on where the pages lie nor on the other requests.
    """
    requests, query_heads, head_dim = query.shape
    kv_heads = rows.shape[2]
    queries = query.reshape(requests, kv_heads, -1, head_dim)
    output = torch.zeros(queries.shape, dtype=torch.float32, device=query.device)
    lse = torch.full(queries.shape[:3], -torch.inf, dtype=torch.float32, device=query.device)
    row_bytes = kv_heads * 2 * head_dim * 4
    for start in range(0, int(lengths.max()) if requests else 0, tile):
        counts = (lengths - start).clamp(min=0, max=tile)
        for chosen, width in of_like_width(counts, tile):
            if isinstance(chosen, Tensor):
                chosen = chosen[counts[chosen] > 0]
            for part in parts_of(chosen, max(1, TILE_BYTES // (width * row_bytes))):
                tokens = _tile_of_requests(rows, pages[part], counts[part], start, width)
                tokens = as_multiplied(tokens, head_dim, query.dtype)
                tokens = tokens.transpose(1, 2)
                keys, values = tokens.select(3, 0), tokens.select(3, -1)  # each [N, Hkv, T, D]
                bias = bias_beyond(counts[part], width)
                mine = queries[part].float() if tokens.dtype == torch.float32 else queries[part]
                new, new_lse = attention_with_lse(mine, keys, values, scale, bias=bias, cap=cap)
                before = lse[part]
                # None of a tile that has no tokens of a request, which may have had none before either.
                share = torch.where(new_lse == -torch.inf, 0.0, torch.sigmoid(new_lse - before))
                output[part] = output[part].lerp(new.float(), share[..., None])
                lse[part] = torch.logaddexp(before, new_lse)
    return output.view(query.shape).to(query.dtype), lse.view(requests, query_heads)


def _tile_of_requests(rows: Tensor | CodedPages, pages: Tensor, counts: Tensor, start: int, width: int) -> Tensor:
    """K and V of the tokens start .. start + width - 1 of some requests, zeros beyond counts[n] tokens: [N, width, Hkv, *row].

    One request whose pages follow one another is read in place; others are copied into scratch memory.
    """
    page_size = rows.shape[1]
    first, end = start // page_size, -(-(start + width) // page_size)
    whole = int(counts.min()) == width
    shape = (len(pages) * (end - first), *rows.shape[1:])
    buffer = scratch("attention.gathered", shape, rows.dtype, rows.device)
    if whole and len(pages) == 1:
        return tokens_of_pages(rows, pages[0], start, start + width, buffer=buffer)[None]
    places = torch.arange(first, end, device=pages.device).clamp(max=pages.shape[1] - 1)
    wanted = pages.index_select(1, places)
    if isinstance(rows, CodedPages):
        gathered = rows.read(wanted.flatten(), buffer)
    else:
        gathered = torch.index_select(rows, 0, wanted.flatten(), out=buffer)
    tokens = gathered.view(len(pages), -1, *shape[2:])  # [N, tokens of whole pages, Hkv, *row]
    before = start - first * page_size
    if not whole:  # what lies there may not be a number
        request, token = (torch.arange(width, device=counts.device) >= counts[:, None]).nonzero(as_tuple=True)
        numbers = tokens.view(torch.int8) if is_quantised(tokens) else tokens
        numbers.flatten(0, 1).index_fill_(0, request * tokens.shape[1] + before + token, 0)
    return tokens[:, before : before + width]


def tokens_of_pages(rows: Tensor | CodedPages, pages: Tensor, start: int, stop: int, *, buffer: Tensor | None = None) -> Tensor:
    """K and V of the tokens start .. stop - 1 of one request.

    On a CPU pages that follow one another, and have nothing else between, are read in place; others are copied whole. On a GPU
    they are always copied, because looking at page numbers would wait for the device.

    Args:
        rows: [N, page_size, Hkv, *row], as `paged_attention` says.
        pages: int64 or int32 [P], pages of the request's tokens in their order, on the device of the rows.
        buffer: `tile_buffer` of at least stop - start tokens that a copy may overwrite; new memory when None. Fresh memory for
            every tile costs a CPU more than the copy.

    Returns:
        [stop - start, Hkv, *row].
    """
    page_size = rows.shape[1]
    first, end = start // page_size, -(-stop // page_size)
    wanted = pages[first:end]
    if not isinstance(rows, CodedPages) and not rows.is_cuda and rows.is_contiguous() and bool((wanted.diff() == 1).all()):
        page = int(wanted[0])
        tokens = rows[page : page + end - first]
    elif isinstance(rows, CodedPages):
        tokens = rows.read(wanted, None if buffer is None else buffer[: end - first])
    elif buffer is None:
        tokens = rows.index_select(0, wanted)
    else:
        tokens = torch.index_select(rows, 0, wanted, out=buffer[: end - first])
    return tokens.flatten(0, 1)[start - first * page_size : stop - first * page_size]


def tile_buffer(rows: Tensor | CodedPages, tokens: int) -> Tensor:
    """Room for the pages of any `tokens` consecutive tokens: [pages, page_size, Hkv, *row]."""
    most = -(-tokens // rows.shape[1]) + 1
    return torch.empty((most, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)

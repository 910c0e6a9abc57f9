"""Decode attention over rows that an index list names, and the merge of partial results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from specontext.kernels.dispatch import operation, scratch
from specontext.kernels.fused_attention import as_multiplied, attention_with_lse
from specontext.kernels.spans import CODES, read_rows

TILE_BYTES = 4 << 20  # of float32 K and V that are attended to at a time; stays in a cache
LEAST_WIDTH = 16


@operation(decided_by="query")
def sparse_attention(query: Tensor, arena: Tensor, rows: Tensor, scale: float, cap: float | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention of one query a head over the KV rows that `rows` names.

    On a CPU rows are gathered, then a fused kernel reads K and V of a KV head for its whole group. A few (request, KV head) pairs
    are done at once, in the same memory again and again. Pairs that read about as many rows are done together: what is skipped is
    not gathered, and a result depends on the pair's own rows alone.

    Args:
        query: [R, Hq, D].
        arena: [N, 2, D], K and V of each row, or [N, 1, D], where a row is both; in 8 bits [N, 2 * D + 4] or
            [spans, S, 2 * D + 4], see `spans.py`.
        rows: int64 or int32 [R, Hkv, B] row indices, -1 is skipped. Query heads h * Hq / Hkv and up read the rows of KV head h.
        scale: factor of the logits.
        cap: soft cap on them, see `Softmax`.

    Returns:
        output [R, Hq, D] in the query's dtype, and float32 log-sum-exp of the logits [R, Hq], -inf where nothing was read.
    """
    requests, query_heads, head_dim = query.shape
    kv_heads, width = rows.shape[1:]
    grouped = query.reshape(requests * kv_heads, 1, query_heads // kv_heads, head_dim)
    wanted, counts = _packed(rows.reshape(-1, width))
    output, lse = torch.empty_like(grouped), torch.empty(grouped.shape[:3], dtype=torch.float32, device=query.device)
    flat = arena.flatten(1)
    width_of_row = arena.shape[-1] if arena.dtype in CODES else flat.shape[1]
    for pairs, most in of_like_width(counts, width):
        together = max(torch.get_num_threads(), TILE_BYTES // (2 * most * head_dim * 4))
        for part in parts_of(pairs, together):
            index = wanted[part, :most].flatten()
            buffer = scratch("attention.gathered", (len(index), width_of_row), arena.dtype, arena.device)
            if arena.dtype in CODES:
                gathered = read_rows(arena, index, buffer)
            else:
                gathered = torch.index_select(flat, 0, index, out=buffer).view(-1, *arena.shape[1:])
            tokens = as_multiplied(gathered, head_dim, query.dtype)
            tokens = tokens.view(-1, 1, most, *tokens.shape[-2:])
            keys, values = tokens.select(3, 0), tokens.select(3, -1)
            queries = grouped[part].float() if tokens.dtype == torch.float32 else grouped[part]
            out, lse[part] = attention_with_lse(queries, keys, values, scale, bias=bias_beyond(counts[part], most), cap=cap)
            output[part] = out.to(output.dtype)
    nothing = (counts == 0)[:, None, None]
    lse.masked_fill_(nothing, -torch.inf)
    output.masked_fill_(nothing[..., None], 0.0)
    return output.view(requests, query_heads, head_dim), lse.view(requests, query_heads)


def _packed(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [P, B] of which those that are not skipped come first, in their order; and their numbers [P]."""
    present = rows >= 0
    counts = present.sum(-1)
    if rows.device.type == "cpu" and int(counts.min()) == rows.shape[1]:
        return rows, counts
    place = torch.where(present, present.cumsum(-1) - 1, rows.shape[1])
    # What is skipped goes to a column beyond the result.
    packed = rows.new_zeros(rows.shape[0], rows.shape[1] + 1).scatter_(1, place, rows)[:, :-1]
    # A row that is read in any case stands for it, and is masked: others may hold anything, also what is no number.
    beyond = torch.arange(rows.shape[1], device=rows.device) >= counts[:, None]
    return torch.where(beyond, packed[:, :1], packed), counts


def of_like_width(counts: Tensor, width: int) -> Iterator[tuple[Tensor | range, int]]:
    """Indices of the entries whose counts [P], 0 .. width, have the same next power of two, and that number (at most `width`).

    On a GPU the host does not know the counts, and all are taken to be `width`.
    """
    if counts.device.type != "cpu" or int(counts.min()) == width:
        yield range(len(counts)), width
        return
    limits = [LEAST_WIDTH << n for n in range(width.bit_length()) if LEAST_WIDTH << n < width] + [width]
    classes = torch.bucketize(counts, torch.tensor(limits))
    for number in classes.unique().tolist():
        yield (classes == number).nonzero().squeeze(1), limits[number]


def parts_of(chosen: Tensor | range, most: int) -> Iterable[Tensor | slice]:
    """What indexes the chosen entries, at most so many at a time; slices where all are chosen, which copy nothing."""
    if isinstance(chosen, Tensor):
        return chosen.split(most) if len(chosen) else ()
    return (slice(first, min(first + most, len(chosen))) for first in range(0, len(chosen), most))


def bias_beyond(counts: Tensor, width: int) -> Tensor | None:
    """0 for the first counts[n] of `width` entries and -inf for the others: float32 [N, 1, 1, width]; None for zeros alone."""
    if counts.device.type == "cpu" and int(counts.min()) == width:
        return None
    beyond = torch.arange(width, device=counts.device) >= counts[:, None]
    return torch.zeros(beyond.shape, dtype=torch.float32, device=counts.device).masked_fill_(beyond, -torch.inf)[:, None, None]


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

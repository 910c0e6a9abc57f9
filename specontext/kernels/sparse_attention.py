"""Decode attention over rows that an index list names, and the merge of partial results."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.dispatch import use_triton
from specontext.kernels.fused_attention import attention_with_lse

GATHERED_BYTES = 4 << 20  # stays in a cache


def sparse_attention(
    query: Tensor, arena: Tensor, rows: Tensor, scale: float, *, workspace: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of one query a head over the KV rows that `rows` names.

    Args:
        query: [R, Hq, D].
        arena: [N, 2, D], K and V of each row.
        rows: int64 or int32 [R, Hkv, B] row indices, -1 is skipped. Query heads h * Hq / Hkv and up read the rows of KV head h.
        scale: factor of the logits.
        workspace: scratch of the GPU kernel (`triton.sparse_attention.make_workspace`), allocated when None.

    Returns:
        output [R, Hq, D] in the query's dtype, and float32 log-sum-exp of the logits [R, Hq], -inf where nothing was read.
    """
    if use_triton(query):
        from specontext.kernels.triton.sparse_attention import sparse_attention as on_gpu

        return on_gpu(query, arena, rows, scale, workspace=workspace)
    return sparse_attention_reference(query, arena, rows, scale)


def sparse_attention_reference(query: Tensor, arena: Tensor, rows: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`sparse_attention` in PyTorch: rows are gathered, then a fused kernel reads K and V of a KV head for its whole group.

    A few (request, KV head) pairs are done at once, in one buffer, so that a large batch does not write out all it reads.
    """
    requests, query_heads, head_dim = query.shape
    kv_heads, width = rows.shape[1:]
    pairs = requests * kv_heads
    grouped = query.reshape(pairs, 1, query_heads // kv_heads, head_dim)
    wanted, skipped = rows.clamp(min=0).reshape(pairs, width), (rows < 0).reshape(pairs, width)
    bias = torch.zeros(skipped.shape, device=rows.device).masked_fill_(skipped, -torch.inf)[:, None, None]
    together = min(pairs, max(torch.get_num_threads(), GATHERED_BYTES // (2 * width * head_dim * arena.itemsize)))
    buffer = arena.new_empty((together * width, 2, head_dim))
    output, lse = torch.empty_like(grouped), torch.empty(grouped.shape[:3], device=query.device)
    for start in range(0, pairs, together):
        part = slice(start, min(start + together, pairs))
        index = wanted[part].flatten()
        gathered = torch.index_select(arena, 0, index, out=buffer[: len(index)]).view(-1, 1, width, 2, head_dim)
        output[part], lse[part] = attention_with_lse(
            grouped[part], gathered[..., 0, :], gathered[..., 1, :], scale, bias=bias[part]
        )
    lse.masked_fill_(skipped.all(-1)[:, None, None], -torch.inf)
    return output.view(requests, query_heads, head_dim), lse.view(requests, query_heads)


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

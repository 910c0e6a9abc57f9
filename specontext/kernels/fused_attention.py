"""PyTorch's fused attention kernels together with their log-sum-exp, which merges attention over parts of a context.

`torch.nn.functional.scaled_dot_product_attention` throws the log-sum-exp away; the operators behind it return it. Where no
fused kernel serves, matrix products in float32 do the same.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from specontext.kernels.dispatch import scratch
from specontext.kernels.quantised_rows import dequantise
from specontext.kernels.softmax import capped
from specontext.kernels.spans import CODES, vectors_in

_aten = torch.ops.aten
FLASH_ON_CPU = hasattr(_aten, "_scaled_dot_product_flash_attention_for_cpu")
HALVES = (torch.bfloat16, torch.float16)
MOST_LOGITS = 1 << 24  # that are written out at a time


def attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    causal: bool = False,
    bias: Tensor | None = None,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention and the log-sum-exp of its logits, accumulated in float32.

    Args:
        query: [N, H, Q, D].
        key, value: [N, Hkv, S, D], S at least 1, of any strides that leave the last dimension contiguous. Hkv divides H.
        scale: factor of the logits.
        causal: query i sees keys 0 .. i only.
        bias: float32 [N, 1, 1, S], 0 where a key is seen and -inf where it is not; H must be Hkv.
        cap: a soft cap on logits, for which there is no fused kernel.

    Returns:
        output [N, H, Q, D] in the query's dtype, zeros for a query that sees nothing; and log-sum-exp [N, H, Q] float32, which
        for a query that sees nothing is -inf or 0.
    """
    if cap is not None:
        return _capped(query, key, value, scale, causal, bias, cap)
    same = query.dtype == key.dtype == value.dtype != torch.float64
    if same and query.device.type == "cpu" and FLASH_ON_CPU:
        return _on_cpu(query, key, value, scale, causal, bias)
    if same and query.is_cuda and bias is None and query.shape[-1] % 8 == 0:
        return _on_cuda(query, key, value, scale, causal)
    return _by_products(query, key, value, scale, causal, bias)


@cache
def _float32_is_faster(dtype: torch.dtype) -> bool:
    """Whether this CPU attends faster to keys that are converted than to 16-bit ones: without instructions for a format its
    products are several times slower than float32's."""
    multiplies_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return dtype != torch.bfloat16 or not multiplies_bfloat16()


def as_multiplied(tokens: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Rows as K and V [..., 2, D], or latents [..., 1, D], in the number format in which their device attends fastest to queries
    of a format: themselves, or a copy in scratch memory, which the next call of this thread overwrites. Rows in 8 bits are always
    dequantised."""
    if tokens.dtype in CODES:
        if tokens.device.type == "cpu" and dtype in HALVES and _float32_is_faster(dtype):
            dtype = torch.float32
        shape = (*tokens.shape[:-1], vectors_in(tokens, dim), dim)
        return dequantise(tokens, scratch("attention.dequantised", shape, dtype, tokens.device))
    if tokens.device.type != "cpu" or tokens.dtype not in HALVES or not _float32_is_faster(tokens.dtype):
        return tokens
    return scratch("attention.float32", tuple(tokens.shape), torch.float32, tokens.device).copy_(tokens)


def _on_cpu(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype, shape, (kv_heads, queries) = query.dtype, query.shape, (key.shape[1], query.shape[2])
    if dtype in HALVES and _float32_is_faster(dtype):
        query, key, value = query.float(), key.float(), value.float()
    # Products of other numbers of rows depend on where memory is aligned, that is on the thread that computes them: a request's
    # result would change with its place in the batch. One row alone is slow as well.
    padded = max(2, queries) if queries <= 2 else -(-queries // 4) * 4 if queries < 16 else queries
    if padded > queries and not causal:
        query = torch.nn.functional.pad(query, (0, 0, 0, padded - queries))
    if shape[1] != kv_heads:  # the kernel of older versions does not know groups: they become the heads of a larger batch
        assert bias is None
        query = query.unflatten(1, (kv_heads, -1)).flatten(0, 1)
        key, value = (x.flatten(0, 1)[:, None].expand(-1, query.shape[1], -1, -1) for x in (key, value))
    output, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, is_causal=causal, attn_mask=bias, scale=scale
    )
    return output[:, :, :queries].reshape(shape).to(dtype), lse[:, :, :queries].reshape(shape[:3])


def _on_cuda(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Flash attention for 16-bit formats, the memory-efficient kernel (which wants as many KV heads as query heads) else."""
    queries, head_dim = query.shape[2:]
    if query.dtype in HALVES and head_dim <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0):
        output, lse = _aten._scaled_dot_product_flash_attention(query, key, value, is_causal=causal, scale=scale)[:2]
        return output, lse
    ratio = query.shape[1] // key.shape[1]
    if ratio > 1:
        key, value = key.repeat_interleave(ratio, 1), value.repeat_interleave(ratio, 1)
    output, lse = _aten._scaled_dot_product_efficient_attention(
        query, key, value, None, compute_log_sumexp=True, is_causal=causal, scale=scale
    )[:2]
    return output, lse[:, :, :queries]  # it pads the queries to a multiple of 32


def _capped(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, bias: Tensor | None, cap: float
) -> tuple[Tensor, Tensor]:
    """Some queries at a time, because logits are written out."""
    queries = query.shape[2]
    most = max(1, MOST_LOGITS // (query.shape[0] * query.shape[1] * key.shape[2]))
    parts = []
    for start in range(0, queries, most):
        stop = min(start + most, queries)
        seen = stop if causal else key.shape[2]
        mask = bias
        if causal:
            ahead = torch.arange(seen, device=query.device) > torch.arange(start, stop, device=query.device)[:, None]
            mask = torch.zeros(ahead.shape, dtype=torch.float32, device=query.device).masked_fill_(ahead, -torch.inf)[None, None]
        part = _by_products(query[:, :, start:stop], key[:, :, :seen], value[:, :, :seen], scale, False, mask, cap)
        parts.append(part)
    outputs, lses = zip(*parts, strict=True)
    return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)


def _by_products(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, bias: Tensor | None, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    kv_heads, span = key.shape[1:3]
    grouped = query.float().unflatten(1, (kv_heads, -1)) * scale  # [N, Hkv, H / Hkv, Q, D]
    logits = capped(grouped @ key.float().mT[:, :, None], cap)
    if bias is not None:
        logits += bias[:, None]
    if causal:
        seen = torch.ones(query.shape[2], span, dtype=torch.bool, device=query.device).tril()
        logits.masked_fill_(~seen, -torch.inf)
    output, lse = weighted_sum(logits, value.float()[:, :, None])
    return output.flatten(1, 2).to(query.dtype), lse.flatten(1, 2)


def weighted_sum(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax-weighted sum of values, and log-sum-exp: zeros and -inf for a row of logits that are all -inf.

    Args:
        logits: float32 [..., Q, S].
        values: float32 [..., S, D].
    """
    top = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = (logits - top).exp_()
    total = weights.sum(-1, keepdim=True)
    output = (weights @ values) / total.clamp(min=torch.finfo(torch.float32).tiny)
    return output, (total.log() + top).squeeze(-1)

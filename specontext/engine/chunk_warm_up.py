"""Chunks of prompts before the first one comes: what they run is compiled, and kernels have their plans.

A chunk of padding runs as every other: it has negative positions, behind tokens of a seat that is nobody's, all of whose page
numbers are 0. So it reads zeros, and stores nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specontext.core import Batch, Segment
from specontext.engine.parts import Parts
from specontext.kernels.dense_attention import chunk_attention
from specontext.kernels.gpu_chunk import KEYS, QUERIES, regular_kernel, serves
from specontext.memory.tiles import made_tile, prompt_tile


def padded_chunk(tokens: int, start: int, seat: int, device: torch.device) -> Batch:
    """A chunk of padding behind `start` tokens of a seat that is nobody's."""
    none = torch.full((tokens,), -1, dtype=torch.int64, device=device)
    return Batch(
        token_ids=torch.zeros_like(none),
        positions=none,
        seats=torch.full_like(none, seat),
        lengths=torch.full_like(none, start + tokens),
        seeds=none[:0],
        num_decodes=0,
        prefills=(Segment(seat, start, tokens, 0),),
        last_tokens=torch.full((1,), tokens - 1, dtype=torch.int64, device=device),
        span=0,
    )


def warm_up_chunks(run: Callable[[Batch], Tensor], parts: Parts) -> None:
    """Run chunks of the largest size, at the beginning of a prompt and behind some tokens, and all attention that has plans.

    Args:
        run: a step.
    """
    kv, tokens = parts.kv, min(parts.step_tokens.alone, parts.max_tokens)
    for start in (0, min(KEYS, parts.max_tokens - tokens)):
        run(padded_chunk(tokens, start, kv.num_seats, kv.device))
    _plan_attention(parts, tokens)


@torch.inference_mode()
def _plan_attention(parts: Parts, tokens: int) -> None:
    """Attend with all regular numbers of queries and keys, where their kernel prepares a plan for each pair."""
    shape, device = parts.meter.shape, parts.kv.device
    tile, kv_heads = prompt_tile(parts.kv.layout.layers[0].entry_bytes), shape.kv_heads
    if shape.latent is not None:  # chunks of this size make keys and values of all heads
        tile, kv_heads = made_tile(shape.query_heads, shape.key_dim, shape.dtype.itemsize), shape.query_heads
    query = torch.zeros((tokens, shape.query_heads, shape.key_dim), dtype=shape.dtype, device=device)
    stored = query.new_zeros((max(tokens, min(tile, parts.max_tokens)), kv_heads, 2, shape.key_dim))
    # A chunk's own keys come from the model by themselves; where they are made of latents, with the values between them.
    own = query.new_zeros((tokens, kv_heads, shape.key_dim)) if shape.latent is None else stored[:tokens, :, 0]
    if not serves(query) or regular_kernel(query, own) is None:
        return
    for count in range(QUERIES, tokens + 1, QUERIES):
        attention = chunk_attention(query[:count], own[:count], own[:count], shape.key_dim**-0.5)
        for keys in (tile >> bit for bit in range(tile.bit_length())):
            if KEYS <= keys <= len(stored):
                attention.add(stored[:keys])
        attention.result()

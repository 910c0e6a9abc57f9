"""Engines whose requests are in the middle of a long text: KV and head keys of random numbers, so that no prefill is needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specontext.config import EngineConfig, SpeContextConfig
from specontext.engine.build import Parts, build_parts
from specontext.kernels.quantised_rows import SCALES, quantise
from specontext.kernels.spans import parts_of, row_bytes, span_of
from specontext.kernels.tables import is_quantised
from specontext.models.loading import LoadedModel
from specontext.retrieval.head import RetrievalHead
from specontext.retrieval.methods.speculative import KeyCache

MEMORY = 10**15  # bytes: pools are as large as what is asked for


def middle_config(loaded: LoadedModel, method: SpeContextConfig, requests: int, context: int, **options: Any) -> EngineConfig:
    """An engine for so many requests of this length, whose pools are as large as they need; `options` are other settings."""
    settings: dict[str, Any] = {
        "methods": (),
        "max_num_seqs": requests,
        "max_model_len": max(context, min(context + 16, loaded.shape.reach)),
        "gpu_memory": MEMORY,
        "host_memory": MEMORY,
        "enable_prefix_caching": False,
    }
    return EngineConfig(loaded.name, method=method, **settings | options)


def parts_for(
    loaded: LoadedModel,
    head: RetrievalHead | None,
    method: SpeContextConfig,
    requests: int,
    context: int,
    device: torch.device,
    **options: Any,
) -> Parts:
    """An engine's parts with every request's KV and head keys filled with random numbers; `options` are other settings."""
    config = middle_config(loaded, method, requests, context, **options)
    parts = build_parts(config, loaded, head, device)
    fill_seats(parts, requests, context)
    return parts


def fill_seats(parts: Parts, requests: int, context: int) -> None:
    """Give requests seats with random KV and head keys of so many tokens.

    Raises:
        torch.OutOfMemoryError: they do not fit.
    """
    for seat in range(requests):
        if parts.kv.open(seat, context) is not None or not parts.methods.open(seat, context, None):
            raise torch.OutOfMemoryError(f"{requests} requests of {context} tokens")
    fill(parts.kv.arena.rows)
    if parts.kv.offloaded:  # else nothing there is read, and memory that is written is taken
        host = parts.kv.host
        fill(host.rows[: (host.pages.num_held + 1) * (1 if is_quantised(host.rows) else host.page_rows)])
    selector: Any = getattr(parts.selector, "inner", parts.selector)  # of a replay
    if hasattr(selector, "last_fused"):  # its keys lie in the arena
        selector.last_fused.normal_()
        if is_quantised(parts.kv.arena.rows):  # whose bytes need not be numbers of another format
            cache: KeyCache = selector.cache
            for pages in cache.held:
                cache.keys[pages] = torch.randn((len(pages), *cache.keys.shape[1:]), device=cache.keys.device).to(cache.keys)


def fill(tensor: Tensor, block: int = 1 << 24) -> None:
    """Random numbers, the same block again and again; where rows are in 8 bits, quantised ones."""
    if is_quantised(tensor):
        parts = parts_of(tensor)
        count = max(1, min(len(parts[0]), block // (span_of(tensor) * row_bytes(tensor))))
        numbers = torch.randn(count, span_of(tensor), 1, row_bytes(tensor) - SCALES)  # whatever the vectors of a row are
        rows = quantise(numbers, tensor.dtype).to(tensor.device)
        for part, some in zip(parts, rows.view(torch.int32).split([part.shape[2] for part in parts], dim=-1), strict=True):
            for start in range(0, len(part), count):
                part[start : start + count] = some[: len(part) - start]
        return
    flat = tensor.view(-1)
    some = torch.randn(min(block, max(1, flat.numel())), dtype=torch.float32, device=flat.device).to(flat.dtype)
    for start in range(0, flat.numel(), len(some)):
        flat[start : start + len(some)] = some[: flat.numel() - start]

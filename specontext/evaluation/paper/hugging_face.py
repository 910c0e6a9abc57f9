"""Decode steps and prefills of the same weights by Hugging Face: its attention functions, its caches, its compiled step."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from specontext.evaluation.paper.loop import TOKEN, free, now
from specontext.evaluation.paper.states import fill
from specontext.model_shape import ModelShape
from specontext.models.checking import cache_name
from specontext.models.loading import LoadedModel


@dataclass(frozen=True)
class Theirs:
    """A way in which Hugging Face decodes.

    Attributes:
        attention: their attention function.
        cache: `dynamic`, `static` (with a compiled step on a GPU) or `offloaded` (on a GPU only).
    """

    name: str
    words: str
    attention: str
    cache: str = "dynamic"


EAGER = Theirs("hf-eager", "Hugging Face, eager attention, DynamicCache", "eager")
SDPA = Theirs("hf-sdpa", "Hugging Face, SDPA, DynamicCache", "sdpa")
STATIC = Theirs("hf-static", "Hugging Face, SDPA, StaticCache and a compiled step", "sdpa", "static")
OFFLOADED = Theirs("hf-offloaded", "Hugging Face, SDPA, DynamicCache with offloading", "sdpa", "offloaded")


def kernel_choices(way: Theirs, device: torch.device) -> tuple[bool, ...]:
    """Whether a step is measured with cuDNN's attention among the kernels that PyTorch chooses from, and without it too: on a
    Hopper GPU PyTorch prefers it, and it plans anew, on the host, for each new length, so that each step of a growing cache waits
    for a plan."""
    return (True, False) if way.attention == "sdpa" and way.cache != "static" and device.type == "cuda" else (True,)


@contextmanager
def cudnn_allowed(allowed: bool) -> Iterator[None]:
    """Whether PyTorch may choose cuDNN's attention, as it may unless somebody says otherwise."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextmanager
def attending(loaded: LoadedModel, way: Theirs, *, cudnn: bool = True) -> Iterator[None]:
    """The model as Hugging Face runs it; memory is given back afterwards.

    Args:
        cudnn: see `cudnn_allowed`.
    """
    before = loaded.model.config._attn_implementation
    loaded.model.set_attn_implementation(way.attention)
    try:
        with cudnn_allowed(cudnn):
            yield
    finally:
        loaded.model.set_attn_implementation(before)
        if way.cache == "static":
            torch._dynamo.reset()
        free(loaded.model.device)


@torch.inference_mode()
def decode_steps(
    loaded: LoadedModel,
    way: Theirs,
    *,
    requests: int,
    lengths: Sequence[int],
    warm_up: int,
    steps: int,
    cudnn: bool = True,
) -> dict[int, float]:
    """Median seconds of a step of so many requests by length.

    A static cache is made once, for the longest of the lengths, so that its step is compiled once.

    Args:
        cudnn: see `cudnn_allowed`.

    Raises:
        torch.OutOfMemoryError: their KV does not fit.
    """
    found, device, name = {}, loaded.model.device, cache_name(loaded.model)
    with attending(loaded, way, cudnn=cudnn):
        cache: Cache | None = None
        longest = max(lengths) + warm_up + steps
        for length in lengths:
            if cache is None or way.cache != "static":
                cache = None
                free(device)  # of the last length: tensors of other sizes would not fit between what is left of it
                cache = _cache(loaded, way, requests, length, longest)
                free(device)  # a compiled step has a pool of its own
                forward = loaded.model.forward
                if way.cache == "static" and device.type == "cuda":
                    forward = torch.compile(loaded.model.forward, mode="reduce-overhead")
            if way.cache == "static":
                set_stored(cache, length - 1)
            ids = torch.full((requests, 1), TOKEN, device=device)
            place = torch.full((requests, 1), length - 1, device=device)
            taken = []
            for _ in range(warm_up + steps):
                began = now(device)
                logits = forward(input_ids=ids, position_ids=place, use_cache=True, **{name: cache}).logits
                ids, place = logits[:, -1].argmax(-1, keepdim=True), place + 1
                taken.append(now(device) - began)
            found[length] = statistics.median(taken[warm_up:])
        del cache
    return found


def set_stored(cache: Any, tokens: int) -> None:
    """Let a static cache go on behind so many tokens."""
    for layer in cache.layers:
        if hasattr(layer, "cumulative_length"):  # else it has a state, which is the same after any number
            layer.cumulative_length.fill_(tokens)


def _cache(loaded: LoadedModel, way: Theirs, requests: int, length: int, longest: int) -> Cache:
    """A cache of random numbers for all but the last token of requests of this length; a static one has room for more."""
    model, shape, device = loaded.model, loaded.shape, loaded.model.device
    cache: Cache
    stored = length - 1
    if way.cache == "static":
        cache, stored = StaticCache(config=model.config, max_cache_len=longest), longest
    else:
        cache = DynamicCache(config=model.config, offloading=way.cache == "offloaded")
    for layer in (layer for layer, place in shape.places.items() if not place.stored):
        cache.update(*random_kv(shape, requests, stored, device), layer)
    return cache


def random_kv(shape: ModelShape, requests: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random numbers as the library caches them of a layer: [R, Hkv, S, D] twice; of latents these, and what RoPE turns."""
    widths = (shape.head_dim,) * 2 if shape.latent is None else (shape.latent.rank, shape.latent.rotated)
    key, value = (torch.empty((requests, shape.kv_heads, tokens, one), dtype=shape.dtype, device=device) for one in widths)
    fill(key)
    fill(value)
    return key, value


@torch.inference_mode()
def prefill_seconds(loaded: LoadedModel, way: Theirs, length: int, *, repeats: int, chunk: int | None = None) -> float:
    """Seconds of one prompt up to its first token: one forward pass with the logits of the last token; the best of some.

    Args:
        chunk: tokens of a forward pass, as the library's `prefill_chunk_size` has them; None for all at once.

    Raises:
        torch.OutOfMemoryError: a chunk does not fit.
    """
    device, taken = loaded.model.device, []
    with attending(loaded, way):
        for turn in range(repeats + 1):
            generator = torch.Generator().manual_seed(turn)
            ids = torch.randint(loaded.shape.vocab_size, (1, length), generator=generator).to(device)
            cache = DynamicCache(config=loaded.model.config)
            began = now(device)
            for part in ids.split(chunk or length, dim=1):
                loaded.model(input_ids=part, use_cache=True, logits_to_keep=1, **{cache_name(loaded.model): cache})
            taken.append(now(device) - began)
            del cache
    return min(taken[1:])

"""Decode steps and prefills of the same weights by Hugging Face: its attention functions, its caches, its compiled step."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from specontext.evaluation.paper.loop import TOKEN, free, now
from specontext.evaluation.paper.states import fill
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


@contextmanager
def attending(loaded: LoadedModel, way: Theirs) -> Iterator[None]:
    """The model as Hugging Face runs it; memory is given back afterwards."""
    before = loaded.model.config._attn_implementation
    loaded.model.set_attn_implementation(way.attention)
    try:
        yield
    finally:
        loaded.model.set_attn_implementation(before)
        if way.cache == "static":
            torch._dynamo.reset()
        free(loaded.model.device)


@torch.inference_mode()
def decode_step(loaded: LoadedModel, way: Theirs, *, requests: int, context: int, warm_up: int, steps: int) -> float:
    """Median seconds of a step of so many requests, the first of them at this length.

    Raises:
        torch.OutOfMemoryError: their KV does not fit.
    """
    with attending(loaded, way):
        step = _stepper(loaded, way, requests, context, warm_up + steps)
        taken = []
        for _ in range(warm_up + steps):
            began = now(loaded.model.device)
            step()
            taken.append(now(loaded.model.device) - began)
        del step
    return statistics.median(taken[warm_up:])


def _stepper(loaded: LoadedModel, way: Theirs, requests: int, context: int, more: int) -> Callable[[], Tensor]:
    """One decode step, with a cache of random numbers behind it that grows by a token a step."""
    model, shape, device = loaded.model, loaded.shape, loaded.model.device
    cache: DynamicCache | StaticCache
    if way.cache == "static":
        cache = StaticCache(config=model.config, max_cache_len=context + more)
    else:
        cache = DynamicCache(config=model.config, offloading=way.cache == "offloaded")
    for layer in range(shape.layers):
        kv = torch.empty((2, requests, shape.kv_heads, context - 1, shape.head_dim), dtype=shape.dtype, device=device)
        fill(kv)
        cache.update(kv[0], kv[1], layer)
        del kv
    ids = torch.full((requests, 1), TOKEN, device=device)
    forward = model.forward
    if way.cache == "static" and device.type == "cuda":
        forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=False)
    place = torch.tensor([[context - 1]], device=device).expand(requests, 1).clone()

    def step() -> Tensor:
        logits: Tensor = forward(input_ids=ids, position_ids=place, past_key_values=cache, use_cache=True).logits
        place.add_(1)
        ids.copy_(logits[:, -1].argmax(-1, keepdim=True))
        return logits

    return step


@torch.inference_mode()
def prefill_seconds(loaded: LoadedModel, way: Theirs, length: int, *, repeats: int) -> float:
    """Seconds of one prompt up to its first token: one forward pass with the logits of the last token; the best of some."""
    device, taken = loaded.model.device, []
    with attending(loaded, way):
        for turn in range(repeats + 1):
            generator = torch.Generator().manual_seed(turn)
            ids = torch.randint(loaded.shape.vocab_size, (1, length), generator=generator).to(device)
            cache = DynamicCache(config=loaded.model.config)
            began = now(device)
            loaded.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            taken.append(now(device) - began)
            del cache
    return min(taken[1:])

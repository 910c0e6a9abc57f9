"""What a step needs beside weights and KV, measured on a GPU before the pools are made: activations, logits, workspaces."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.dense_attention import causal_attention
from specontext.kernels.latents import Latents, made_attention
from specontext.kernels.softmax import PLAIN, Softmax
from specontext.kernels.window_attention import window_attention
from specontext.layer_sizes import Window
from specontext.memory.facts import ModelFacts
from specontext.memory.model import HISTORY, SAMPLER, RunSettings, buffer_bytes
from specontext.models.attention import listening
from specontext.models.features import FeatureTaps
from specontext.models.loading import LoadedModel
from specontext.models.mixers import MixerCall


class _ChunkOnly:
    """Attention of a prompt's first chunk: nothing is stored."""

    positions = None

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softmax: Softmax = PLAIN,
        *,
        stored: bool = False,
    ) -> Tensor:
        return causal_attention(query, key, value, scale, softmax)

    def attend_window(
        self,
        layer: int,
        window: Window,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softmax: Softmax = PLAIN,
        *,
        stored: bool = False,
    ) -> Tensor:
        return window_attention(query, key, value, scale, window, softmax=softmax)

    def mix(self, mixer: int, hidden: Tensor, call: MixerCall) -> Tensor:
        return call.whole(hidden)

    def attend_latents(
        self, layer: int, latents: Latents, query: Tensor, row: Tensor, scale: float, softmax: Softmax = PLAIN
    ) -> Tensor:
        return made_attention(latents, query, row, scale, softmax)


@torch.inference_mode()
def measure_runtime(loaded: LoadedModel, facts: ModelFacts, run: RunSettings, *, feature_layers: tuple[int, ...]) -> int:
    """Bytes that the largest step allocates, from the peak of a prompt's chunk and what decoding and streaming add."""
    device, shape = loaded.model.device, loaded.shape
    tokens = min(run.max_batched_tokens, run.requests * run.max_tokens)
    taps = FeatureTaps(loaded.model, feature_layers) if feature_layers else None
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        positions = torch.arange(tokens, device=device)[None]
        last = torch.arange(min(run.requests, tokens), device=device)
        with listening(loaded.model, _ChunkOnly()):
            loaded.model(input_ids=torch.zeros_like(positions), position_ids=positions, use_cache=False, logits_to_keep=last)
        if taps is not None:
            taps.take()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    finally:
        if taps is not None:
            taps.remove()
        torch.cuda.empty_cache()
    # Attention to stored tokens is added up in float32, beside one part's and the sum in 16 bits.
    merged = 8 * tokens * shape.query_heads * shape.key_dim
    sampling = (8 + HISTORY) * run.requests * shape.vocab_size + min(SAMPLER, 24 * run.requests * shape.vocab_size)
    return peak + merged + buffer_bytes(facts, run) + sampling

"""Decoders of random weights in the exact shapes of public models, without a checkpoint or a tokenizer."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from specontext.core import ModelShape
from specontext.memory.presets import PRESETS
from specontext.models.attention import ATTENTION_NAME, register_attention
from specontext.models.loading import LoadedModel
from specontext.models.quantized import Asked, load_quantised

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MAX_POSITION = 131072


def config_of(name: str) -> PreTrainedConfig:
    """The config of a preset, for long contexts whatever its own limit; raises ValueError for a name that is not listed."""
    if name not in PRESETS:
        raise ValueError(f"unknown shape '{name}': choose one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name].config(max_position_embeddings=MAX_POSITION)


def random_model(name: str, dtype: torch.dtype, device: torch.device, quantization: str | None = None) -> LoadedModel:
    """A decoder of this shape with random weights, loaded as the engine loads a checkpoint.

    Args:
        quantization: 'fp8' or 'int4', in which linear layers are then kept; on a GPU.
    """
    register_attention()
    config = config_of(name)
    if quantization is not None:
        asked = Asked(name, None, quantization, dummy=True, keep=True, options={"trust_remote_code": False, "revision": None})
        made, note = load_quantised(asked, config, str(dtype).removeprefix("torch."), device)
        made = made.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]
        shape = ModelShape.from_config(config, dtype)
        return LoadedModel(name, None, made, None, shape, frozenset(), quantization=note)  # type: ignore[arg-type]
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME)
    model = model.eval().requires_grad_(False)
    return LoadedModel(name, None, model, None, ModelShape.from_config(config, dtype), frozenset())  # type: ignore[arg-type]

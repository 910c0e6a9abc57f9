"""Decoders of random weights in the exact shapes of public models, without a checkpoint or a tokenizer."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from specontext.core import ModelShape
from specontext.memory.presets import PRESETS
from specontext.models.attention import ATTENTION_NAME, register_attention
from specontext.models.loading import LoadedModel

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MAX_POSITION = 131072


def config_of(name: str) -> PreTrainedConfig:
    """The config of a preset, for long contexts whatever its own limit; raises ValueError for a name that is not listed."""
    if name not in PRESETS:
        raise ValueError(f"unknown shape '{name}': choose one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name].config(max_position_embeddings=MAX_POSITION)


def random_model(name: str, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    """A decoder of this shape with random weights, loaded as the engine loads a checkpoint."""
    register_attention()
    config = config_of(name)
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME)
    model = model.eval().requires_grad_(False)
    return LoadedModel(name, None, model, None, ModelShape.from_config(config, dtype), frozenset())  # type: ignore[arg-type]

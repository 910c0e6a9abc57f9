"""Decoders of random weights in the exact shapes of public models, without a checkpoint or a tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

from specontext.core import ModelShape
from specontext.models.attention import ATTENTION_NAME, register_attention
from specontext.models.loading import LoadedModel

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MAX_POSITION = 131072
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config_of(name: str) -> PreTrainedConfig:
    """The config of a public model, as its checkpoint has it; raises ValueError for a name that is not listed."""
    common: dict[str, Any] = {"max_position_embeddings": MAX_POSITION}
    if name == "llama-3.1-8b":
        return LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            rope_parameters=LLAMA3_ROPE | {"factor": 8.0},
            **common,
        )
    if name == "llama-3.2-1b":
        return LlamaConfig(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            tie_word_embeddings=True,
            rope_parameters=LLAMA3_ROPE | {"factor": 32.0},
            **common,
        )
    if name == "qwen3-0.6b":
        return Qwen3Config(
            vocab_size=151936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
            **common,
        )
    raise ValueError(f"unknown shape '{name}': choose one of llama-3.1-8b, llama-3.2-1b, qwen3-0.6b")


def random_model(name: str, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    """A decoder of this shape with random weights, loaded as the engine loads a checkpoint."""
    register_attention()
    config = config_of(name)
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME)
    model = model.eval().requires_grad_(False)
    return LoadedModel(name, None, model, None, ModelShape.from_config(config, dtype), frozenset())  # type: ignore[arg-type]

"""Decoders of random weights in the exact shapes of public models, without a checkpoint or a tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from specontext.memory.presets import PRESETS
from specontext.model_shape import ModelShape
from specontext.models.attention import ATTENTION_NAME, register_attention
from specontext.models.loading import LoadedModel
from specontext.models.quantized import Asked, load_quantised

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MAX_POSITION = 131072


# Entries of a config that keep a shape's family and little else, for runs that only show that everything works.
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}


def config_of(name: str, **changes: object) -> PreTrainedConfig:
    """The config of a preset, for long contexts whatever its own limit; raises ValueError for a name that is not listed."""
    if name not in PRESETS:
        raise ValueError(f"unknown shape '{name}': choose one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name].config(**{"max_position_embeddings": MAX_POSITION} | changes)


def random_model(
    name: str, dtype: torch.dtype, device: torch.device, *, quantization: str | None = None, **changes: Any
) -> LoadedModel:
    """A decoder of this shape, or of one with some changes, with random weights, loaded as the engine loads a checkpoint.

    Args:
        quantization: 'fp8' or 'int4', in which linear layers are then kept; on a GPU.
    """
    register_attention()
    config = config_of(name, **changes)
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


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Every token is a word: text of random tokens costs what text of real ones does."""
    words = Tokenizer(WordLevel({f"word{number}": number for number in range(size)}, unk_token="word0"))
    return PreTrainedTokenizerFast(tokenizer_object=words)

"""Small checkpoints of every architecture."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from specontext.locations import shape_of
from specontext.retrieval.checkpoint import save_head
from specontext.retrieval.random_head import random_head
from tests.conftest import need_latents, randomise
from tests.models.architectures import RUN

Write = Callable[..., PreTrainedModel]


def write_architecture(folder: Path, tokenizer: Any, architecture: str, changes: dict[str, Any]) -> PreTrainedModel:
    """The model of a tiny config, stored in `folder` with a random retrieval head."""
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "tie_word_embeddings": False,
    }
    if not hasattr(transformers, f"{architecture}Config"):
        pytest.skip("this version of transformers does not have these models")
    config = getattr(transformers, f"{architecture}Config")(**common | changes)
    if architecture in RUN and not hasattr(code_of(config), "ALL_ATTENTION_FUNCTIONS"):
        pytest.skip("this version of transformers has the attention of these models built in")
    if architecture in RUN and hasattr(code_of(config), f"{architecture}DynamicCache"):
        pytest.skip("this version of transformers has a cache of these models' own")
    if getattr(config, "kv_lora_rank", None):
        need_latents()
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    randomise(model, seed=1)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_head(random_head(shape_of(folder)), folder / "retrieval_head")
    return model


@pytest.fixture
def write(tmp_path: Path, tokenizer: Any) -> Write:
    """write(architecture, changes of a tiny config): the model, stored in tmp_path with a random retrieval head."""
    return partial(write_architecture, tmp_path, tokenizer)


def code_of(config: PreTrainedConfig) -> ModuleType:
    """The modelling code of a config's decoder."""
    return sys.modules[AutoModelForCausalLM._model_mapping[type(config)].__module__]

"""What cannot be loaded or run is refused by name, before anything is computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV3Config,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from specontext import LLM, SpeContextConfig
from specontext.core import ModelShape
from specontext.models.config_check import check_supported
from specontext.models.loading import ModelError, load_tokenizer, resolve_model_path

FULL = SpeContextConfig(method="full")


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0} | more


@pytest.mark.parametrize(
    ("config", "feature"),
    [
        (MistralConfig(sliding_window=64), "a sliding window of 64 tokens"),
        (Qwen2Config(use_sliding_window=True, max_window_layers=1), "layers of type sliding_attention"),
        (Qwen3Config(use_sliding_window=True, max_window_layers=0), "layers of type sliding_attention"),
        (Gemma2Config(), "a soft cap on attention logits"),
        (GptOssConfig(), "attention sinks"),
        (DeepseekV3Config(), "multi-head latent attention"),
        (LlamaConfig(rope_parameters=rope("dynamic")), "RoPE of type dynamic"),
        (LlamaConfig(rope_parameters=rope("longrope", short_factor=[1.0] * 64, long_factor=[1.0] * 64)), "RoPE of type longrope"),
        (T5Config(), "an encoder-decoder"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PreTrainedConfig) else "",
)
def test_unsupported_attention_is_refused_by_name(config: PreTrainedConfig, feature: str) -> None:
    config.architectures = ["SomeModel"]
    with pytest.raises(ModelError, match=rf"SomeModel is not supported: it uses {feature}"):
        check_supported(config)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(),
        MistralConfig(sliding_window=None),
        Qwen2Config(),  # names a window, and does not use it
        Qwen3Config(),
        LlamaConfig(rope_parameters=rope("linear")),
        LlamaConfig(rope_parameters=rope("yarn", original_max_position_embeddings=64)),
    ],
    ids=lambda config: type(config).__name__,
)
def test_plain_decoders_are_accepted(config: PreTrainedConfig) -> None:
    check_supported(config)


def test_shape_takes_the_explicit_head_dim_and_derives_a_missing_one() -> None:
    explicit = ModelShape.from_config(
        Qwen3Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=24), torch.float16
    )
    assert (explicit.head_dim, explicit.kv_heads, explicit.row_bytes) == (24, 2, 2 * 24 * 2)
    derived = ModelShape.from_config(Qwen2Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2), torch.float32)
    assert (derived.head_dim, derived.row_bytes) == (16, 2 * 16 * 4)


@pytest.fixture
def copy(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "copy"))


def test_a_checkpoint_with_an_active_window_is_refused_when_it_is_loaded(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text()) | {"model_type": "mistral", "sliding_window": 64}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="a sliding window of 64 tokens"):
        LLM(copy, config=FULL)


@pytest.mark.parametrize("size", [0, 5, 2000, -1])
def test_truncated_weights(copy: Path, size: int) -> None:
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:size])
    with pytest.raises(ModelError, match="broken or truncated"):
        LLM(copy, config=FULL)


def test_weights_that_are_not_safetensors(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"<html>not found</html>" * 50)
    with pytest.raises(ModelError, match="broken or truncated"):
        LLM(copy, config=FULL)


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot load the model"):
        LLM(copy, config=FULL)


def test_a_missing_tensor_is_named_and_not_replaced_by_random_numbers(copy: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors = load_file(copy / "model.safetensors")
    del tensors[name]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=name):
        LLM(copy, config=FULL)


def test_a_tensor_of_another_shape(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="cannot load the model"):
        LLM(copy, config=FULL)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": "no such model"}'])
def test_a_config_that_is_not_one(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(ModelError, match="cannot load the model"):
        LLM(copy, config=FULL)


def test_a_missing_directory(tmp_path: Path) -> None:
    for name in (tmp_path / "nothing", str(tmp_path / "nothing"), "./nothing/here", "nothing"):
        with pytest.raises(ModelError, match="no checkpoint directory at"):
            LLM(name)


def test_a_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        LLM(tmp_path)


def test_a_hub_id_is_left_to_the_hub_and_nano_is_bundled() -> None:
    assert resolve_model_path("organisation/name") == "organisation/name"
    assert isinstance(nano := resolve_model_path("nano"), Path) and nano.name == "nano"


def test_a_broken_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load_tokenizer(copy)
    with pytest.raises(ModelError, match="cannot load"):
        LLM(copy, config=FULL)

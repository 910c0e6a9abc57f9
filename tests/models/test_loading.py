"""What cannot be loaded or run is refused by name, before anything is computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen3Config

from specontext import LLM, SpeContextConfig
from specontext.errors import MemoryPlanError, ModelError
from specontext.locations import resolve_model_path
from specontext.model_shape import ModelShape

FULL = SpeContextConfig(method="full")


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


@pytest.mark.parametrize("size", [0, 5, 2000, -1])
def test_truncated_weights(copy: Path, size: int) -> None:
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:size])
    with pytest.raises(ModelError, match="broken or truncated"):
        LLM(copy, config=FULL)


def test_weights_that_are_not_safetensors(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"not found" * 50)
    with pytest.raises(ModelError, match="broken or truncated"):
        LLM(copy, config=FULL)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": "no such model"}'])
def test_a_config_that_is_not_one(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(ModelError, match="cannot read the config of the model"):
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


@pytest.mark.parametrize("name", ["num_key_value_heads", "num_attention_heads", "head_dim", "vocab_size", "num_hidden_layers"])
def test_sizes_that_are_none(copy: Path, name: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    for value in (0, "x"):
        (copy / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(ModelError, match=f"config.json is broken: {name} is {value!r}; download it again"):
            LLM(copy, config=FULL)


def test_a_context_whose_tables_no_memory_holds(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10**12}))
    with pytest.raises(MemoryPlanError, match="set max_model_len or max_num_seqs lower"):
        LLM(copy, config=FULL)
    assert LLM(copy, config=FULL, max_model_len=64).engine.parts.max_tokens == 64


def test_a_head_is_not_the_model_that_was_meant(copy: Path) -> None:
    (copy / "retrieval_head").mkdir(exist_ok=True)
    (copy / "config.json").rename(copy / "retrieval_head" / "config.json")
    with pytest.raises(ModelError, match=r"no config\.json: download it again"):
        LLM(copy, config=FULL)

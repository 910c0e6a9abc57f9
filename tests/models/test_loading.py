"""What cannot be loaded or run is refused by name, before anything is computed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen3Config

from specontext import LLM, SpeContextConfig
from specontext.core import ModelShape
from specontext.errors import ModelError
from specontext.locations import resolve_model_path

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

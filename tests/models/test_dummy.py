"""Models of random weights: made from a config and a tokenizer, the same every time, and served like any other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.config import EngineConfig
from specontext.errors import ConfigError, ModelError
from specontext.locations import NANO
from specontext.models.loading import load_model

CPU = torch.device("cpu")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A checkpoint without weights."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO / name, tmp_path / name)
    return tmp_path


def test_weights_are_random_and_the_same_every_time(bare: Path) -> None:
    state = torch.get_rng_state()
    one, two = (load_model(bare, dtype="auto", device=CPU, load_format="dummy") for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    real = load_model("nano", dtype="auto", device=CPU)
    assert (one.shape, one.end_token_ids) == (real.shape, real.end_token_ids)
    for (name, a), (_, b) in zip(one.model.state_dict().items(), two.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    weight = one.model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor) and 0.005 < float(weight.std()) < 0.5
    half = load_model(bare, dtype="bfloat16", device=CPU, load_format="dummy")
    assert half.model.dtype == half.shape.dtype == torch.bfloat16


def test_without_it_weights_must_be_there(bare: Path) -> None:
    with pytest.raises(ModelError):
        load_model(bare, dtype="auto", device=CPU)


@pytest.mark.parametrize("method", ["speculative", "full"])
def test_an_engine_of_random_weights(bare: Path, method: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    outputs = []
    for _ in range(2):
        config = SpeContextConfig(method=method, budget=32, offload_layers=2)
        llm = LLM(bare, config=config, device="cpu", max_model_len=256, load_format="dummy")
        outputs.append(llm.generate([list(range(4, 90))], params)[0])
    assert outputs[0].token_ids == outputs[1].token_ids and len(outputs[0].token_ids) == 30
    if method == "speculative":
        assert outputs[0].stats["tokens_read_per_step"] == 32 and outputs[0].stats["bytes_loaded_per_step"]


def test_settings_that_cannot_be_honoured() -> None:
    with pytest.raises(ConfigError, match="dummy"):
        EngineConfig("nano", load_format="gguf")
    with pytest.raises(ConfigError, match="tensor_parallel_size"):
        EngineConfig("nano", tensor_parallel_size=0)
    assert EngineConfig("nano", tensor_parallel_size=1).load_format == "auto"

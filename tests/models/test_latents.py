"""Checkpoints with multi-head latent attention as they come: quantised, with layers that predict further tokens, refused ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from specontext import LLM, SpeContextConfig
from specontext.errors import ModelError
from specontext.models.attention import forget_running
from specontext.models.latents import EXPAND, latent_modules
from specontext.models.loading import load_model
from specontext.quantization.linear import QuantizedLinear
from tests.models.quantised_files import write_quantised
from tests.models.test_quantised_weights import FORMATS

Checkpoint = Callable[[str], Path]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", ["fp8-blocks", "ct-fp8"])
def test_quantised_weights_but_what_makes_keys_and_values(
    name: str, kept: bool, checkpoint: Checkpoint, tmp_path: Path, prompts: Any, greedy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention in latent space multiplies with kv_b_proj itself, so that it is written out where other layers keep codes."""
    folder = tmp_path / name
    dense = write_quantised(checkpoint("latents"), folder, FORMATS[name])
    monkeypatch.setattr("specontext.models.quantized.keeps_codes", lambda _: kept)
    loaded = load_model(folder, dtype="float32", device=torch.device("cpu"))
    found, other = (loaded.model.get_submodule(f"model.layers.1.self_attn.{one}_proj") for one in ("kv_b", "q_a"))
    assert type(found) is nn.Linear and isinstance(other, QuantizedLinear) == kept
    torch.testing.assert_close(found.weight, dense["model.layers.1.self_attn.kv_b_proj.weight"], rtol=2e-7, atol=1e-8)
    llm = LLM(loaded, None, SpeContextConfig(method="full", offload_layers=2))
    (output,) = llm.generate(prompts[1:2], greedy(6))
    assert len(output.token_ids) == 6


@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_weights_that_are_rounded_when_they_are_loaded(
    kind: str, checkpoint: Checkpoint, prompts: Any, greedy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specontext.models.quantized.keeps_codes", lambda _: True)
    llm = LLM(
        checkpoint("latents"),
        config=SpeContextConfig(budget=12, sink=2, recent=4),
        device="cpu",
        dtype="float32",
        quantization=kind,
    )
    assert len(llm.generate(prompts[1:2], greedy(6))[0].token_ids) == 6


def test_layers_that_predict_further_tokens_are_left_out(
    checkpoint: Checkpoint, tmp_path: Path, prompts: Any, greedy: Any, expected: Any
) -> None:
    source = checkpoint("latents")
    for file in source.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    beside = {name.replace("layers.3.", "layers.4."): one.clone() for name, one in tensors.items() if ".layers.3." in name}
    beside["model.layers.4.eh_proj.weight"] = torch.zeros(64, 128)
    save_file(tensors | beside, tmp_path / "model.safetensors", metadata={"format": "pt"})
    llm = LLM(tmp_path, config=SpeContextConfig(method="full"), device="cpu")
    assert llm.generate(prompts[1:2], greedy())[0].token_ids == expected("latents")[1]


def test_a_model_is_as_it_was_outside_of_passes_of_an_engine(reference: Callable[[str], PreTrainedModel]) -> None:
    from specontext.models.attention import listening, running_of

    model = reference("latents")
    modules = latent_modules(model)
    assert len(modules) == 4
    running_of(model)
    with listening(model, object()):
        assert all(EXPAND in vars(module) for module in modules)
        with listening(model, object()):
            pass
        assert all(EXPAND in vars(module) for module in modules)
    assert not any(EXPAND in vars(module) for module in modules)
    forget_running(model)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"v_head_dim": 48}, "its values are wider than its keys .v_head_dim 48"),
    ({"layer_types": ["sliding_attention"] + ["full_attention"] * 3}, "in layers with a window .layer_types"),
    ({"index_topk": 16}, "it chooses tokens by an indexer of its own .index_topk 16"),
]


@pytest.mark.parametrize(("changes", "why"), REFUSED)
def test_what_is_not_computed_is_refused_by_name(
    changes: dict[str, Any], why: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    config = json.loads((checkpoint("latents") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=f"is not supported: .*{why}"):
        load_model(tmp_path, dtype="auto", device=torch.device("cpu"))

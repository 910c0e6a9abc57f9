"""Checkpoints that read images too, with the language model quantised and the rest as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specontext.cli import main
from specontext.errors import ModelError
from specontext.models.attention import attention_of
from specontext.models.language_model import decoder_name, is_other_modality
from specontext.models.loading import load_model
from specontext.quantization.linear import QuantizedExperts, QuantizedLinear
from tests.models import test_multimodal
from tests.models.quantised_files import FORMATS, Tensors
from tests.models.test_multimodal import OLD, Write

CPU = torch.device("cpu")
write = test_multimodal.write  # a fixture
IGNORED = {"ignore": ["re:visual.*", "re:vision_tower.*", "lm_head"]}


def quantise(folder: Path, name: str, *, renamed: dict[str, str] | None = None, within: str = "") -> Tensors:
    """Put the linear layers of the language model into a format; returns what its tensors are then, by its own names.

    Args:
        renamed: beginnings of names, as former versions had them.
        within: the part of the config that speaks of it.
    """
    stored, dense = {}, {}
    for key, weight in load_file(folder / "model.safetensors").items():
        for new, old in (renamed or {}).items():
            key = old + key.removeprefix(new) if key.startswith(new) else key
        if is_other_modality(key):
            stored[key] = weight
            continue
        if key.endswith("_proj.weight"):
            module = key.removesuffix(".weight")
            parts, dense[decoder_name(key)] = FORMATS[name].write(weight, module)
            stored |= {f"{module}.{ending}": part.contiguous() for ending, part in parts.items()}
        else:
            stored[key] = dense[decoder_name(key)] = weight
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    config = json.loads(file.read_text())
    (config[within] if within else config)["quantization_config"] = FORMATS[name].config | IGNORED
    file.write_text(json.dumps(config))
    return dense


@pytest.mark.parametrize(
    ("kind", "name", "renamed"),
    [
        ("Qwen2_5_VL", "awq", False),
        ("Qwen2_5_VL", "fp8-blocks", True),
        ("Gemma3", "ct-int4", True),
        ("Mistral3", "ct-fp8", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("Gemma3", "gptq", False),
                ("Mistral3", "gptq-order", False),
                ("Llava", "bnb-4", False),
                ("Qwen3VL", "ct-fp8", False),
            )
        ),
    ],
)
def test_the_language_model_is_what_its_codes_stand_for(
    kind: str,
    name: str,
    renamed: bool,
    write: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(kind)
    dense = quantise(tmp_path, name, renamed=OLD.get(kind) if renamed else None)
    loaded = load_model(tmp_path, dtype="float32", device=CPU)
    state = loaded.model.state_dict()
    assert state.keys() == dense.keys()
    for key, value in dense.items():
        torch.testing.assert_close(state[key], value, rtol=2e-7, atol=1e-8, msg=key)
    assert FORMATS[name].said in (loaded.weights_note or "")
    monkeypatch.setattr("specontext.models.quantized.keeps_codes", lambda _: True)
    kept = load_model(tmp_path, dtype="float32", device=CPU).model.modules()
    assert any(isinstance(module, QuantizedLinear) for module in kept) == FORMATS[name].kept


@pytest.mark.slow
def test_experts_of_the_language_model_keep_their_codes(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("Qwen3_5Moe")
    quantise(tmp_path, "fp8-blocks")
    found, tables = [], []
    for kept in (False, True):
        monkeypatch.setattr("specontext.models.quantized.keeps_codes", lambda _, kept=kept: kept)
        model = load_model(tmp_path, dtype="float32", device=CPU).model
        tables.append(sum(isinstance(module, QuantizedExperts) for module in model.modules()))
        with torch.inference_mode(), attention_of(model, "eager"):
            found.append(model(torch.arange(4, 30)[None], use_cache=False).logits)
    assert tables == [0, 6] and torch.equal(*found)


def test_what_the_text_s_config_says_is_heard(write: Write, tmp_path: Path) -> None:
    write("Gemma3")
    dense = quantise(tmp_path, "ct-fp8", within="text_config")
    state = load_model(tmp_path, dtype="float32", device=CPU).model.state_dict()
    assert all(torch.allclose(state[key], value, rtol=1e-6) for key, value in dense.items())


def test_one_embedding_for_input_and_output(write: Write, tmp_path: Path) -> None:
    write("Qwen2_5_VL", tie_word_embeddings=True)
    quantise(tmp_path, "ct-fp8")
    model = load_model(tmp_path, dtype="float32", device=CPU).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[union-attr]


def test_plans_and_rounding(write: Write, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write("Qwen2_5_VL")
    monkeypatch.setattr("specontext.models.quantized.keeps_codes", lambda _: True)
    rounded = load_model(tmp_path, dtype="auto", device=CPU, quantization="int4")
    assert "rounded to int4" in (rounded.weights_note or "")
    quantise(tmp_path, "ct-fp8")
    loaded = load_model(tmp_path, dtype="auto", device=CPU)
    assert main(["plan", str(tmp_path), "--gpu-memory", "1GiB", "--budget", "64", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert abs(planned["bytes"]["weights"] - loaded.weight_bytes) <= 0.02 * loaded.weight_bytes


def test_what_is_not_read_is_refused_by_name(write: Write, tmp_path: Path) -> None:
    write("Gemma3")
    quantise(tmp_path, "ct-fp8")
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    gone = next(name for name in whole if name.endswith("layers.1.self_attn.q_proj.weight_scale"))
    save_file({name: tensor for name, tensor in whole.items() if name != gone}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj are incomplete: weight_scale is not there"):
        load_model(tmp_path, dtype="auto", device=CPU)
    config = json.loads((tmp_path / "config.json").read_text())
    for method, said in (("mxfp4", "mxfp4"), ("torchao", "torchao's weights are not read from .* reads images too")):
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
        with pytest.raises(ModelError, match=said):
            load_model(tmp_path, dtype="auto", device=CPU)

"""Checkpoints whose quantisation is not read are refused before anything is loaded, wherever they say it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from specontext.checkpoints.quantization import quantization_of
from specontext.cli import main
from specontext.errors import ModelError
from specontext.models.loading import load_model

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
IN_CONFIG: list[tuple[dict[str, Any], str]] = [
    ({"quantization_config": GPTQ | {"bits": 3}}, "gptq, 3 bits (quantization_config in config.json)"),
    ({"quantization_config": GPTQ | {"checkpoint_format": "marlin"}}, "its checkpoint_format marlin is not read"),
    ({"quantization_config": GPTQ | {"format": "gptq_p"}}, "its checkpoint_format gptq_p is not read"),
    ({"quantization_config": GPTQ | {"dynamic": {"+:.*": {"bits": 8}}}}, "its dynamic, which gives +:.* settings of their own"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemv"}}, "its layout gemv is not read"),
    (
        {"quantization_config": {"quant_method": "awq", "bits": 4, "checkpoint_format": "gemv_fast"}},
        "its layout gemv_fast is not",
    ),
    ({"quantization_config": {"quant_method": "awq"}}, "0 bits are not read"),
    ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, "its numbers are e5m2"),
    ({"quantization_config": CT | {"config_groups": {}}}, "its config_groups say nothing of weights"),
    ({"quantization_config": CT | {"format": "nvfp4-pack-quantized"}}, "its format nvfp4-pack-quantized is not read"),
    ({"quantization_config": CT | {"sparsity_config": {"format": "sparse-24-bitmask"}}}, "its weights are sparse"),
    ({"quantization_config": CT | {"transform_config": {"config_groups": {"R1": {}}}}}, "its transform_config is not read"),
    ({"quantization_config": {"quant_algo": "NVFP4", "producer": {"name": "modelopt"}}}, "NVFP4"),
    ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}}, "FP8_PB_WO is not read"),
    ({"quantization_config": GPTQ | {"bits": "x"}}, "its settings are broken (invalid literal"),
    ({"quantization_config": GPTQ | {"dynamic": {"-:(": {}}}}, "its settings are broken (missing )"),
    ({"quantization_config": CT | {"config_groups": True}}, "its settings are broken (AttributeError"),
    ({"quantization_config": {"quant_method": "fp8", "modules_to_not_convert": 7}}, "its settings are broken (TypeError"),
    ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
    ({"quantization_config": {"quant_method": "hqq"}}, "hqq"),
    ({"quantization_config": {"bits": 4}}, "a method without a name, 4 bits"),
    ({"quantization": {"group_size": 64, "bits": 4}}, "a method without a name, 4 bits (quantization in config.json)"),
    ({"compression_config": {"format": "int-quantized"}}, "int-quantized (compression_config in config.json)"),
    (
        {"text_config": {"quantization_config": GPTQ | {"bits": 3}}},
        "gptq, 3 bits (text_config.quantization_config in config.json)",
    ),
    ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn (dtype in config.json)"),
    ({"torch_dtype": "int8"}, "int8 (torch_dtype in config.json)"),
]
BESIDE: list[tuple[str, dict[str, Any], str]] = [
    ("hf_quant_config.json", {"quantization": {"quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": None}}, "W4A16_AWQ"),
    ("hf_quant_config.json", {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}, "FP8"),
    ("quantize_config.json", {"bits": 3, "group_size": 128, "desc_act": False}, "3 bits"),
    ("quant_config.json", {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMV"}, "GEMV, 4 bits"),
    ("quant_model_description_w8a8.json", {"model.layers.0.self_attn.q_proj.weight": "W8A8"}, "a method without a name"),
]


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    """A directory without weights or tokenizer, which are not asked for."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes}))
    return tmp_path


def refusals(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What loading, a model of random weights and a plan say."""
    said = []
    for load_format in ("auto", "dummy"):
        with pytest.raises(ModelError) as caught:
            load_model(folder, dtype="auto", device=torch.device("cpu"), load_format=load_format)
        said.append(str(caught.value))
    assert main(["plan", str(folder), "--gpu-memory", "1GiB"]) == 1
    return [*said, capsys.readouterr().err]


@pytest.mark.parametrize(("entries", "said"), IN_CONFIG, ids=[said for _, said in IN_CONFIG])
def test_what_a_config_says(config_only: Path, entries: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = config_only / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    for found in refusals(config_only, capsys):
        assert (
            said in found
            and "quantised weights are not supported" in found
            and "take the checkpoint that it was quantised from" in found
        )


@pytest.mark.parametrize(("name", "content", "said"), BESIDE, ids=[name for name, *_ in BESIDE])
def test_what_lies_beside_the_config(
    config_only: Path, name: str, content: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (config_only / name).write_text(json.dumps(content))
    for found in refusals(config_only, capsys):
        assert f"({name})" in found and said in found


def test_entries_that_say_nothing_are_no_sign(tmp_path: Path) -> None:
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"quant_algo": None, "kv_cache_quant_algo": None}})
    )
    values = {"quantization_config": None, "compression_config": {}, "dtype": "bfloat16", "text_config": {"torch_dtype": "auto"}}
    assert quantization_of(values, tmp_path, ModelError) is None


def test_a_broken_file_beside_the_config_is_named(config_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (config_only / "hf_quant_config.json").write_text("{")
    assert all(f"{config_only}/hf_quant_config.json is broken" in said for said in refusals(config_only, capsys))

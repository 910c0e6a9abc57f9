"""The configs of public checkpoints, as their makers wrote them: what runs, with which windows and how far; and MXFP4 weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.errors import ModelError
from specontext.layer_sizes import Window
from specontext.locations import read_config
from specontext.model_shape import ModelShape
from specontext.models.config_check import check_supported
from tests.conftest import need_latents

CONFIGS: dict[str, Any] = json.loads((Path(__file__).parent / "public_configs.json").read_text())
# Layers that attend to the whole context, all layers, the window of the others, and the longest context that may be asked for.
SHAPES: dict[str, tuple[int, int, Window | None, int]] = {
    "google/gemma-2-9b": (21, 42, Window(4096), 8192),
    "google/gemma-3-1b-it": (4, 26, Window(512), 32768),
    "google/gemma-3-4b-it": (5, 34, Window(1024), 131072),
    "openai/gpt-oss-20b": (12, 24, Window(128), 131072),
    "CohereLabs/c4ai-command-r7b-12-2024": (8, 32, Window(4096), 132096),
    "LGAI-EXAONE/EXAONE-4.0-32B": (16, 64, Window(4096), 131072),
    "allenai/Olmo-3-7B-Instruct": (8, 32, Window(4096), 65536),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": (12, 48, Window(8192, chunked=True), 10485760),
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": (40, 40, None, 131072),
    "Qwen/Qwen2.5-VL-7B-Instruct": (28, 28, None, 128000),
    "Qwen/Qwen3-VL-8B-Instruct": (36, 36, None, 262144),
    "microsoft/Phi-3-mini-128k-instruct": (32, 32, None, 131072),
    "microsoft/Phi-3-mini-4k-instruct": (0, 32, Window(2047), 4096),
    "mistralai/Mistral-7B-Instruct-v0.1": (0, 32, Window(4096), 32768),
    "mistralai/Ministral-8B-Instruct-2410": (36, 36, None, 32768),
    "deepseek-ai/DeepSeek-V2-Lite-Chat": (27, 27, None, 163840),
    "deepseek-ai/DeepSeek-V3": (61, 61, None, 163840),
    "moonshotai/Moonlight-16B-A3B-Instruct": (27, 27, None, 8192),
    "openbmb/MiniCPM3-4B": (62, 62, None, 32768),
    "zai-org/GLM-4.7-Flash": (47, 47, None, 202752),
}


@pytest.mark.parametrize("name", SHAPES)
def test_public_configs(name: str, tmp_path: Path) -> None:
    if "kv_lora_rank" in CONFIGS[name]:
        need_latents()
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    config = read_config(tmp_path)
    check_supported(config)
    shape, (layers, depth, window, reach) = ModelShape.from_config(config), SHAPES[name]
    assert (len(shape.full), shape.depth, shape.reach) == (layers, depth, reach)
    assert set(shape.windowed) == ({window} if window else set())
    if (rank := CONFIGS[name].get("kv_lora_rank")) is not None:
        assert shape.kv_heads == 1 and shape.head_dim == rank + CONFIGS[name]["qk_rope_head_dim"]


@pytest.fixture
def mxfp4(write_family: Callable[..., Path]) -> Path:
    """A gpt-oss whose experts have 4-bit numbers, as OpenAI stores them."""
    folder = write_family("sinks")
    generator, packed = torch.Generator().manual_seed(0), {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = tensor.shape
            blocks = (experts, outputs, inputs // 32, 16)
            packed[f"{name}_blocks"] = torch.randint(0, 256, blocks, generator=generator, dtype=torch.uint8)
            packed[f"{name}_scales"] = torch.randint(122, 126, blocks[:-1], generator=generator, dtype=torch.uint8)
        else:
            packed[name] = tensor
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    return folder


def test_mxfp4_weights_are_dequantised_and_every_result_says_so(mxfp4: Path, prompts: list[list[int]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        mxfp4, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32, attn_implementation="eager"
    )
    llm = LLM(mxfp4, config=SpeContextConfig(method="full", offload_layers=2), device="cpu", dtype="float32")
    (output,) = llm.generate(prompts[1:2], SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    right = model.generate(torch.tensor(prompts[1:2]), **options)
    assert output.token_ids == right[0, len(prompts[1]) :].tolist()
    assert output.stats["weights"] == "dequantised from MXFP4"


def test_mxfp4_of_another_architecture_is_refused(mxfp4: Path) -> None:
    config = json.loads((mxfp4 / "config.json").read_text())
    (mxfp4 / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(ModelError, match="quantised weights are not supported: mxfp4"):
        LLM(mxfp4, config=SpeContextConfig(method="full"), device="cpu")

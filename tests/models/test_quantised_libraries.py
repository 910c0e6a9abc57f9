"""Checkpoints that the libraries write themselves, and what these say that they stand for; where these are installed."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.locations import NANO
from specontext.models.loading import load_model

pytestmark = pytest.mark.slow  # importing them takes many seconds
CPU = torch.device("cpu")


def written(folder: Path, config: Any) -> Any:
    """`nano` as transformers writes it with a quantiser; the model."""
    model = AutoModelForCausalLM.from_pretrained(NANO, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(folder)
    for file in NANO.glob("token*"):
        shutil.copy(file, folder / file.name)
    return model


def check(folder: Path, dense: dict[str, Tensor], said: str, tolerance: float = 1e-6) -> None:
    loaded = load_model(folder, dtype="float32", device=CPU)
    assert said in (loaded.weights_note or "")
    state = loaded.model.state_dict()
    for name, value in dense.items():
        torch.testing.assert_close(state[name], value.float(), rtol=tolerance, atol=tolerance, msg=name)
    llm = LLM(loaded, config=SpeContextConfig(method="full"), device="cpu")
    assert len(llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3


@pytest.mark.parametrize("kind", ["nf4", "fp4", "nested", "int8", "storage"])
def test_bitsandbytes(kind: str, tmp_path: Path) -> None:
    library: Any = pytest.importorskip("bitsandbytes")
    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        numbers = "fp4" if kind == "fp4" else "nf4"
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=numbers, bnb_4bit_use_double_quant=kind == "nested")
        if kind == "storage":
            config.bnb_4bit_quant_storage = torch.bfloat16
    model, dense = written(tmp_path, config), {}
    for name, module in model.named_modules():
        if isinstance(module, library.nn.Linear4bit):
            dense[f"{name}.weight"] = library.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, library.nn.Linear8bitLt):
            dense[f"{name}.weight"] = module.weight.data.float() * module.weight.SCB[:, None] / 127
    assert len(dense) == 28
    check(tmp_path, dense, "bitsandbytes, 8 bits" if kind == "int8" else "bitsandbytes, 4 bits")


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao(kind: str, tmp_path: Path) -> None:
    logging.getLogger("torchao").setLevel(logging.ERROR)
    library: Any = pytest.importorskip("torchao.quantization")
    model = written(tmp_path, TorchAoConfig(getattr(library, kind)()))
    weights = {name: one for name, one in model.named_parameters() if hasattr(one, "dequantize") and type(one) is not Tensor}
    dense = {name: one.dequantize() for name, one in weights.items() if name.endswith("_proj.weight")}
    assert len(dense) == 28
    check(tmp_path, dense, f"torchao, {kind}")


COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8-rows": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8-blocks": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 64]}),
    "int8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int4": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
    "int4-zeros": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": False}),
    "int3": ("pack-quantized", {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 32}),
    "int6": ("pack-quantized", {"num_bits": 6, "type": "int", "strategy": "tensor", "symmetric": False}),
}


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_tensors(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    format_, values = COMPRESSED[kind]
    arguments = QuantizationArgs(**values)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor: Any = BaseCompressor.get_value_from_registry(format_)
    folder = tmp_path / "model"
    shutil.copytree(NANO, folder)
    tensors, dense = dict(load_file(folder / "model.safetensors")), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight, module = tensors.pop(name).float(), name.removesuffix(".weight")
        n, k = weight.shape
        if values["strategy"] == "block":
            high, wide = values["block_structure"]
            parts = weight.view(n // high, high, k // wide, wide)
            least, most = parts.amin((1, 3)), parts.amax((1, 3))
        elif values["strategy"] == "tensor":
            least, most = weight.amin().reshape(1), weight.amax().reshape(1)
        else:
            parts = weight.view(n, -1, values.get("group_size") or k)
            least, most = parts.amin(2), parts.amax(2)
        scale, zero = calculate_qparams(least, most, arguments)
        state = {"weight": weight, "weight_scale": scale}
        if not arguments.symmetric:
            state["weight_zero_point"] = zero
        packed = compressor.compress(dict(state), scheme)
        tensors |= {f"{module}.{ending}": tensor.contiguous() for ending, tensor in packed.items()}
        dense[name] = compressor.decompress(dict(packed), scheme)["weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = {"quant_method": "compressed-tensors", "format": format_, "ignore": ["lm_head"], "quantization_status": "compressed"}
    said["config_groups"] = {"group_0": json.loads(scheme.model_dump_json())}  # type: ignore[assignment]
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": said}))
    check(folder, dense, "FP8" if "fp8" in kind else f"{values['num_bits']} bits")

"""On a GPU: layers that keep their codes give what the weights written out give, eager, captured and compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.kernels.quantized_linear import dequantized
from specontext.locations import NANO
from specontext.models.loading import LoadedModel, load_model
from specontext.quantization.linear import QuantizedLinear
from tests.models.quantised_files import FORMATS, write_quantised

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")


def written_out(loaded: LoadedModel) -> LoadedModel:
    """The model with plain linear layers of the same numbers."""
    for name, module in list(loaded.model.named_modules()):
        if isinstance(module, QuantizedLinear):
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            plain.weight = torch.nn.Parameter(dequantized(module.matrix, loaded.shape.dtype), requires_grad=False)
            if module.bias is not None:
                plain.bias = torch.nn.Parameter(module.bias, requires_grad=False)
            parent, _, last = name.rpartition(".")
            setattr(loaded.model.get_submodule(parent), last, plain)
    return loaded


def tokens(loaded: LoadedModel, method: str, *, offload_layers: int, **options: object) -> list[list[int]]:
    config = SpeContextConfig(method=method, budget=256, offload_layers=offload_layers)
    llm = LLM(loaded, config=config, max_model_len=4096, gpu_memory=2 << 30, **options)  # type: ignore[arg-type]
    prompts = [[7 + place % 900 for place in range(length)] for length in (1200, 300)]
    found = [one.token_ids for one in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))]
    llm.engine.close()
    return [list(one) for one in found]


@pytest.mark.parametrize("eager", [False, True], ids=["captured", "eager"])
@pytest.mark.parametrize("method", ["full", "speculative"])
@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_tokens_are_those_of_the_weights_written_out(kind: str, method: str, eager: bool) -> None:
    found, right = (
        tokens(
            make(load_model("nano", dtype="float32", device=GPU, quantization=kind)),
            method,
            offload_layers=1,
            enforce_eager=eager,
        )
        for make in (lambda loaded: loaded, written_out)
    )
    assert found == right


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_on_a_gpu(name: str, tmp_path: Path) -> None:
    dense = write_quantised(NANO, tmp_path / name, FORMATS[name])
    loaded = load_model(tmp_path / name, dtype="float32", device=GPU)
    kept = [module for module in loaded.model.modules() if isinstance(module, QuantizedLinear)]
    assert bool(kept) == FORMATS[name].kept
    module = loaded.model.get_submodule("model.layers.1.mlp.down_proj")
    weight = dense["model.layers.1.mlp.down_proj.weight"].to(GPU).double()
    for rows in (1, 4, 40, 300):
        x = torch.randn(rows, weight.shape[1], device=GPU)
        expected = x.double() @ weight.T
        assert float((module(x).double() - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_compiled_steps_in_16_bits(kind: str) -> None:
    loaded = load_model("nano", dtype="bfloat16", device=GPU, quantization=kind)
    assert [len(one) for one in tokens(loaded, "speculative", offload_layers=-1)] == [40, 40]
    assert "rounded to" in (loaded.weights_note or "") and loaded.weight_bytes < 2 * loaded.parameters


@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_random_weights_never_exist_in_16_bits(kind: str) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loaded = load_model("nano", dtype="bfloat16", device=GPU, quantization=kind, load_format="dummy")
    assert torch.cuda.memory_allocated() - before < 1.2 * loaded.weight_bytes + (16 << 20)

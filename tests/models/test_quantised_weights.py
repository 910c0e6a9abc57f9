"""Quantised checkpoints: every format gives the numbers that it stands for, written out, and as codes where kernels run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GPT2Config

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.checkpoints.quantization import Entry
from specontext.cli import main
from specontext.errors import ModelError
from specontext.kernels.dispatch import VARIABLE
from specontext.kernels.quantized_linear import QuantizedMatrix, dequantized
from specontext.models.loading import LoadedModel, load_model
from specontext.quantization.linear import QuantizedLinear
from specontext.quantization.schemes import scheme_of
from specontext.quantization.stored import read_matrix
from tests.conftest import write_checkpoint
from tests.models.quantised_files import FORMATS, Tensors, awq, compressed, gptq, words, write_quantised

CPU = torch.device("cpu")
QUERY, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"
EVERY = pytest.mark.parametrize("name", FORMATS)


@pytest.fixture
def write(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], tuple[Path, Tensors]]:
    def make(name: str) -> tuple[Path, Tensors]:
        return tmp_path / name, write_quantised(checkpoint("llama"), tmp_path / name, FORMATS[name])

    return make


def load(folder: Path, **options: Any) -> LoadedModel:
    return load_model(folder, **{"dtype": "float32", "device": CPU} | options)


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(folder: Path, edit: Callable[[Tensors], Any]) -> None:
    tensors = dict(load_file(folder / "model.safetensors"))
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@EVERY
def test_weights_are_what_the_format_stands_for(write: Any, name: str) -> None:
    folder, dense = write(name)
    loaded = load(folder)
    state = loaded.model.state_dict()
    for key, value in dense.items():
        torch.testing.assert_close(state[key], value, rtol=2e-7, atol=1e-8, msg=key)
    assert loaded.weights_note is not None and loaded.weights_note.startswith("dequantised from ")
    assert FORMATS[name].said in loaded.weights_note


@EVERY
def test_codes_are_kept_where_kernels_run(write: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, dense = write(name)
    monkeypatch.setattr("specontext.models.quantized.keeps_codes", lambda _: True)
    loaded = load(folder)
    module = loaded.model.get_submodule(DOWN)
    assert isinstance(module, QuantizedLinear) == FORMATS[name].kept
    assert loaded.parameters == sum(value.numel() for value in dense.values())
    x = torch.randn(3, 96)
    torch.testing.assert_close(module(x), x @ dense[f"{DOWN}.weight"].T, rtol=1e-5, atol=1e-5)
    if isinstance(module, QuantizedLinear):
        torch.testing.assert_close(dequantized(module.matrix, torch.float32), dense[f"{DOWN}.weight"], rtol=2e-7, atol=1e-8)
        assert loaded.weight_bytes < 4 * loaded.parameters and not (loaded.weights_note or "").startswith("dequantised")


@pytest.mark.parametrize("name", ["fp8-blocks", "ct-fp8", "awq", "gptq", "ct-int8", "bnb-8"])
def test_plans_count_the_bytes_of_the_tensors(write: Any, name: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = write(name)
    assert main(["plan", str(folder), "--gpu-memory", "1GiB", "--budget", "64", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    monkeypatch.setattr("specontext.models.quantized.keeps_codes", lambda _: True)
    for load_format in ("auto", "dummy"):
        loaded = load(folder, dtype="auto", load_format=load_format)
        assert abs(planned["bytes"]["weights"] - loaded.weight_bytes) <= 0.02 * loaded.weight_bytes
    assert FORMATS[name].said in planned["weights"]
    (folder / "model.safetensors").unlink()
    assert main(["plan", str(folder), "--gpu-memory", "1GiB", "--budget", "64", "--json"]) == 0
    by_shapes = json.loads(capsys.readouterr().out)["bytes"]["weights"]
    assert abs(by_shapes - planned["bytes"]["weights"]) <= 0.03 * by_shapes


@pytest.mark.parametrize("name", ["fp8-blocks", "awq"])
def test_an_engine_writes_the_same_tokens_as_with_the_weights_written_out(
    write: Any, name: str, prompts: Any, greedy: Any
) -> None:
    folder, dense = write(name)
    plain = folder.parent / "plain"
    plain.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (plain / file.name).write_bytes(file.read_bytes())
    config = json.loads((plain / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    save_file({key: value.contiguous() for key, value in dense.items()}, plain / "model.safetensors", metadata={"format": "pt"})
    written = []
    for place in (folder, plain):
        llm = LLM(place, config=SpeContextConfig(method="full", offload_layers=1), device="cpu", dtype="float32")
        written.append([one.token_ids for one in llm.generate(prompts[:2], greedy(8))])
    assert written[0] == written[1]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["fp8-blocks", "modelopt", "awq", "gptq-order", "ct-int8"])
def test_kernels_multiply_what_was_loaded(write: Any, name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, dense = write(name)
    monkeypatch.setattr("specontext.models.quantized.keeps_codes", lambda _: True)
    module = load(folder).model.get_submodule(DOWN)
    monkeypatch.setenv(VARIABLE, "triton")
    x = torch.randn(rows, 96)
    torch.testing.assert_close(module(x), x @ dense[f"{DOWN}.weight"].T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_config_says_how_many_bits_a_narrow_matrix_has(bits: int) -> None:
    """Sizes of words do not: 24 numbers of 3 bits take as many as 24 of 4."""
    codes = torch.arange(5 * 24).view(5, 24) * 7 % 2**bits
    said = compressed("pack-quantized", num_bits=bits, type="int", strategy="tensor", symmetric=False)
    parts = {
        "weight_packed": words(codes, bits),
        "weight_scale": torch.tensor([0.5]),
        "weight_shape": torch.tensor([5, 24]),
        "weight_zero_point": torch.tensor([-1], dtype=torch.int8),  # of a whole matrix, which is not packed
    }
    assert torch.equal(read(parts, said), (codes - (2 ** (bits - 1) - 1)) * 0.5)


@pytest.mark.parametrize(
    ("shape", "bits", "group", "order", "version"),
    [
        *[((64, 64), 2, 32, False, 1), ((72, 96), 4, 64, True, 1), ((33, 100), 8, -1, False, 2), ((40, 36), 4, 32, True, 2)],
        *[((33, 100), 4, 128, False, 1), ((64, 192), 8, 128, True, 1), ((20, 36), 2, -1, True, 2), ((8, 256), 4, 128, True, 2)],
    ],
)
def test_gptq_of_odd_sizes_with_zeros_of_0(shape: tuple[int, int], bits: int, group: int, order: bool, version: int) -> None:
    """Also a last group and last words that are not full, and a group wider than the matrix."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    weight[::3] = weight[::3].abs() + 0.1
    parts, dense = gptq(weight, "", bits=bits, group=shape[1] if group < 0 else group, order=order, version=version)
    said: dict[str, Any] = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": order, "sym": False}
    del parts["bias"]
    for layout in ("checkpoint_format", "format"):
        assert torch.equal(read(parts, said | {layout: "gptq" if version == 1 else "gptq_v2"}), dense)


@pytest.mark.parametrize(("shape", "group"), [((64, 64), 32), ((32, 96), -1), ((160, 128), 64), ((96, 256), 128)])
def test_awq_with_zeros_of_0(shape: tuple[int, int], group: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    weight[::3] = weight[::3].abs() + 0.1
    parts, dense = awq(weight, "", group=shape[1] if group < 0 else group)
    assert torch.equal(read(parts, {"quant_method": "awq", "bits": 4, "group_size": group}), dense)


def read(parts: Tensors, said: dict[str, Any]) -> torch.Tensor:
    """The matrix that tensors stand for, by what a config says."""
    matrix = read_matrix("a", {ending: ending for ending in parts}, scheme_of(Entry(said, "config.json"), "a"), parts.__getitem__)
    assert isinstance(matrix, QuantizedMatrix)
    return dequantized(matrix, torch.float32)


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [
        ("ct-fp8", lambda t: t.pop(f"{QUERY}.weight_scale"), f"{QUERY} are incomplete: weight_scale is not there"),
        ("fp8-blocks", lambda t: t.update({f"{QUERY}.weight_scale_inv": torch.ones(7, 5)}), f"{QUERY} do not fit together"),
        ("awq", lambda t: t.pop(f"{QUERY}.qzeros"), f"{QUERY} are incomplete: qzeros is not there"),
        ("awq", lambda t: t.update({f"{QUERY}.g_idx": torch.zeros(64)}), f"{QUERY}.g_idx, which is not read"),
        ("gptq", lambda t: t.update({f"{QUERY}.scales": torch.ones(5, 96)}), f"{QUERY} do not fit together"),
        ("gptq", lambda t: t.update({f"{QUERY}.bias": torch.ones(96)}), f"{QUERY}.bias is not taken"),
        ("gptq", lambda t: t.pop(f"{QUERY}.qweight"), f"{QUERY}"),
        ("ct-int4", lambda t: t.update({f"{QUERY}.weight_mask": torch.ones(3)}), f"{QUERY}.weight_mask is not taken"),
        ("ct-fp8", lambda t: t.update({"model.layers.1.self_attn.k_scale": torch.tensor(1.0)}), "self_attn.k_scale"),
        ("modelopt", lambda t: t.update({"model.layers.0.self_attn.v_proj.v_scale": torch.tensor(1.0)}), "v_proj.v_scale"),
        ("modelopt", lambda t: t.update({"model.layers.0.self_attn.k_proj.output_scale": torch.tensor(1.0)}), "output_scale"),
        ("bnb-4", lambda t: t.pop(f"{QUERY}.weight.absmax"), f"{QUERY} are incomplete"),
        ("fp8-blocks", lambda t: t.pop("model.norm.weight"), "lack model.norm.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "edit",
)
def test_tensors_that_do_not_fit_are_named(write: Any, name: str, edit: Any, said: str) -> None:
    folder, _ = write(name)
    change(folder, edit)
    assert said in refusal(folder)


def test_a_config_of_other_weights(write: Any, checkpoint: Callable[[str], Path]) -> None:
    folder, _ = write("awq")
    (folder / "model.safetensors").write_bytes((checkpoint("llama") / "model.safetensors").read_bytes())
    assert "says that its weights are quantised (AWQ" in refusal(folder)


def test_settings_beside_an_older_checkpoint(write: Any) -> None:
    folder, dense = write("gptq")
    config = json.loads((folder / "config.json").read_text())
    said = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    del said["quant_method"]
    (folder / "quantize_config.json").write_text(json.dumps(said))
    torch.testing.assert_close(load(folder).model.get_parameter(f"{DOWN}.weight"), dense[f"{DOWN}.weight"])


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_plain_weights_are_rounded_when_they_are_loaded(
    checkpoint: Callable[[str], Path], kind: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specontext.models.quantized.keeps_codes", lambda _: kept)
    plain, loaded = load(checkpoint("llama")), load(checkpoint("llama"), quantization=kind)
    assert f"rounded to {kind}" in (loaded.weights_note or "") and plain.weights_note is None
    before, module = plain.model.get_parameter(f"{DOWN}.weight"), loaded.model.get_submodule(DOWN)
    after: Any = dequantized(module.matrix, torch.float32) if isinstance(module, QuantizedLinear) else module.weight
    assert isinstance(module, QuantizedLinear) == kept
    error = float((after - before).norm() / before.norm())
    assert 0.001 < error < (0.04 if kind == "fp8" else 0.12)
    assert torch.equal(loaded.model.get_parameter("lm_head.weight"), plain.model.get_parameter("lm_head.weight"))
    assert (loaded.weight_bytes < plain.weight_bytes) == kept


def test_what_is_quantised_is_not_rounded_again(write: Any) -> None:
    folder, _ = write("awq")
    assert "leave out --quantization fp8" in refusal(folder, quantization="fp8")
    folder, _ = write("ct-fp8")
    assert load(folder, quantization="fp8").weights_note == "dequantised from FP8"


@pytest.mark.parametrize("name", ["fp8-blocks", "ct-int4", "gptq", "bnb-4"])
def test_random_weights_in_the_shape_of_a_quantised_checkpoint(write: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = write(name)
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr("specontext.models.quantized.keeps_codes", lambda _: True)
    states = [load(folder, load_format="dummy").model.state_dict() for _ in range(2)]
    assert all(torch.equal(one, states[1][key]) for key, one in states[0].items())
    assert (f"{DOWN}.codes" in states[0]) == FORMATS[name].kept
    llm = LLM(folder, config=SpeContextConfig(method="full"), device="cpu", load_format="dummy")
    assert len(llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3


def test_generate_says_what_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "nano", "--prompt", "apple", "--max-tokens", "2", "--json", "--quantization", "int4"]
    assert main(command) == 0
    assert "rounded to int4" in json.loads(capsys.readouterr().out.strip().splitlines()[-1])["stats"]["weights"]
    assert main([*command[:-1], "int3"]) != 0
    assert "choose one of fp8, int4" in capsys.readouterr().err


def test_gradients_pass_layers_that_keep_codes(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, dense = write("gptq-order")
    monkeypatch.setattr("specontext.models.quantized.keeps_codes", lambda _: True)
    module = load(folder).model.get_submodule(DOWN)
    x = torch.randn(2, 96, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, dense[f"{DOWN}.weight"].sum(0).expand(2, -1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_plans_and_random_weights_have_the_size_of_rounded_ones(
    checkpoint: Callable[[str], Path], kind: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("llama")
    assert main(["plan", str(folder), "--gpu-memory", "1GiB", "--budget", "64", "--json", "--quantization", kind]) == 0
    planned = json.loads(capsys.readouterr().out)
    monkeypatch.setattr("specontext.models.quantized.keeps_codes", lambda _: True)
    sizes = [load(folder, dtype="auto", quantization=kind, load_format=one).weight_bytes for one in ("auto", "dummy")]
    assert sizes == [planned["bytes"]["weights"]] * 2 and f"rounded to {kind}" in planned["weights"]


def test_matrices_that_a_model_has_the_other_way_round(tmp_path: Path, tokenizer: Any) -> None:
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, n_positions=64, vocab_size=len(tokenizer))
    folder = write_checkpoint(tmp_path / "gpt2", config, None, tokenizer)
    tensors, dense = dict(load_file(folder / "model.safetensors")), {}
    for name in [name for name in tensors if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))]:
        parts, made = FORMATS["gptq"].write(tensors.pop(name).t().contiguous(), name)  # as quantisers turn them
        dense[name] = made.t()
        parts["bias"] = tensors[name.replace("weight", "bias")]
        tensors |= {name.removesuffix("weight") + ending: part.contiguous() for ending, part in parts.items()}
    assert len(dense) == 4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": FORMATS["gptq"].config}))
    state = load(folder).model.state_dict()
    for name, value in dense.items():
        torch.testing.assert_close(state[name], value, rtol=2e-7, atol=1e-8)


def test_a_hub_id_s_weights_are_downloaded_before_they_are_read(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, dense = write("awq")
    asked: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        assert name == "maker/model"
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("specontext.models.loading.read_config", lambda *_, **__: AutoConfig.from_pretrained(folder))
    monkeypatch.setattr("specontext.models.loading.load_tokenizer", lambda *_, **__: None)
    monkeypatch.setattr("specontext.models.loading.generation_entries", lambda *_, **__: {})
    monkeypatch.setattr("specontext.models.loading.end_tokens", lambda *_, **__: frozenset())
    loaded = load("maker/model")  # type: ignore[arg-type]
    torch.testing.assert_close(loaded.model.get_parameter(f"{DOWN}.weight"), dense[f"{DOWN}.weight"])
    assert not any("safetensors" in one for one in asked[0]) and "model*.safetensors" in asked[-1]

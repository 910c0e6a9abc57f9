"""Experts keep their codes: they compute what the weights written out compute, in every format and family, and in ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig, MixtralConfig, NemotronHConfig, PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig
from transformers.models.granitemoe import modeling_granitemoe

from specontext import LLM, SpeContextConfig
from specontext.cli import main
from specontext.engine.build import facts_of_loaded
from specontext.errors import ModelError
from specontext.kernels.dispatch import VARIABLE
from specontext.kernels.quantized_experts import expert_of
from specontext.kernels.quantized_linear import INT4, dequantized
from specontext.kernels.triton import quantized_experts as kernels
from specontext.memory.sharing import Share
from specontext.models import quantized
from specontext.models.attention import attention_of
from specontext.models.experts import CodedExperts
from specontext.models.loading import LoadedModel, load_model
from specontext.models.ranks import Ranks
from specontext.models.sharding import SummedExperts
from specontext.quantization.linear import QuantizedExperts
from tests.conftest import write_checkpoint
from tests.kernels.test_triton_experts import WAITS, operations
from tests.models import conftest
from tests.models.architectures import RUN
from tests.models.quantised_files import FORMATS, Tensors, write_quantised

CPU = torch.device("cpu")
write_architecture = conftest.write  # a fixture
EXPERTS = "model.layers.1.mlp.experts"
OUT_OF_ORDER = ("ct-order", "gptq-order")  # columns of an expert stand in an order of their own
GRANITE = [name for name in RUN if name.startswith("GraniteMoe")]
OF_ANOTHER_FORM = ["Llama4Text", *([] if hasattr(modeling_granitemoe, "GraniteMoeExperts") else GRANITE)]
KEPT = [name for name, form in FORMATS.items() if form.kept and name not in OUT_OF_ORDER]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "qwen3": (Qwen3MoeConfig, {"num_experts": 4, **ROUTED}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "turned": (GptOssConfig, {"intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
    "nemotron": (  # without gates
        NemotronHConfig,
        {"n_routed_experts": 4, "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 32, "num_experts_per_tok": 2}
        | {"layers_block_type": ["attention", "moe"], "head_dim": 16, "moe_intermediate_size": 64},
    ),
}


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path], tokenizer: Any) -> Callable[[str], Path]:
    """A checkpoint directory of a family, written when it is first asked for; tests must not change it."""
    made: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in FAMILIES:
            return checkpoint(family)
        if family not in made:
            kind, own = FAMILIES[family]
            config = kind(**SIZES | own, vocab_size=len(tokenizer), max_position_embeddings=512, pad_token_id=1)
            made[family] = write_checkpoint(tmp_path_factory.mktemp(family), config, None, tokenizer)
        return made[family]

    return folder_of


Write = Callable[..., tuple[Path, Tensors]]


@pytest.fixture
def write(plain: Callable[[str], Path], tmp_path: Path) -> Write:
    def make(name: str, family: str = "qwen3") -> tuple[Path, Tensors]:
        return tmp_path / name, write_quantised(plain(family), tmp_path / name, FORMATS[name])

    return make


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LoadedModel]:
    def make(folder: Path, *, kept: bool, **options: Any) -> LoadedModel:
        monkeypatch.setattr("specontext.models.quantized.keeps_codes", lambda _: kept)
        return load_model(folder, **{"dtype": "float32", "device": CPU} | options)

    return make


def tables(loaded: LoadedModel) -> list[QuantizedExperts]:
    return [module for module in loaded.model.modules() if isinstance(module, QuantizedExperts)]


def written_out(folder: Path, dense: Tensors) -> Path:
    """The same checkpoint, all of whose weights are plain numbers."""
    place = folder.with_name("written-out")
    shutil.copytree(folder, place)
    save_file({name: value.contiguous() for name, value in dense.items()}, place / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((place / "config.json").read_text())
    del config["quantization_config"]
    (place / "config.json").write_text(json.dumps(config))
    return place


@torch.inference_mode()
def logits(loaded: LoadedModel) -> Tensor:
    with attention_of(loaded.model, "eager"):
        found: Tensor = loaded.model(torch.arange(4, 44)[None], use_cache=False).logits
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_those_of_the_weights_written_out(write: Write, load: Any, name: str) -> None:
    folder, dense = write(name)
    right = load(written_out(folder, dense), kept=False)
    loaded = load(folder, kept=True)
    assert len(tables(loaded)) == (4 if name in KEPT else 0)
    torch.testing.assert_close(logits(loaded), logits(right), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(load(folder, kept=False)), logits(loaded))
    assert loaded.parameters == right.parameters
    if name in KEPT:
        assert not any(parameter.dim() == 3 for parameter in loaded.model.parameters())
        for table in tables(loaded):
            assert sum(buffer.nbytes for buffer in table.buffers()) < (0.7 if table.kind == INT4 else 1.2) * table.numbers


@pytest.mark.parametrize(
    ("name", "family"),
    [("fp8-blocks", "mixtral"), ("gptq", "mixtral"), ("ct-zeros", "nemotron"), ("fp8-blocks", "latents"), ("awq", "delta")],
)
def test_families_name_and_place_their_experts_otherwise(write: Write, load: Any, name: str, family: str) -> None:
    folder, dense = write(name, family)
    loaded, right = load(folder, kept=True), load(written_out(folder, dense), kept=False)
    assert tables(loaded)
    torch.testing.assert_close(logits(loaded), logits(right), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["fp8-blocks", "ct-int4"])
def test_every_expert_has_its_own_numbers(write: Write, load: Any, name: str) -> None:
    folder, dense = write(name)
    experts = load(folder, kept=True).model.get_submodule(EXPERTS)
    assert isinstance(experts, CodedExperts)
    for number in range(4):
        gate, up, down = (dense[f"{EXPERTS}.{number}.{one}_proj.weight"] for one in ("gate", "up", "down"))
        for table, right in ((experts.own.gate_up_proj, torch.cat([gate, up])), (experts.own.down_proj, down)):
            found = dequantized(expert_of(table.matrix, 4, number), torch.float32)  # type: ignore[operator, union-attr]
            torch.testing.assert_close(found, right, rtol=2e-7, atol=1e-8)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("name", ["fp8-blocks", "awq"])
def test_kernels_multiply_what_was_loaded(
    write: Write, load: Any, name: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = write(name)
    experts = load(folder, kept=True).model.get_submodule(EXPERTS)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(tokens)])
    given = torch.randn(tokens, 64, generator=generator), chosen, torch.rand(tokens, 2, generator=generator)
    right = experts(*given)
    monkeypatch.setenv(VARIABLE, "triton")
    torch.testing.assert_close(experts(*given), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "sinks"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_nothing_of_a_layer_s_experts_waits_for_what_was_chosen(
    plain: Any, load: Any, family: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same operations of the same shapes whatever is chosen, and none that the host waits for, as capturing needs."""

    class Kernel:
        def __getitem__(self, _: Any) -> Any:
            return lambda *tensors, **__: tensors[5 if tokens == 1 else 8].zero_()  # what it writes

    experts = load(plain(family), kept=True, quantization="fp8").model.get_submodule(EXPERTS)
    monkeypatch.setenv(VARIABLE, "triton")
    for name in ("_pairs", "_tiles"):
        monkeypatch.setattr(kernels, name, Kernel())
    seen = []
    for chosen in (torch.zeros(tokens, 2, dtype=torch.int64), torch.arange(2 * tokens).view(-1, 2) % 4):
        given = torch.randn(tokens, 64), chosen, torch.rand(tokens, 2)
        seen.append(operations(lambda given=given: experts(*given)))
    assert seen[0] == seen[1] and not any(name in WAITS for name, _ in seen[0])


def test_a_compiler_takes_experts_whole(write: Write, load: Any) -> None:
    folder, _ = write("fp8-blocks")
    experts = load(folder, kept=True).model.get_submodule(EXPERTS)
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (5, 9):
        given = torch.randn(tokens, 64), torch.arange(2 * tokens).view(-1, 2) % 4, torch.rand(tokens, 2)
        assert torch.equal(compiled(*given), experts(*given))


def test_what_codes_stand_for_never_exists_in_16_bits(write: Write, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = write("fp8-blocks")
    keep, sizes = quantized._keep_codes, []

    def watched(model: PreTrainedModel, kept: Any) -> None:
        sizes.extend(model.get_parameter(name).untyped_storage().nbytes() for name in kept if name.startswith(EXPERTS))
        keep(model, kept)

    monkeypatch.setattr(quantized, "_keep_codes", watched)
    load(folder, kept=True)
    assert sizes == [4, 4], "of what stands in for them"


def test_experts_in_one_tensor_of_codes_are_refused(write: Write, load: Any) -> None:
    folder, _ = write("fp8-blocks")
    tensors = {name: one for name, one in load_file(folder / "model.safetensors").items() if not name.startswith(f"{EXPERTS}.")}
    for table, n in (("gate_up_proj", 128), ("down_proj", 64)):
        tensors[f"{EXPERTS}.{table}"] = torch.ones(4, n, 64).to(torch.float8_e4m3fn)
        tensors[f"{EXPERTS}.{table}_scale_inv"] = torch.ones(4, n // 32, 2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for kept in (True, False):
        with pytest.raises(ModelError, match=r"down_proj_scale_inv.* are not taken by .*these weights look quantised"):
            load(folder, kept=kept)


@pytest.mark.parametrize("kind", ["fp8", "int4"])
@pytest.mark.parametrize("family", ["qwen3", "sinks", "latents"])
def test_plain_experts_are_rounded_when_they_are_loaded(plain: Any, load: Any, family: str, kind: str) -> None:
    """Those of 'sinks', a gpt-oss, lie the other way round, gate and up alternate, and all have biases."""
    before = load(plain(family), kept=False)
    rounded = [load(plain(family), kept=kept, quantization=kind) for kept in (False, True)]
    assert [len(tables(one)) > 0 for one in rounded] == [False, True]
    assert torch.equal(logits(rounded[0]), logits(rounded[1]))
    assert rounded[1].parameters == before.parameters and rounded[1].weight_bytes < rounded[0].weight_bytes
    weights, found = (one.model.get_parameter(f"{EXPERTS}.down_proj") for one in (before, rounded[0]))
    error = float((found - weights).norm() / weights.norm())
    assert 0.001 < error < (0.04 if kind == "fp8" else 0.12)


@pytest.mark.parametrize("name", ["fp8-blocks", "ct-fp8", "awq", "gptq", "gptq-order", "bnb-8"])
def test_plans_count_the_bytes_of_experts(write: Write, load: Any, name: str, capsys: Any) -> None:
    folder, _ = write(name)
    plan = ["plan", str(folder), "--gpu-memory", "1GiB", "--budget", "64", "--json"]
    assert main(plan) == 0
    planned = json.loads(capsys.readouterr().out)["bytes"]["weights"]
    for load_format in ("auto", "dummy"):
        loaded = load(folder, kept=True, dtype="auto", load_format=load_format)
        assert bool(tables(loaded)) == (name in KEPT)
        assert abs(planned - loaded.weight_bytes) <= 0.02 * loaded.weight_bytes
    (folder / "model.safetensors").unlink()
    assert main(plan) == 0
    assert abs(json.loads(capsys.readouterr().out)["bytes"]["weights"] - planned) <= 0.03 * planned


@pytest.mark.parametrize("family", ["qwen3", "sinks", "latents"])
@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_plans_and_random_weights_have_the_size_of_rounded_ones(
    plain: Any, load: Any, family: str, kind: str, capsys: Any
) -> None:
    plan = ["plan", str(plain(family)), "--gpu-memory", "1GiB", "--budget", "64", "--json", "--quantization", kind]
    assert main(plan) == 0
    planned = json.loads(capsys.readouterr().out)["bytes"]["weights"]
    made = [load(plain(family), kept=True, dtype="auto", quantization=kind, load_format=one) for one in ("auto", "dummy")]
    assert [one.weight_bytes for one in made] == [planned] * 2
    assert all(torch.isfinite(logits(one)).all() for one in made)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            lambda t: t.pop(f"{EXPERTS}.2.up_proj.weight_scale_inv"),
            f"{EXPERTS}.2.up_proj are incomplete: weight_scale is not there",
        ),
        (
            lambda t: t.update({f"{EXPERTS}.2.up_proj.weight_scale_inv": torch.ones(7, 5)}),
            f"{EXPERTS}.2.up_proj do not fit together",
        ),
        (
            lambda t: [t.pop(f"{EXPERTS}.3.up_proj.{one}") for one in ("weight", "weight_scale_inv")],
            f"{EXPERTS}.3.up_proj.weight is not there",
        ),
        (lambda t: t.update({f"{EXPERTS}.9.up_proj.weight": torch.ones(64, 64)}), f"{EXPERTS}."),
    ],
    ids=["scale", "shape", "missing", "further"],
)
def test_experts_that_do_not_fit_are_named(write: Write, load: Any, edit: Any, said: str) -> None:
    folder, _ = write("fp8-blocks")
    tensors = dict(load_file(folder / "model.safetensors"))
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for kept in (True, False):
        with pytest.raises(ModelError) as caught:
            load(folder, kept=kept)
        assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["full", "oracle"])
def test_an_engine_writes_the_same_tokens(write: Write, load: Any, method: str, prompts: Any, greedy: Any) -> None:
    folder, dense = write("awq")
    written = []
    for loaded in (load(folder, kept=True), load(written_out(folder, dense), kept=False)):
        llm = LLM(loaded, None, SpeContextConfig(method=method, budget=24, sink=2, recent=4, offload_layers=1))
        written.append([one.token_ids for one in llm.generate(prompts[:3], greedy(8))])
    assert written[0] == written[1]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [name for name, own in RUN.items() if any("expert" in entry for entry in own)])
def test_experts_of_every_architecture(architecture: str, write_architecture: Any, load: Any, tmp_path: Path) -> None:
    """Rounded, and as a quantised checkpoint has them where it has them one by one; those of another form are written out."""
    write_architecture(architecture, RUN[architecture])
    several = [load(tmp_path, kept=kept, quantization="int4") for kept in (False, True)]
    shutil.copytree(tmp_path, tmp_path / "stored")
    write_quantised(tmp_path / "stored", tmp_path / "quantised", FORMATS["fp8-blocks"])
    several += [load(tmp_path / "quantised", kept=kept) for kept in (False, True)]
    for dense, kept in (several[:2], several[2:]):
        assert not tables(dense) and torch.equal(logits(dense), logits(kept))
    assert bool(tables(several[1])) == (architecture not in OF_ANOTHER_FORM)
    apart = any(".experts.0." in name for name in load_file(tmp_path / "model.safetensors"))
    assert bool(tables(several[3])) == apart


def parts_of(load: Any, folder: Path, **options: Any) -> list[LoadedModel]:
    return [load(folder, ranks=Ranks(Share(rank, 2)), **options) for rank in range(2)]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    ("name", "family"),
    [("fp8-blocks", "qwen3"), ("modelopt", "qwen3"), ("awq", "qwen3"), ("gptq-order", "qwen3"), ("ct-zeros", "mixtral")],
)
def test_parts_of_ranks_add_up(write: Write, load: Any, name: str, family: str, kept: bool) -> None:
    """To what the whole gives. Of Mixtral's experts a rank has 48 of 96 columns, which no kernel takes: they are written out."""
    folder, _ = write(name, family)
    whole, parts = load(folder, kept=kept), parts_of(load, folder, kept=kept)
    _check_sum(whole, parts, coded=kept and name in KEPT and family == "qwen3")


@pytest.mark.parametrize("kind", ["fp8", "int4"])
@pytest.mark.parametrize("family", ["qwen3", "turned", "sinks"])
def test_parts_of_rounded_experts_add_up(plain: Any, load: Any, family: str, kind: str) -> None:
    """The last two are gpt-oss's; of 'sinks' a rank has 48 of 96 columns."""
    options = {"kept": True, "quantization": kind}
    _check_sum(load(plain(family), **options), parts_of(load, plain(family), **options), coded=family != "sinks")


def _check_sum(whole: LoadedModel, parts: list[LoadedModel], *, coded: bool) -> None:
    x, chosen = torch.randn(9, 64), torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    given = x, chosen, torch.rand(9, 2)
    expected, found = whole.model.get_submodule(EXPERTS)(*given), torch.zeros(9, 64)
    for part in parts:
        summed = part.model.get_submodule(EXPERTS)
        assert isinstance(summed, SummedExperts) and isinstance(summed.part, CodedExperts) == coded
        found += summed.part(*given)
        assert len(tables(part)) == (len(tables(whole)) if coded else 0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_part_is_as_large_as_planned(plain: Any, load: Any) -> None:
    options = {"kept": True, "quantization": "fp8", "dtype": "bfloat16"}
    whole, part = load(plain("qwen3"), **options), parts_of(load, plain("qwen3"), **options)[1]
    planned = Share(1, 2).facts(facts_of_loaded(whole, None))
    assert part.weight_bytes == pytest.approx(planned.weight_bytes, rel=0.02)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("name", ["fp8-blocks", "awq"])
def test_tokens_of_two_ranks_are_those_of_one_process(write: Write, name: str, greedy: Any) -> None:
    """Of experts that a CPU writes out."""
    folder, _ = write(name)
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "max_num_seqs": 2}
    options["config"] = SpeContextConfig(method="full", offload_layers=1)
    expected = LLM(folder, **options).generate([[*range(4, 40)]], greedy(8))[0].token_ids
    llm = LLM(folder, tensor_parallel_size=2, **options)
    try:
        assert llm.generate([[*range(4, 40)]], greedy(8))[0].token_ids == expected
    finally:
        llm.engine.close()

"""What one rank has of a model: what the plan says, and nothing else of the files is copied."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PreTrainedConfig

from specontext.engine.build import facts_of_loaded
from specontext.errors import ModelError
from specontext.locations import NANO, read_config
from specontext.memory.facts import facts_of_config
from specontext.memory.sharing import Share
from specontext.models.loading import LoadedModel, load_model
from specontext.models.ranks import Ranks
from specontext.models.sharding import random_part
from tests.models.architectures import RUN
from tests.models.conftest import Write

CPU = torch.device("cpu")
MIB = 1 << 20


def part_of(model: str | Path, rank: int, size: int, dtype: str = "auto") -> LoadedModel:
    return load_model(model, dtype=dtype, device=CPU, ranks=Ranks(Share(rank, size)))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_part_is_as_large_as_planned(rank: int) -> None:
    whole, part = load_model("nano", dtype="auto", device=CPU), part_of("nano", rank, 2)
    planned = Share(rank, 2).facts(replace(facts_of_loaded(whole, None), stored_bytes=None))
    found = facts_of_loaded(replace(part, shape=planned.shape), None)
    assert (found.parameters, found.lookup_parameters) == (planned.parameters, planned.lookup_parameters)
    assert found.weight_bytes == planned.weight_bytes < 0.7 * planned.shape.dtype.itemsize * whole.parameters


def test_what_keeps_a_state_is_planned_whole(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("delta")
    planned = Share(1, 2).facts(facts_of_config("it", read_config(folder), dtype=torch.float32))
    found = part_of(folder, 1, 2, "float32")
    assert planned.whole_parameters and found.weight_bytes == pytest.approx(planned.weight_bytes, rel=0.02)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("architecture", ["DeepseekV2", "Gemma3nText", "Gemma4Text", "GPT2", "Olmo2", "OPT", "Phi3"])
def test_all_kinds_of_layers_are_planned(architecture: str, size: int, write: Write, tmp_path: Path) -> None:
    """Latents, heads by layer, tables of positions and of layers; but for routers, biases of sums and some norms."""
    write(architecture, RUN[architecture])
    planned = Share(1, size).facts(facts_of_config("it", read_config(tmp_path), dtype=torch.float32))
    found = facts_of_loaded(part_of(tmp_path, 1, size, "float32"), None)
    assert found.lookup_parameters == planned.lookup_parameters
    assert found.parameters == pytest.approx(planned.parameters, rel=0.01)


def test_parts_of_an_output_layer_are_its_rows(checkpoint: Callable[[str], Path]) -> None:
    whole = load_model(checkpoint("llama"), dtype="auto", device=CPU)
    parts = [part_of(checkpoint("llama"), rank, 4) for rank in range(4)]
    rows = torch.cat([part.model.get_output_embeddings().weight for part in parts])
    assert torch.equal(rows, whole.model.get_output_embeddings().weight)


@contextmanager
def memory_of_its_own() -> Iterator[list[int]]:
    """Watches the most memory that this process has beside mapped files: in the end, bytes more than before."""

    def now() -> int:
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
        return int(line.split()[1]) << 10

    most, ended, before = [0], threading.Event(), now()

    def watch() -> None:
        while not ended.wait(0.0005):
            most[0] = max(most[0], now() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        most[0] = max(most[0], now() - before)
        ended.set()
        thread.join()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("kind", [LlamaConfig, Phi3Config])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_more_is_copied_than_the_part(tmp_path: Path, dtype: str, kind: type[PreTrainedConfig]) -> None:
    """Also where numbers are put into another format than the files have, and where several tables are one."""
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 4096,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 2048,
    }
    config = kind(**sizes, num_hidden_layers=4, max_position_embeddings=64, pad_token_id=0, dtype=torch.bfloat16)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((NANO / name).read_bytes())
    part_of(tmp_path, 0, 4, dtype)  # libraries take memory when they are used first
    with memory_of_its_own() as most:
        part = part_of(tmp_path, 3, 4, dtype)
    whole = 4 * (3 * 512 * 4096 + 512 * 64 * 24) * part.shape.dtype.itemsize
    assert part.weight_bytes < 0.4 * whole and most[0] < 0.6 * whole + 4 * MIB


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, "lack model.layers.1.mlp.up_proj.weight"),
        ({"model.layers.9.extra.weight": (4, 4)}, "extra.weight is not taken"),
        ({"model.layers.0.self_attn.k_proj.weight": (8, 64)}, r"k_proj.weight has shape \[8, 64\]"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_each_rank(
    checkpoint: Callable[[str], Path], tmp_path: Path, change: dict[str, tuple[int, ...] | None], named: str
) -> None:
    for file in checkpoint("llama").iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    for name, size in change.items():
        tensors.pop(name, None)
        if size is not None:
            tensors[name] = torch.zeros(size)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=named):
        part_of(tmp_path, 1, 2)


def test_random_parts_agree_where_they_are_whole() -> None:
    """Made where the whole model need not fit, they are finite, and as large as those of a checkpoint."""
    config, options = read_config(NANO), {"trust_remote_code": False}
    one, two = (random_part(config, "float32", CPU, options, Ranks(Share(rank, 2))) for rank in range(2))
    real, mine, other = part_of("nano", 0, 2, "float32").model.state_dict(), one.state_dict(), two.state_dict()
    assert mine.keys() == real.keys() and all(tensor.shape == real[name].shape for name, tensor in mine.items())
    assert all(tensor.isfinite().all() for tensor in mine.values())
    whole = [name for name in mine if "embed" in name or "norm" in name]
    assert whole and all(torch.equal(mine[name], other[name]) for name in whole)
    assert 0.001 < float(one.get_output_embeddings().weight.std()) < 0.5
    angles = [buffer for name, buffer in one.named_buffers() if "inv_freq" in name]
    assert angles and all(0 < float(each.max()) <= 1 for each in angles)


@pytest.mark.parametrize("architecture", ["GPT2", "Olmo2", "Phi3", "StableLm"])
def test_random_parts_of_fused_projections_and_norms_of_heads(architecture: str, write: Write, tmp_path: Path) -> None:
    write(architecture, RUN[architecture] | ({"qk_layernorm": True} if architecture == "StableLm" else {}))
    real = part_of(tmp_path, 1, 2, "float32").model.state_dict()
    made = random_part(read_config(tmp_path), "float32", CPU, {"trust_remote_code": False}, Ranks(Share(1, 2))).state_dict()
    assert {name: tensor.shape for name, tensor in made.items()} == {name: tensor.shape for name, tensor in real.items()}
    assert all(float(tensor.abs().max()) < 10 for tensor in made.values())

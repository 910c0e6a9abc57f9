"""Head directories: what is saved is read back, and anything broken or missing is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig

from specontext import LLM, SpeContextConfig
from specontext.errors import HeadError, ModelError
from specontext.model_shape import ModelShape
from specontext.retrieval.catalog import KNOWN_DRAFTS, find_head
from specontext.retrieval.checkpoint import load_head, read_config, save_head, stored_size
from specontext.retrieval.head import RetrievalHead, head_parameters

K_PROJ = "midlayer.self_attn.k_proj.weight"


@pytest.fixture
def target(reference: Callable[[str], Any]) -> ModelShape:
    return ModelShape.from_config(reference("llama").config)


@pytest.fixture
def folder(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A head directory that a test may damage."""
    return Path(shutil.copytree(checkpoint("llama") / "retrieval_head", tmp_path / "head"))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "bands"])
def test_heads_of_every_kind_are_read_back(
    family: str, checkpoint: Callable[[str], Path], reference: Callable[[str], Any]
) -> None:
    path = checkpoint(family) / "retrieval_head"
    head = load_head(path, target=ModelShape.from_config(reference(family).config))
    stored = load_file(path / "model.safetensors")
    assert sorted(t.sum().item() for t in stored.values()) == sorted(t.sum().item() for t in head.state_dict().values())
    assert torch.equal(head.k_proj.weight, stored[K_PROJ])
    assert not any(parameter.requires_grad for parameter in head.parameters())
    assert json.loads((path / "config.json").read_text())["variant"] == head.config.variant


def test_a_missing_tensor_is_named(folder: Path, target: ModelShape) -> None:
    change_tensors(folder, lambda tensors: tensors.__delitem__(K_PROJ))
    with pytest.raises(HeadError, match=f"lacks the tensor {K_PROJ}"):
        load_head(folder, target=target)
    change_tensors(folder, lambda tensors: tensors.__delitem__("fc.weight"))
    with pytest.raises(HeadError, match=f"lacks the tensors fc.weight, {K_PROJ}"):
        load_head(folder, target=target)


def test_a_tensor_of_another_shape_is_named(folder: Path, target: ModelShape) -> None:
    change_tensors(folder, lambda tensors: tensors.update({K_PROJ: torch.zeros(3, 4)}))
    with pytest.raises(HeadError, match=rf"{K_PROJ} has shape \[3, 4\]"):
        load_head(folder, target=target)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_numbers_are_named(value: float, folder: Path, target: ModelShape) -> None:
    change_tensors(folder, lambda tensors: tensors[K_PROJ].index_put_((torch.tensor([2]),), torch.tensor(value)))
    with pytest.raises(HeadError, match=f"{K_PROJ} holds values that are not finite"):
        load_head(folder, target=target)


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_a_truncated_file(size: int, folder: Path, target: ModelShape) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(HeadError, match="broken or truncated"):
        load_head(folder, target=target)


def test_a_directory_without_weights_or_config_or_nothing_at_all(folder: Path, target: ModelShape, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(HeadError, match=r"has no model\.safetensors"):
        load_head(folder, target=target)
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(HeadError, match=r"it has no config\.json"):
            load_head(path, target=target)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_config_that_is_no_json_object(text: str, folder: Path, target: ModelShape) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(HeadError, match=r"config\.json"):
        load_head(folder, target=target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 2, and this version of specontext reads 1 only"),
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"head_dim": 2 * 10**12}, "head_dim of a retrieval head must be a positive integer"),
        ({"heads": 2 * 10**12}, "heads of a retrieval head must be"),
        ({"rope_theta": 10**400}, "rope_theta of a retrieval head must be a number above 0"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"rope_theta": 1e-300}, "frequencies that are not finite"),
        ({"source": None}, "source of a retrieval head must be a text"),
        ({"source_hash": [1]}, "source_hash"),
    ],
)
def test_a_config_that_no_head_has_is_refused_by_name(
    change: dict[str, Any], message: str, folder: Path, target: ModelShape
) -> None:
    change_config(folder, **change)
    with pytest.raises(HeadError, match=message):
        load_head(folder, target=target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_hidden_size": 48}, "hidden size 48"),
        ({"hidden_size": 48}, "48"),
        ({"vocab_size": 12}, "vocabulary 12"),
        ({"kv_heads": 4}, "4 groups and the model 2 KV heads"),
        ({"feature_layers": [0, 0, 1]}, "not distinct"),
    ],
)
def test_a_mismatched_head_stops_the_engine_with_a_clear_error(
    change: dict[str, Any], message: str, folder: Path, checkpoint: Callable[[str], Path]
) -> None:
    change_config(folder, **change)
    with pytest.raises(HeadError, match=message):
        LLM(checkpoint("llama"), folder)


def test_the_config_s_head_dim_must_be_the_tensors(folder: Path, target: ModelShape) -> None:
    change_config(folder, head_dim=8)
    with pytest.raises(HeadError, match=r"q_proj.* has shape \[64, 128\], the head's config asks for \[32, 128\]"):
        load_head(folder, target=target)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_target_is_a_shape_a_config_or_a_name(
    family: str, checkpoint: Callable[[str], Path], reference: Callable[[str], Any]
) -> None:
    path, config = checkpoint(family) / "retrieval_head", reference(family).config
    heads = [
        RetrievalHead.from_pretrained(source, target=target)
        for target in (ModelShape.from_config(config), config, checkpoint(family), str(checkpoint(family)))
        for source in (path, str(path), checkpoint(family))
    ]
    for head in heads:
        assert torch.equal(head.k_proj.weight, load_file(path / "model.safetensors")[K_PROJ])
    assert RetrievalHead.from_pretrained("nano", target="nano").config.variant == "features"


def test_a_target_that_is_no_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no checkpoint directory at"):
        RetrievalHead.from_pretrained(folder, target=tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot read the config of the model"):
        RetrievalHead.from_pretrained(folder, target=tmp_path)
    with pytest.raises(ModelError, match="PreTrainedConfig does not describe a decoder"):
        RetrievalHead.from_pretrained(folder, target=PreTrainedConfig())


def test_size_and_config_without_the_model(folder: Path, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    config = read_config(checkpoint("llama"))
    assert config == read_config(folder)
    assert stored_size(folder) == (head_parameters(config), 4 * head_parameters(config))
    change_config(folder, head_dim=8)
    with pytest.raises(HeadError, match="has shape"):
        stored_size(folder)
    (folder / "config.json").write_text('{"hidden_size": 3}')
    with pytest.raises(HeadError, match=r"not a retrieval head: .*specontext head prune"):
        read_config(folder)


# Writing --------------------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_head_is_written_beside_what_lies_there_and_over_an_older_one(folder: Path, target: ModelShape, tmp_path: Path) -> None:
    head = load_head(folder, target=target)
    logs = tmp_path / "run"
    logs.mkdir()
    (logs / "log.jsonl").write_text("{}")
    for out in (tmp_path / "deep" / "new", logs, logs):
        save_head(head, out)
        assert set(files(out)) - {"log.jsonl"} == {"config.json", "model.safetensors"}
        again = load_head(out, target=target)
        assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))
    assert (logs / "log.jsonl").read_text() == "{}"
    assert {path.name for path in tmp_path.iterdir()} == {"deep", "run", "head"}


def test_a_small_head_replaces_a_large_one_whole(folder: Path, target: ModelShape) -> None:
    save_head(load_head(folder, target=target).embedding_variant(), folder)
    assert load_head(folder, target=target).config.variant == "embedding"


def test_the_number_format_of_the_file_may_be_kept(folder: Path, target: ModelShape) -> None:
    save_head(load_head(folder, target=target, dtype=torch.bfloat16), folder)
    assert load_head(folder, target=target, dtype=None).q_proj.weight.dtype == torch.bfloat16
    assert load_head(folder, target=target).q_proj.weight.dtype == torch.float32
    assert stored_size(folder)[1] == 2 * stored_size(folder)[0]


def test_values_that_are_not_numbers_are_not_written(folder: Path, target: ModelShape, tmp_path: Path) -> None:
    head, before = load_head(folder, target=target), files(folder)
    head.k_proj.weight[0, 0] = float("nan")
    for out in (folder, tmp_path / "new"):
        with pytest.raises(HeadError, match=f"not written to .*{K_PROJ} holds values that are not finite"):
            save_head(head, out)
    assert files(folder) == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize("fails", ["save_file", "json.dumps"])
def test_nothing_is_left_half_written(
    fails: str, folder: Path, target: ModelShape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_is_full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    head, before = load_head(folder, target=target), files(folder)
    monkeypatch.setattr(f"specontext.retrieval.checkpoint.{fails}", disk_is_full)
    for out in (folder, tmp_path / "new"):
        with pytest.raises(HeadError, match=r"cannot be written .* No space left"):
            save_head(head, out)
    assert files(folder) == before
    assert {path.name for path in tmp_path.iterdir()} == {"head"}


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_an_old_head_comes_back_when_moving_the_new_one_fails(
    failing: int, folder: Path, target: ModelShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, before, moves = load_head(folder, target=target), files(folder), []
    rename = Path.rename

    def break_one(path: Path, to: Path) -> Path:
        moves.append(to)
        if len(moves) == failing:
            raise OSError("broken pipe to the disk")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", break_one)
    with pytest.raises(HeadError, match="cannot be written"):
        save_head(head.embedding_variant(), folder)
    assert files(folder) == before


def test_a_model_is_not_overwritten_by_a_head(folder: Path, target: ModelShape, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(HeadError, match="holds a model that is not a retrieval head"):
        save_head(load_head(folder, target=target), tmp_path)
    with pytest.raises(HeadError, match="cannot be written"):
        save_head(load_head(folder, target=target), folder / "config.json" / "below")


# Finding a head -------------------------------------------------------------------------------------------------------


def names_the_ways(message: str) -> bool:
    return all(way in message for way in ("retrieval_head/", "EAGLE-3", "--retrieval-head", "`specontext distill`", "streaming"))


def test_auto_without_a_head_names_the_ways_to_get_one(
    write_family: Callable[..., Path], target: ModelShape, tmp_path: Path
) -> None:
    with pytest.raises(HeadError) as error:
        find_head("auto", model_name="some/model", model_path=tmp_path, target=target)
    assert "'some/model'" in str(error.value) and names_the_ways(str(error.value))
    with pytest.raises(HeadError) as error:
        LLM(write_family("llama"))
    assert names_the_ways(str(error.value))
    assert LLM(write_family("llama"), config=SpeContextConfig(method="streaming"))  # needs no head


def test_no_head_at_all_names_the_choices(target: ModelShape) -> None:
    with pytest.raises(HeadError, match=r"'speculative' needs a retrieval head: .*--retrieval-head.*another method"):
        find_head(None, model_name="some/model", model_path=None, target=target)


def test_a_head_whose_values_the_model_s_number_format_lacks(folder: Path, target: ModelShape) -> None:
    change_tensors(folder, lambda tensors: tensors[K_PROJ].index_put_((torch.tensor([2]),), torch.tensor(1e6)))
    places: dict[str, Any] = {"model_name": "some/model", "model_path": None}
    assert find_head(folder, target=target, **places)
    with pytest.raises(HeadError, match=rf"{K_PROJ} .* beyond 65504.*float16.*run the model in bfloat16 or float32"):
        find_head(folder, target=replace(target, dtype=torch.float16), **places)


def test_auto_prefers_the_checkpoint_s_own_head_and_a_directory_wins_over_auto(
    checkpoint: Callable[[str], Path], target: ModelShape, folder: Path
) -> None:
    known = next(iter(KNOWN_DRAFTS))
    change_tensors(folder, lambda tensors: tensors[K_PROJ].zero_())
    own = find_head("auto", model_name=known, model_path=checkpoint("llama"), target=target)
    named = find_head(folder, model_name=known, model_path=checkpoint("llama"), target=target)
    assert own.k_proj.weight.any() and not named.k_proj.weight.any()


def test_auto_takes_the_known_draft_of_a_model(target: ModelShape, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(source: str, **_: Any) -> None:
        asked.append(source)
        raise HeadError("stop here")

    monkeypatch.setattr("specontext.retrieval.catalog.load_head", refuse)
    for model, (draft, *_) in KNOWN_DRAFTS.items():
        with pytest.raises(HeadError):
            find_head("auto", model_name=model, model_path=None, target=target)
        assert asked.pop() == draft


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 3\n"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize(("content", "said"), [(POINTER, "git lfs pull"), (b"", "is empty"), (b"<html></html>", "web page")])
def test_what_a_download_leaves_in_place_of_a_file(
    folder: Path, name: str, content: bytes, said: str, target: ModelShape
) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(HeadError, match=said) as caught:
        load_head(folder, target=target)
    assert str(folder / name) in str(caught.value)


def test_tensors_that_a_head_does_not_take_and_quantised_heads_are_refused(folder: Path, target: ModelShape) -> None:
    name = "midlayer.self_attn.q_proj.weight_scale"
    change_tensors(folder, lambda tensors: tensors.update({name: torch.ones(1)}))
    with pytest.raises(HeadError, match=name):
        load_head(folder, target=target)
    change_config(folder, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(HeadError, match="quantised weights are not supported: awq, 4 bits"):
        load_head(folder, target=target)

"""Every tensor of a checkpoint's files reaches the model, or the checkpoint is refused with the tensor's or the file's name."""

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
from transformers import AutoModelForCausalLM, GPTNeoXConfig, MixtralConfig, PreTrainedConfig

from specontext.cli import main
from specontext.errors import ModelError
from specontext.models.loading import LoadedModel, load_model
from tests.conftest import write_checkpoint

Tensors = dict[str, Tensor]
QUERY = "model.layers.1.self_attn.q_proj.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 12345\n"
INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"


@pytest.fixture
def copy(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "copy"))


def load(folder: Path) -> LoadedModel:
    return load_model(folder, dtype="auto", device=torch.device("cpu"))


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def stored(folder: Path) -> Tensors:
    return dict(load_file(folder / "model.safetensors"))


def write(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_bin(folder: Path, content: Any) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


def shard(folder: Path, *, pickled: bool = False) -> list[Path]:
    """The weights in two files and an index."""
    tensors, table, files = stored(folder), {}, []
    (folder / "model.safetensors").unlink()
    for number in (1, 2):
        part = {name: tensors[name] for name in sorted(tensors)[number - 1 :: 2]}
        if pickled:
            files.append(folder / f"pytorch_model-0000{number}-of-00002.bin")
            torch.save(part, files[-1])
        else:
            files.append(folder / f"model-0000{number}-of-00002.safetensors")
            save_file(part, files[-1], metadata={"format": "pt"})
        table |= dict.fromkeys(part, files[-1].name)
    (folder / (BIN_INDEX if pickled else INDEX)).write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return files


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("pickled", [False, True])
def test_eight_bit_weights_are_refused_with_their_scales(copy: Path, pickled: bool) -> None:
    tensors = stored(copy)
    tensors[QUERY] = tensors[QUERY].to(torch.float8_e4m3fn)
    tensors[f"{QUERY}_scale"] = torch.tensor(0.5)
    if pickled:
        write_bin(copy, tensors)
    else:
        write(copy, tensors)
    said = refusal(copy)
    assert f"{QUERY} (float8_e4m3fn)" in said and f"{QUERY}_scale" in said and "take the checkpoint that" in said


@pytest.mark.parametrize("number", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32])
def test_numbers_that_stand_for_others_are_refused_without_scales_too(copy: Path, number: torch.dtype) -> None:
    tensors = stored(copy)
    write(copy, tensors | {QUERY: tensors[QUERY].to(number)})
    assert f"{QUERY} ({str(number).removeprefix('torch.')})" in refusal(copy)


@pytest.mark.parametrize(
    "name",
    [
        f"{QUERY}_scale",
        f"{QUERY}_scale_inv",
        "model.layers.1.self_attn.k_scale",
        "model.layers.0.mlp.up_proj.bias",
        "model.layers.0.self_attn.sinks",
        "model.layers.3.self_attn.q_proj.weight",  # the config says three layers
        "score.weight",
        "model.layers.0.self_attn.o_proj.lora_A.weight",
    ],
)
def test_tensors_that_the_model_does_not_take_are_refused_by_name(copy: Path, name: str) -> None:
    write(copy, stored(copy) | {name: torch.ones(3)})
    said = refusal(copy)
    assert f"{name} is not taken by LlamaForCausalLM" in said and ("quantised" in said) == ("scale" in name)


def test_missing_tensors_are_named_and_not_replaced_by_random_numbers(copy: Path) -> None:
    tensors = stored(copy)
    del tensors[QUERY]
    write(copy, tensors)
    assert f"incomplete and lack {QUERY}; download" in refusal(copy)


def test_shapes_that_differ_are_named_both(copy: Path) -> None:
    write(copy, stored(copy) | {"model.norm.weight": torch.ones(7)})
    assert "model.norm.weight has shape [7] where the config asks for [64]" in refusal(copy)


def test_what_former_code_stored_and_what_ties_and_predicts_further_tokens_is_no_fault(copy: Path) -> None:
    change_config(copy, num_nextn_predict_layers=1, tie_word_embeddings=True)
    tensors = stored(copy)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(12)
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.cos_cached"] = torch.ones(1, 1, 9, 24)
    tensors |= {name: torch.ones(4, 4) for name in ("model.layers.3.eh_proj.weight", "mtp.fc.weight")}
    write(copy, tensors)
    for name in ("consolidated.safetensors", "model-q4.gguf", "optimizer.pt", "training_args.bin"):
        (copy / name).write_bytes(b"another program's")
    assert torch.equal(load(copy).model.get_parameter(QUERY), tensors[QUERY])


def small(kind: type[PreTrainedConfig], vocabulary: int, **changes: Any) -> PreTrainedConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return kind(**sizes, vocab_size=vocabulary, max_position_embeddings=64, **changes)


def test_masks_that_gpt_neox_stored_are_no_fault(tmp_path: Path, tokenizer: Any) -> None:
    write_checkpoint(tmp_path, small(GPTNeoXConfig, len(tokenizer)), None, tokenizer)
    tensors = stored(tmp_path)
    for layer in range(2):
        tensors[f"gpt_neox.layers.{layer}.attention.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
        tensors[f"gpt_neox.layers.{layer}.attention.masked_bias"] = torch.tensor(-1e9)
    write(tmp_path, tensors)
    assert load(tmp_path).shape.layers == 2


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda tensors, name: tensors.pop(name), "is not there"),
        (lambda tensors, name: tensors.update({name: torch.ones(3, 4)}), r"has shape [3, 4] and its like have"),
        (lambda tensors, name: tensors.update({f"{name}_scale_inv": torch.ones(3)}), "_scale_inv is not taken"),
    ],
    ids=["missing", "shape", "scale"],
)
def test_experts_that_do_not_fit_together_are_named(tmp_path: Path, tokenizer: Any, damage: Any, said: str) -> None:
    config = small(MixtralConfig, len(tokenizer), num_key_value_heads=2, num_local_experts=4, sliding_window=None)
    write_checkpoint(tmp_path, config, None, tokenizer)
    tensors = stored(tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    damage(tensors, name)
    write(tmp_path, tensors)
    found = refusal(tmp_path)
    assert said in found and ("scale" in said or name in found)


@pytest.mark.parametrize("pickled", [False, True])
def test_shards_load_and_missing_ones_are_named(copy: Path, pickled: bool) -> None:
    whole = stored(copy)
    files = shard(copy, pickled=pickled)
    assert torch.equal(load(copy).model.get_parameter(QUERY), whole[QUERY])
    files[1].unlink()
    index = BIN_INDEX if pickled else INDEX
    assert f"incomplete: download {files[1].name}, which {index} names" in refusal(copy)
    shutil.copy(files[0], files[1])
    (copy / index).unlink()
    assert f"{index}, which says what lies in" in refusal(copy)


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "is not JSON"), ("{}", "weight_map"), ("", "is empty"), ('{"weight_map": {"a": "b"}}', "has no metadata")],
)
def test_a_broken_index(copy: Path, text: str, said: str) -> None:
    shard(copy)
    (copy / INDEX).write_text(text)
    found = refusal(copy)
    assert said in found and str(copy / INDEX) in found


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (POINTER, "git lfs pull"),
        (b"", "is empty; download it again"),
        (b"<!DOCTYPE html>\n<html>log in</html>", "it is a web page"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00not a header ...", "broken or truncated"),
    ],
    ids=["pointer", "empty", "page", "garbage"],
)
@pytest.mark.parametrize("file", ["model-00002-of-00002.safetensors", "pytorch_model-00002-of-00002.bin"])
def test_what_a_download_leaves_in_place_of_a_file(copy: Path, file: str, content: bytes, said: str) -> None:
    shard(copy, pickled=file.endswith("bin"))
    (copy / file).write_bytes(content)
    found = refusal(copy)
    assert said in found and str(copy / file) in found


class Code:
    """Something that is no tensor."""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"weight": Code()}, "broken or truncated, or holds more than tensors"),
        ({"state_dict": {}, "epoch": 3}, "holds more than tensors (state_dict, epoch)"),
        ([1, 2], "but a list"),
    ],
    ids=["code", "nested", "list"],
)
def test_pickles_that_hold_more_than_tensors(copy: Path, content: Any, said: str) -> None:
    write_bin(copy, content)
    found = refusal(copy)
    assert said in found and "weights_only" not in found


def test_a_truncated_pickle(copy: Path) -> None:
    write_bin(copy, stored(copy))
    file = copy / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-2000])
    assert f"{file} is broken or truncated" in refusal(copy)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (None, "model.safetensors or pytorch_model.bin is not there; download it too"),
        ("model-Q4_K_M.gguf", "to run a GGUF file (model-Q4_K_M.gguf), name the file itself"),
        ("consolidated.00.pth", "(consolidated.00.pth) are not read"),
        ("onnx/model.onnx", "ONNX files (onnx/model.onnx) are not read"),
        ("openvino_model.xml", "OpenVINO files (openvino_model.xml) are not read"),
        ("pytorch_model_fsdp_0/__0_0.distcp", "distributed checkpoints (pytorch_model_fsdp_0/__0_0.distcp) are not read"),
    ],
)
def test_no_weights(copy: Path, file: str | None, said: str) -> None:
    (copy / "model.safetensors").unlink()
    if file is not None:
        (copy / file).parent.mkdir(exist_ok=True)
        (copy / file).write_bytes(b"anything")
    assert said in refusal(copy)


def test_an_adapter_is_not_left_out_silently(copy: Path) -> None:
    (copy / "adapter_config.json").write_text("{}")
    load(copy)  # merged already: no weights of its own
    shutil.copy(copy / "model.safetensors", copy / "adapter_model.safetensors")
    assert "move it into a directory of its own" in refusal(copy)
    (copy / "config.json").unlink()
    assert "names no peft_type" in refusal(copy)


def test_directories_that_are_near_a_checkpoint(copy: Path) -> None:
    assert f"{copy} has one: name that directory" in refusal(copy.parent)
    assert "is a file: name the checkpoint directory" in refusal(copy / "model.safetensors")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", [POINTER, b"", b"{", b"[]", b"\xff\xfe{}"], ids=["pointer", "empty", "cut", "list", "bytes"])
def test_broken_settings_are_named(copy: Path, name: str, content: bytes) -> None:
    (copy / name).write_bytes(content)
    assert str(copy / name) in refusal(copy)


CODE = {
    "import absent_package_of_theirs\n": "pip install absent_package_of_theirs",
    "import os\nos.nothing_of_that_name\n": "AttributeError: module 'os' has no attribute",
    "def (\n": "SyntaxError",
    "from transformers import LlamaConfig\nclass Own(LlamaConfig):\n    model_type = 'own'\n": "has no attribute 'Model'",
}


@pytest.mark.parametrize("pickled", [False, True])
def test_a_tensor_in_two_files(copy: Path, pickled: bool) -> None:
    tensors = stored(copy)
    first, second = shard(copy, pickled=pickled)
    name = sorted(tensors)[0]
    assert name not in _tensors_of(second)
    for value in (tensors[name], torch.zeros_like(tensors[name])):
        content = _tensors_of(second) | {name: value}
        if pickled:
            torch.save(content, second)
        else:
            save_file(content, second, metadata={"format": "pt"})
        if value is tensors[name]:
            assert torch.equal(load(copy).model.state_dict()[name], value)
        else:
            assert f"{name} is in {first.name} and in {second.name}" in refusal(copy)


def _tensors_of(file: Path) -> Tensors:
    return dict(load_file(file) if file.suffix == ".safetensors" else torch.load(file))


@pytest.mark.parametrize("value", [3, ["model.safetensors"], True], ids=str)
def test_a_config_that_names_weights_by_no_text(copy: Path, value: Any) -> None:
    change_config(copy, transformers_weights=value)
    assert "transformers_weights should name a file" in refusal(copy)


OWN_DECODER = """from transformers import LlamaForCausalLM
class Own(LlamaForCausalLM):
    def forward(self, *args, **options):
        output = super().forward(*args, **options)
        output.logits = -output.logits
        return output
"""


def test_code_beside_a_type_that_the_library_knows_is_run_or_refused(copy: Path) -> None:
    (copy / "own.py").write_text(OWN_DECODER)
    allowed = {"dtype": "auto", "device": torch.device("cpu"), "trust_remote_code": True}
    change_config(copy, auto_map={"AutoModelForCausalLM": "own.Own"})
    said = refusal(copy)
    assert "Own (auto_map in config.json)" in said and "--trust-remote-code" in said and "remove auto_map" in said
    assert type(load_model(copy, **allowed).model).__name__ == "Own"
    change_config(copy, auto_map={"AutoModel": "own.Own"})  # of which the library takes nothing
    assert "Own (auto_map in config.json)" in refusal(copy)
    with pytest.raises(ModelError, match="it names no AutoModelForCausalLM"):
        load_model(copy, **allowed)
    # What the library has learned since.
    change_config(copy, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Llama_ForCausalLM"})
    assert type(load(copy).model).__name__ == "LlamaForCausalLM"


def test_code_of_a_checkpoint_runs_only_where_it_is_allowed(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_config(copy, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"})
    (copy / "own.py").write_text("raise SystemExit('ran')\n")
    assert "--trust-remote-code" in refusal(copy)
    assert main(["plan", str(copy), "--gpu-memory", "1GiB"]) == 1
    assert "--trust-remote-code" in capsys.readouterr().err


@pytest.mark.parametrize("code", CODE, ids=["import", "attribute", "syntax", "class"])
def test_code_that_fails_is_one_sentence(copy: Path, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    change_config(copy, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"})
    (copy / "own.py").write_text(code)
    assert main(["generate", str(copy), "--prompt", "a", "--method", "full", "--trust-remote-code"]) == 1
    said = capsys.readouterr().err
    assert CODE[code] in said and "Traceback" not in said


def test_what_transformers_writes_is_what_we_read(tmp_path: Path, tokenizer: Any) -> None:
    config = small(MixtralConfig, len(tokenizer), num_key_value_heads=2, num_local_experts=2, sliding_window=None)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path)
    found = load(tmp_path).model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())

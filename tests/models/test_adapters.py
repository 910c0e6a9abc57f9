"""LoRA adapters: their directory is the model's name, and what runs is what peft computes; or it is said what is wrong."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from specontext import LLM, SpeContextConfig
from specontext.cli import main
from specontext.errors import ModelError
from specontext.locations import NANO, shape_of
from specontext.models import adapters

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def adapter(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A random adapter of 'llama', written without peft."""
    folder, tensors = tmp_path / "adapter", {}
    folder.mkdir()
    base = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    generator = torch.Generator().manual_seed(4)
    for name, module in base.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            rows, columns = module.weight.shape
            for part, size in (("A", (4, columns)), ("B", (rows, 4))):
                tensors[f"base_model.model.{name}.lora_{part}.weight"] = torch.randn(size, generator=generator) * 0.3
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": TARGETS}
    change(folder, **config, base_model_name_or_path=str(checkpoint("llama")))
    return folder


def change(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


def base_of(folder: Path) -> str:
    return str(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        LLM(folder, config=SpeContextConfig(method="full"), device="cpu")
    return str(caught.value)


def test_an_adapter_is_merged_into_its_model(adapter: Path, prompts: list[list[int]], greedy: Any, expected: Any) -> None:
    peft = pytest.importorskip("peft", reason="adapters are merged by peft")
    model = AutoModelForCausalLM.from_pretrained(
        json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    model = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    right = [model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in prompts[1:3]]
    assert right != [tokens[:12] for tokens in expected("llama")[1:3]]
    llm = LLM(adapter, config=SpeContextConfig(budget=200, offload_layers=-1), device="cpu")  # with the head of its model
    outputs = llm.generate(prompts[1:3], greedy(12))
    assert [output.token_ids for output in outputs] == right
    assert outputs[0].stats["weights"] == "merged with the LoRA adapter adapter"


def test_parts_that_are_trained_whole_are_exchanged(adapter: Path, prompts: list[list[int]], greedy: Any) -> None:
    peft = pytest.importorskip("peft", reason="adapters are merged by peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], use_dora=True, task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base_of(adapter)), config)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0.5, 0.2, generator=generator)
    model.save_pretrained(str(adapter.parent / "whole"))
    llm = LLM(adapter.parent / "whole", config=SpeContextConfig(method="full"), device="cpu")
    ids = torch.tensor([prompts[1]])
    [output] = llm.generate(prompts[1], greedy(12))
    right = model.eval().generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=1)
    assert output.token_ids == right[0, ids.shape[1] :].tolist()


def test_adapters_that_do_not_fit_are_refused_by_tensor(adapter: Path) -> None:
    pytest.importorskip("peft", reason="adapters are merged by peft")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    for changed, words in (
        ({n: t for n, t in tensors.items() if n != name}, "is incomplete and lacks .*layers.1.self_attn.q_proj.lora_A"),
        (tensors | {name.replace("layers.1", "layers.7"): tensors[name].clone()}, "which lacks .*layers.7.self_attn.q_proj"),
        (tensors | {name: tensors[name][:, :-1].contiguous()}, "cannot merge the LoRA adapter .*size mismatch"),
        (tensors | {name: tensors[name] * torch.inf}, "cannot merge the LoRA adapter"),
    ):
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=words):
            LLM(adapter, config=SpeContextConfig(method="full"), device="cpu")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 1\n")
    assert "Git LFS" in refusal(adapter)


def test_settings_that_peft_does_not_know_are_refused_unless_they_say_nothing(adapter: Path) -> None:
    pytest.importorskip("peft", reason="adapters are merged by peft")
    change(adapter, from_the_future=None, also_from_there=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        LLM(adapter, config=SpeContextConfig(method="full"), device="cpu")
        change(adapter, from_the_future=True)
        assert "asks for from_the_future, which this version of peft does not know" in refusal(adapter)


def test_an_adapter_that_repeats_layers_is_refused_by_name(adapter: Path) -> None:
    pytest.importorskip("peft", reason="adapters are merged by peft")
    change(adapter, layer_replication=[[0, 2], [1, 3]])
    assert "repeats layers of" in (said := refusal(adapter)) and "(layer_replication)" in said


def test_a_change_of_one_of_two_tables_that_are_one_is_refused(
    adapter: Path, write_family: Callable[..., Path], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="adapters are merged by peft")
    base = write_family("qwen3", tie_word_embeddings=True)
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(tmp_path / "tied"))
    assert "the input and output embeddings of which are one" in refusal(tmp_path / "tied")


def test_without_peft_it_is_said_what_to_install(adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    assert "is a LoRA adapter of" in refusal(adapter) and 'pip install "specontext[lora]"' in refusal(adapter)
    assert main(["generate", str(adapter), "--prompt", "one", "--method", "full"]) == 1
    assert "specontext[lora]" in capsys.readouterr().err


def test_what_an_adapter_is_of_is_known_without_peft(
    adapter: Path, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    assert shape_of(adapter) == shape_of(checkpoint("llama"))
    assert main(["plan", str(adapter), "--gpu-memory", "1GiB", "--budget", "64", "--json"]) == 0
    dummy = {"load_format": "dummy", "device": "cpu"}
    llm = LLM(adapter, **dummy)
    assert llm.shape == shape_of(checkpoint("llama")) and "<|mine|>" not in llm.tokenizer.get_vocab()
    llm.tokenizer.add_tokens(["<|mine|>"])
    llm.tokenizer.save_pretrained(adapter)
    assert "<|mine|>" in LLM(adapter, **dummy).tokenizer.get_vocab(), "an adapter's own tokenizer"
    shutil.copytree(checkpoint("llama"), adapter / "base")
    change(adapter, base_model_name_or_path="base")
    assert shape_of(adapter).layers == 3, "a directory beside it"
    change(adapter, base_model_name_or_path="nano")
    assert shape_of(adapter) == shape_of(NANO)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "an adapter of type PREFIX_TUNING, and only LoRA adapters are merged"),
        ({"base_model_name_or_path": None}, "whose model is not known"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, "its model cannot be had: no checkpoint directory at /nowhere/at/all"),
        ({"base_model_name_or_path": "."}, "an adapter of an adapter"),
    ],
)
def test_broken_ones_are_refused_in_words(adapter: Path, changes: dict[str, Any], words: str) -> None:
    change(adapter, **changes)
    assert words in refusal(adapter)


def test_one_without_weights_is_refused(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    assert "without weights: download adapter_model.safetensors" in refusal(adapter)
    (adapter / "adapter_config.json").write_text("{")
    assert "adapter_config.json" in refusal(adapter)

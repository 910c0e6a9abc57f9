"""GGUF files run like the checkpoints that they were made from, and what would not is refused in words."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Format

from specontext import LLM, SpeContextConfig
from specontext.errors import ModelError
from specontext.locations import resolve_model_path, shape_of
from specontext.models.loading import load_tokenizer
from tests.gguf.gguf_files import byte_level, interleaved, weights_of, write_gguf

FULL = SpeContextConfig(method="full")
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


@pytest.fixture
def write(tmp_path: Path, checkpoint: Callable[[str], Path], tokenizer: Any) -> Callable[..., Path]:
    """write(family, **options of write_gguf): the family's checkpoint as a GGUF file."""

    def call(family: str = "llama", *, name: str = "model.gguf", pre: str = "gpt-2", **options: Any) -> Path:
        said = {"architecture": ARCHITECTURES[family]} | options
        return write_gguf(tmp_path / "files" / name, checkpoint(family), byte_level(tokenizer, pre, add_bos_token=True), **said)

    return call


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        resolve_model_path(path)
    return str(caught.value)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_tokens_equal_hugging_faces(family: str, write: Any, prompts: Any, expected: Any, greedy: Any) -> None:
    llm = LLM(write(family), config=FULL, device="cpu")
    outputs = llm.generate(prompts, greedy())
    assert [output.token_ids for output in outputs] == expected(family)
    assert outputs[0].stats["weights"] == "converted from F32"


def test_a_head_serves_the_converted_model(write: Any, checkpoint: Any, prompts: Any, greedy: Any, make_llm: Any) -> None:
    head = checkpoint("llama") / "retrieval_head"
    config = SpeContextConfig(budget=24, sink=2, recent=4)
    llm = LLM(write("llama"), head, config, device="cpu")
    asked = make_llm("llama", budget=24).generate(prompts, greedy())
    assert [output.token_ids for output in llm.generate(prompts, greedy())] == [output.token_ids for output in asked]


@pytest.mark.parametrize("format", [Format.Q4_1, Format.Q8_0, Format.F16, Format.BF16])
def test_weights_are_what_the_file_holds(format: Format, write: Any, checkpoint: Any) -> None:
    folder = resolve_model_path(write("llama", format=format))
    original, converted = weights_of(checkpoint("llama")), weights_of(folder)
    assert original.keys() == converted.keys()
    kept = {"F16": torch.float16}.get(format.name, torch.bfloat16)
    for name, values in original.items():
        numbers = values.detach().numpy()
        if numbers.ndim == 2:  # blocks lie along rows, so that the order of rows makes no difference
            numbers = gguf.dequantize(gguf.quantize(np.ascontiguousarray(numbers), format), format)
        assert torch.equal(converted[name], torch.tensor(numbers).to(kept).float()), name
    note = f"{'dequantised' if format.name.startswith('Q') else 'converted'} from {format.name}"
    assert json.loads((Path(folder) / "source.json").read_text())["weights"] == note


def test_a_part_that_is_quantised_is_said(write: Any) -> None:
    """However large the rest is: embeddings are often left in 16 bits, and most of a small model."""
    folder = Path(resolve_model_path(write("llama", format=Format.Q8_0, formats={"token_embd": Format.F16, "ffn": Format.F16})))
    assert json.loads((folder / "source.json").read_text())["weights"] == "dequantised from Q8_0"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"


def test_config_and_tokenizer(write: Any, checkpoint: Any, tokenizer: Any) -> None:
    path = write("qwen3")
    assert shape_of(path) == shape_of(checkpoint("qwen3"))
    made = load_tokenizer(path)
    assert made("").input_ids == tokenizer("").input_ids == [tokenizer.bos_token_id]
    assert (made.bos_token, made.eos_token) == (tokenizer.bos_token, tokenizer.eos_token)
    config = json.loads((Path(resolve_model_path(path)) / "generation_config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id


def test_tied_embeddings_need_no_output(write: Any, tmp_path: Path, write_family: Any, tokenizer: Any) -> None:
    folder = write_family("llama", tie_word_embeddings=True)
    path = write_gguf(tmp_path / "tied.gguf", folder, byte_level(tokenizer, "gpt-2"), architecture="llama")
    converted = resolve_model_path(path)
    assert json.loads((Path(converted) / "config.json").read_text())["tie_word_embeddings"]
    assert all(torch.equal(values, weights_of(converted)[name]) for name, values in weights_of(folder).items())


def test_rope_of_llama_3_is_found_again(tmp_path: Path, write_family: Any, tokenizer: Any) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    folder = write_family("llama", rope_parameters=rope | {"original_max_position_embeddings": 8192}, head_dim=128)
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq
    plain = 500000.0 ** (-torch.arange(0, 128, 2) / 128)
    factors = (plain / made).numpy()
    options: dict[str, Any] = {"architecture": "llama", "tensors": {"rope_freqs.weight": factors}}
    path = write_gguf(tmp_path / "llama3.gguf", folder, byte_level(tokenizer, "gpt-2"), **options)
    read = AutoModelForCausalLM.from_pretrained(resolve_model_path(path))
    torch.testing.assert_close(read.model.rotary_emb.inv_freq, made)
    options["tensors"] = {"rope_freqs.weight": factors[::-1].copy()}
    assert "rope_freqs.weight" in refusal(write_gguf(tmp_path / "odd.gguf", folder, byte_level(tokenizer, "gpt-2"), **options))


@pytest.mark.parametrize(
    ("settings", "rope"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.original_context_length": 256},
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256},
        ),
        ({"rope.scaling.type": "none"}, {"rope_type": "default"}),
    ],
)
def test_scaled_rope(settings: dict[str, Any], rope: dict[str, Any], write: Any) -> None:
    config = json.loads((Path(resolve_model_path(write("qwen2", settings=settings))) / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_theta": 10000.0} | rope


def test_a_directory_with_one_file_is_its_model(write: Any) -> None:
    path = write("llama")
    assert resolve_model_path(path.parent) == resolve_model_path(path)
    shutil.copy(path, path.with_name("other.gguf"))
    assert "other.gguf" in refusal(path.parent) and "name one of them: model.gguf" in refusal(path.parent)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architecture": "bloom"}, "architecture 'bloom'"),
        ({"settings": {"expert_count": 8}}, "a mixture of experts"),
        ({"settings": {"attention.sliding_window": 4096}}, "a sliding window of 4096"),
        ({"settings": {"attention.head_count_kv": [1, 2, 2]}}, "differs from layer to layer"),
        ({"settings": {"logit_scale": 0.5}}, "the setting llama.logit_scale"),
        ({"settings": {"rope.dimension_count": 12}}, "RoPE turns 12 of 24"),
        ({"settings": {"rope.scaling.type": "longrope"}}, "RoPE scaled by 'longrope'"),
        ({"settings": {"block_count": None}}, "does not say llama.block_count"),
        ({"settings": {"block_count": 10**9}}, "says 1000000000 layers and has tensors of 3"),
        ({"settings": {"block_count": "many"}}, "is broken: its metadata cannot be understood"),
        ({"settings": {"context_length": "long"}}, "is broken: its metadata cannot be understood"),
        ({"settings": {"embedding_length": 7}}, "is broken: its metadata cannot be understood"),
        ({"settings": {"rope.freq_base": "big"}}, "is broken: its metadata cannot be understood"),
        ({"settings": {"attention.head_count": 0}}, "is broken: its metadata cannot be understood"),
        ({"without": "blk.1.ffn_up"}, "nothing for model.layers.1.mlp.up_proj.weight"),
        ({"tensors": {"blk.0.attn_q.bias": np.zeros(96, np.float32)}}, "is incomplete"),
        ({"tensors": {"blk.0.other.weight": np.zeros(9, np.float32)}}, "a tensor blk.0.other.weight [9], which"),
        ({"pre": "poro"}, "splits text the way 'poro'"),
        ({"settings": {"embedding_length": 128, "attention.key_length": 24}}, "not ["),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(options: dict[str, Any], words: str, write: Any, cache: Path) -> None:
    assert words in refusal(write("llama", **options))
    assert not list(cache.glob("gguf/[!.]*")) and not list(cache.glob("gguf/*.part"))


def test_an_unsupported_quantisation_is_refused(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("llama", format=Format.Q4_1)
    monkeypatch.delitem(gguf.quants._type_traits, Format.Q4_1)  # as that of a newer llama.cpp than the package's
    assert "the quantisation Q4_1 of" in refusal(path) and "is not supported" in refusal(path)


def test_parts_of_a_model_are_refused(write: Any) -> None:
    path = write("llama", name="model-00001-of-00002.gguf", parts=2)
    assert "is one of 2 parts" in refusal(path)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK" + bytes(100), b"GGUF" + b"\xff" * 100])
def test_broken_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    assert "is not a GGUF file, or it is broken" in refusal(path)


def test_truncated_file(write: Any) -> None:
    path = write("llama")
    path.write_bytes(path.read_bytes()[:-20000])
    assert "broken or truncated" in refusal(path)


def test_a_missing_file_is_no_hub_id() -> None:
    assert "no checkpoint directory at" in refusal(Path("files/nowhere.gguf"))
    with pytest.raises(ModelError, match="no checkpoint directory at"):
        resolve_model_path("files/nowhere.gguf")


def test_without_the_package(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert re.search(r"pip install .*\[gguf\]", refusal(path))


def test_order_of_rows() -> None:
    rows = np.arange(8)[:, None] * np.ones((1, 2))
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]

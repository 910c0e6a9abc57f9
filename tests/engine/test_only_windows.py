"""Models whose layers all have a window: any length that they were made for, rings alone, the same whatever the method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.distill.session import Session
from specontext.distill.settings import DistillConfig
from specontext.errors import ConfigError
from tests.conftest import randomise

CHUNKED = {"layer_types": ["chunked_attention"] * 3, "attention_chunk_size": 24, "no_rope_layers": [1, 1, 1]}
MODELS: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": 24, "head_dim": 16},
    "Phi3": {"sliding_window": 23},
    "Starcoder2": {"sliding_window": 24},
    "Qwen2": {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 0},
    "Llama4Text": {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 96, **CHUNKED},
}
SOME = ["Mistral", *(pytest.param(name, marks=pytest.mark.slow) for name in list(MODELS)[1:])]


@pytest.fixture
def write(tmp_path: Path, tokenizer: Any) -> Callable[[str], PreTrainedModel]:
    """write(architecture): the model, stored in tmp_path without a head."""

    def make(architecture: str) -> PreTrainedModel:
        common = {
            **{"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
            **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "tie_word_embeddings": False},
        }
        config = getattr(transformers, f"{architecture}Config")(**common | MODELS[architecture])
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        randomise(model, seed=1)
        model.eval().save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return model

    return make


def greedy(count: int = 12, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, **options)


@pytest.mark.parametrize("architecture", SOME)
def test_tokens_are_hugging_face_s_whatever_the_method(
    architecture: str, write: Any, tmp_path: Path, prompts: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    model = write(architecture)
    asked = [*prompts[1:3], prompts[2] + prompts[1] + prompts[2]]
    right = []
    for prompt in asked:
        output = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=1)
        right.append(output[0, len(prompt) :].tolist())
    options = {"device": "cpu", "max_num_batched_tokens": 40, "methods": ("full", "quest", "streaming")}
    llm = LLM(tmp_path, config=SpeContextConfig(offload_layers=2), **options)  # without a head, which none of them needs
    assert (
        "all 3 layers attend to a window of 2" in caplog.text
        and "without effect: method speculative, offload_layers 2" in caplog.text
    )
    assert llm.shape.max_position == 512 and llm.engine.parts.max_tokens == 512
    for method in (None, "full", "quest", "streaming"):
        outputs = llm.generate(asked, greedy(method=method))
        assert [output.token_ids for output in outputs] == right, method
    assert llm.generate(asked[:1], greedy(method="quest", budget=32))[0].token_ids == right[0]
    assert [output.stats["cached_tokens"] for output in outputs] == [(len(prompt) - 1) // 16 * 16 for prompt in asked]
    assert outputs[2].stats["offloaded_layers"] == 0 and outputs[2].stats["bytes_full_per_step"] == 0
    if architecture != "Llama4Text":  # of a chunk a token reads those before it
        assert outputs[2].stats["tokens_read_per_step"] == (23 if architecture == "Phi3" else 24)
    llm.engine.parts.kv.check_integrity(llm.engine.parts.methods.held_pages)


def test_what_a_request_holds_does_not_grow_with_its_context(write: Any, tmp_path: Path, prompts: list[list[int]]) -> None:
    write("Mistral")
    llm = LLM(tmp_path, config=SpeContextConfig(method="full"), device="cpu", max_num_seqs=2)
    plan = llm.engine.parts.plan
    assert plan.fixed["windows"] > 100 * plan.kv.token(0), "a token's place in the books is nothing beside its windows"
    assert llm.shape.kv_bytes_per_token == 0


def test_what_has_no_meaning_is_refused(write: Any, tmp_path: Path) -> None:
    write("Mistral")
    for options, words in (({"measure_recall": True}, "measure_recall"), ({"kv_cache_dtype": "int8"}, "kv_cache_dtype int8")):
        with pytest.raises(ConfigError, match=f"{words} has .* all have a window"):
            LLM(tmp_path, config=SpeContextConfig(), device="cpu", **options)
    with pytest.raises(ConfigError, match="no head can be of use"):
        Session(str(tmp_path), tmp_path / "head", ("tasks",), DistillConfig(1), length=64).run()

"""Architectures beyond those of the other tests: Hugging Face's tokens exactly, or a refusal that says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.locations import ModelError
from specontext.retrieval.checkpoint import save_head
from specontext.retrieval.head import RetrievalHead
from specontext.retrieval.head_config import HeadConfig
from tests.conftest import randomise

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
RUN: dict[str, dict[str, Any]] = {
    "Cohere": {},
    "Gemma": {"head_dim": 16},
    "Glm4": {"head_dim": 16},
    "GPTNeoX": {"num_key_value_heads": 4},
    "Granite": {"attention_multiplier": 0.3},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "Olmo2": {},
    "Phi3": {"sliding_window": None},
    "Qwen2Moe": {"num_experts": 4, "shared_expert_intermediate_size": 32, **EXPERTS},
    "Qwen3Moe": {"num_experts": 4, "head_dim": 24, **EXPERTS},
    "SmolLM3": {},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Falcon": ({}, "its attention cannot be exchanged"),
    "Gemma2": ({"head_dim": 16}, "Gemma2ForCausalLM is not supported: it uses a soft cap on attention logits"),
    "Olmo3": ({}, "Olmo3ForCausalLM is not supported: it uses layers of type sliding_attention"),
    "StableLm": ({}, "StableLmForCausalLM is not supported: its layers do not pass on what the engine gives them"),
    "GPTNeoX": (
        {"num_key_value_heads": 2},
        "layer 0 has keys of 4 heads with 16 dimensions, the config says 2 heads with 16 dimensions",
    ),
}

Write = Callable[..., PreTrainedModel]


@pytest.fixture
def write(tmp_path: Path, tokenizer: Any) -> Write:
    """write(architecture, changes of a tiny config): the model, stored in tmp_path."""

    def make(architecture: str, changes: dict[str, Any]) -> PreTrainedModel:
        common = {
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
            "tie_word_embeddings": False,
        }
        config = getattr(transformers, f"{architecture}Config")(**common | changes)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        randomise(model, seed=1)
        model.eval().save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return model

    return make


def check_tokens(llm: LLM, model: PreTrainedModel, prompts: list[list[int]]) -> None:
    found = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
    for prompt, output in zip(prompts, found, strict=True):
        right = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=1)
        assert output.token_ids == right[0, len(prompt) :].tolist()


@pytest.mark.parametrize("architecture", RUN)
def test_tokens_are_hugging_face_s(architecture: str, write: Write, tmp_path: Path, prompts: list[list[int]]) -> None:
    model = write(architecture, RUN[architecture])
    everything = SpeContextConfig(method="oracle", budget=512, offload_layers=1)
    check_tokens(LLM(tmp_path, config=everything, device="cpu"), model, prompts[1:3])


def test_a_retrieval_head_for_experts(write: Write, tmp_path: Path, tokenizer: Any, prompts: list[list[int]]) -> None:
    model = write("Qwen3Moe", RUN["Qwen3Moe"])
    shape: dict[str, Any] = {"hidden_size": 64, "target_hidden_size": 64, "vocab_size": len(tokenizer), "head_dim": 16}
    head = RetrievalHead(HeadConfig("features", heads=4, kv_heads=2, feature_layers=(0, 2, 3), rope_theta=500.0, **shape))
    randomise(head, seed=2)
    save_head(head, tmp_path / "retrieval_head")
    check_tokens(LLM(tmp_path, config=SpeContextConfig(budget=512, offload_layers=-1), device="cpu"), model, prompts[1:3])
    few = LLM(tmp_path, config=SpeContextConfig(budget=24, sink=2, recent=4, offload_layers=-1), device="cpu")
    (output,) = few.generate(prompts[2:3], SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
    assert output.stats["tokens_read_per_step"] == 24


@pytest.mark.parametrize("architecture", REFUSED)
def test_what_the_engine_cannot_run_is_refused_when_it_is_loaded(architecture: str, write: Write, tmp_path: Path) -> None:
    changes, why = REFUSED[architecture]
    write(architecture, changes)
    with pytest.raises(ModelError, match=why):
        LLM(tmp_path, config=SpeContextConfig(method="full"), device="cpu")


def test_layers_without_attention_are_refused(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("SmolLM3", {})
    from transformers.models.smollm3.modeling_smollm3 import SmolLM3DecoderLayer

    forward = SmolLM3DecoderLayer.forward

    def skipping(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return hidden_states if self.self_attn.layer_idx == 1 else forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(SmolLM3DecoderLayer, "forward", skipping)
    with pytest.raises(ModelError, match="of its 3 layers these have ordinary attention: 0, 2"):
        LLM(tmp_path, config=SpeContextConfig(method="full"), device="cpu")

"""Architectures of GGUF files whose tensors, norms, windows or experts are of their own: tokens are the unmodified model's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from specontext import LLM, SpeContextConfig
from specontext.errors import ModelError
from specontext.locations import resolve_model_path, shape_of
from specontext.retrieval.checkpoint import save_head
from specontext.retrieval.random_head import random_head
from tests.conftest import randomise
from tests.gguf.gguf_files import byte_level, weights_of, write_gguf

NEAR, FAR = "sliding_attention", "full_attention"
WINDOW = {"attention.sliding_window": 24}
EXPERTS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}
SOME = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Of each architecture: the class, its config, and metadata of the file beyond those that every file has.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma": ("Gemma", {"head_dim": 24}, {"rope.freq_base": None}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 24, "attn_logit_softcapping": 3.0},
        WINDOW | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3": (
        "Gemma3Text",
        {
            **{"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 24, "num_hidden_layers": 7},
            "rope_parameters": {
                FAR: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                NEAR: {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        WINDOW | {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    ),
    "qwen2moe": (
        "Qwen2Moe",
        SOME | {"shared_expert_intermediate_size": 48},
        EXPERTS | {"expert_shared_feed_forward_length": 48},
    ),
    "qwen3moe": ("Qwen3Moe", SOME | {"head_dim": 24, "norm_topk_prob": True}, EXPERTS),
}


@pytest.fixture
def model(tokenizer: Any) -> Callable[..., PreTrainedModel]:
    """model(architecture, **changes of its config): a small one with random weights."""

    def make(architecture: str, **changes: Any) -> PreTrainedModel:
        kind, own, _ = FAMILIES[architecture]
        common = {
            **{"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
            **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
        }
        config = getattr(transformers, f"{kind}Config")(**common | own | changes)
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        randomise(made, seed=1)
        return made.eval()

    return make


@pytest.fixture
def write(tmp_path: Path, tokenizer: Any) -> Callable[..., Path]:
    def call(made: PreTrainedModel, architecture: str, settings: dict[str, Any] | None = None, **options: Any) -> Path:
        said = FAMILIES[architecture][2] | (settings or {})
        metadata = byte_level(tokenizer, "gpt-2", add_bos_token=True)
        return write_gguf(tmp_path / "model.gguf", made, metadata, architecture=architecture, settings=said, **options)

    return call


@pytest.mark.parametrize("architecture", FAMILIES)
def test_tokens_equal_hugging_faces(
    architecture: str, model: Any, write: Any, tmp_path: Path, prompts: list[list[int]], greedy: Any
) -> None:
    made = model(architecture)
    path = write(made, architecture)
    converted = weights_of(Path(resolve_model_path(path)))
    for name, values in made.named_parameters():
        torch.testing.assert_close(converted[name], values, atol=1e-6, rtol=0)  # a norm's origin was added and taken away
    save_head(random_head(shape_of(path)), tmp_path / "head")
    right = []
    for prompt in prompts[1:3]:
        output = made.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=1)
        right.append(output[0, len(prompt) :].tolist())
    llm = LLM(path, tmp_path / "head", SpeContextConfig(budget=512, offload_layers=1), device="cpu")
    assert [output.token_ids for output in llm.generate(prompts[1:3], greedy(12))] == right


def test_layers_with_a_window_are_those_that_llama_cpp_takes(model: Any, write: Any) -> None:
    def config(settings: dict[str, Any]) -> dict[str, Any]:
        path = write(model("gemma3"), "gemma3", settings)
        values: dict[str, Any] = json.loads((Path(resolve_model_path(path)) / "config.json").read_text())
        return values

    assert config({})["layer_types"] == [NEAR] * 5 + [FAR, NEAR]
    assert config({"attention.sliding_window_pattern": 3})["layer_types"] == [NEAR, NEAR, FAR] * 2 + [NEAR]
    own = [True, False, True, True, False, True, True]
    named = config({"attention.sliding_window_pattern": own, "rope.freq_base_swa": 5000.0})
    assert named["layer_types"] == [NEAR if near else FAR for near in own]
    assert named["rope_parameters"][NEAR]["rope_theta"] == 5000.0
    assert config({"attention.sliding_window": None})["layer_types"] == [FAR] * 7


def test_queries_of_the_largest_models_are_scaled_by_their_share_of_the_hidden_size(model: Any, write: Any) -> None:
    for architecture, depth in (("gemma2", 46), ("gemma3", 62)):
        path = write(model(architecture, num_hidden_layers=depth, hidden_size=128), architecture)
        assert json.loads((Path(resolve_model_path(path)) / "config.json").read_text())["query_pre_attn_scalar"] == 128 // 4


def test_an_output_ends_with_a_turn_too(model: Any, write: Any, tokenizer: Any, tmp_path: Path) -> None:
    metadata = byte_level(tokenizer, "gpt-2")
    metadata["ggml.tokens"] = [*metadata["ggml.tokens"][:-1], "<end_of_turn>"]
    path = write_gguf(tmp_path / "turn.gguf", model("gemma"), metadata, architecture="gemma")
    ends = json.loads((Path(resolve_model_path(path)) / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [metadata["ggml.eos_token_id"], len(tokenizer) - 1]


@pytest.mark.parametrize(
    ("architecture", "options", "words"),
    [
        ("gemma3", {"settings": {"attention.sliding_window_pattern": [True]}}, "speaks of 1 layers, and it has 7"),
        ("gemma3", {"settings": {"attn_logit_softcapping": 50.0}}, "the setting gemma3.attn_logit_softcapping"),
        ("gemma2", {"settings": {"rope.freq_base_swa": 5.0}}, "two bases of RoPE"),
        ("gemma2", {"without": "blk.1.post_ffw_norm"}, "nothing for model.layers.1.post_feedforward_layernorm.weight"),
        ("qwen3moe", {"settings": {"expert_weights_scale": 2.5}}, "the setting qwen3moe.expert_weights_scale"),
        ("qwen3moe", {"settings": {"expert_count": None}}, "does not say qwen3moe.expert_count"),
        ("qwen3moe", {"without": "blk.2.ffn_up_exps"}, "a tensor blk.2.ffn_gate_exps.weight [4, 32, 64], not [4, 64, 64]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(architecture: str, options: dict[str, Any], words: str, model: Any, write: Any) -> None:
    path = write(model(architecture), architecture, **options)
    with pytest.raises(ModelError) as caught:
        resolve_model_path(path)
    assert words in str(caught.value)

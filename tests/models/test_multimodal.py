"""Checkpoints that read images too: their language model gives Hugging Face's tokens for text, under names old and new."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.errors import ModelError
from specontext.locations import read_config, shape_of
from specontext.memory.facts import facts_of_config
from specontext.retrieval.checkpoint import save_head
from specontext.retrieval.random_head import random_head
from tests.conftest import randomise
from tests.models.architectures import MULTIMODAL
from tests.models.rank_threads import check

TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
ALTERNATING = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
VISION: dict[str, Any] = SMALL | {"image_size": 16}
QWEN: dict[str, Any] = {"depth": 1, "num_heads": 2, "patch_size": 8, "out_hidden_size": 64, "hidden_size": 32}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
DELTA |= {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# By the name of their configuration class: entries of the text's config and of the vision's, and what the class itself needs.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "Gemma3": ({"head_dim": 16, **ALTERNATING}, VISION, {"mm_tokens_per_image": 1}),
    "Gemma4": (
        {"head_dim": 16, "global_head_dim": 32, "num_hidden_layers": 5, "num_kv_shared_layers": 2, "sliding_window": 12}
        | {"layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]}
        | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 1900, "use_double_wide_mlp": True},
        SMALL | {"head_dim": 16},
        {"audio_config": None},
    ),
    "Llama4": (
        {
            **{"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 96, "attention_chunk_size": 12},
            **{"layer_types": ["chunked_attention", "full_attention", "chunked_attention"], "no_rope_layers": [1, 0, 1]},
        },
        VISION | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        {},
    ),
    "Mistral3": ({"model_type": "mistral", "head_dim": 16, "sliding_window": None}, VISION | {"model_type": "pixtral"}, {}),
    "Qwen2_5_VL": (SECTIONS, QWEN | {"intermediate_size": 32, "fullatt_block_indexes": [0]}, {}),
    "Qwen2VL": (SECTIONS, {"depth": 1, "num_heads": 2, "embed_dim": 32, "hidden_size": 64, "patch_size": 8}, {}),
    "Qwen3_5": (DELTA, QWEN | {"intermediate_size": 32}, {}),
    "Qwen3_5Moe": (DELTA | {"shared_expert_intermediate_size": 32} | EXPERTS, QWEN | {"intermediate_size": 32}, {}),
    "Qwen3VL": ({"head_dim": 16, **SECTIONS}, QWEN | {"intermediate_size": 32, "deepstack_visual_indexes": []}, {}),
    "Qwen3VLMoe": (
        {"head_dim": 16, **SECTIONS, **EXPERTS},
        QWEN | {"intermediate_size": 32, "deepstack_visual_indexes": []},
        {},
    ),
    "Llava": ({"model_type": "llama"}, VISION | {"model_type": "clip_vision_model"}, {}),
}
QUICK = ("Gemma3", "Qwen2_5_VL")
SOME = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
assert sorted(KINDS) == sorted(MULTIMODAL), "the table of docs/models.md names what is tested here"
Write = Callable[..., PreTrainedModel]


@pytest.fixture
def write(tmp_path: Path, tokenizer: Any) -> Write:
    """write(kind): the model, stored in tmp_path with a random retrieval head."""

    def make(kind: str, **text: Any) -> PreTrainedModel:
        own, vision, others = KINDS[kind]
        of_text = TEXT | {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1} | own | text
        tied = {"tie_word_embeddings": of_text["tie_word_embeddings"]}
        names = ("image_token_id", "image_token_index", "video_token_id", "boi_token_index", "eoi_token_index")
        tokens = dict.fromkeys(names, 2)
        config = getattr(transformers, f"{kind}Config")(text_config=of_text, vision_config=vision, **tied | tokens | others)
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="eager")
        randomise(model, seed=1)
        model.tie_weights()
        model.eval().save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        save_head(random_head(shape_of(tmp_path)), tmp_path / "retrieval_head")
        return model

    return make


def right_tokens(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    return [model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in prompts]


def tokens_of(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize("kind", SOME)
def test_text_gives_hugging_face_s_tokens(kind: str, write: Write, tmp_path: Path, prompts: list[list[int]]) -> None:
    model = write(kind)
    # Of Llama 4 the library's class for both does not get through generate() without images.
    right = right_tokens(model.language_model if kind == "Llama4" else model, prompts[1:3])
    llm = LLM(tmp_path, config=SpeContextConfig(budget=512, offload_layers=-1), device="cpu", max_num_batched_tokens=40)
    assert tokens_of(llm, prompts[1:3]) == right
    parameters = sum(p.numel() for p in llm.engine.loaded.model.parameters())
    assert parameters < sum(p.numel() for p in model.parameters()), "what reads images is not loaded"
    assert facts_of_config("it", read_config(tmp_path)).parameters == parameters
    llm.reconfigure(SpeContextConfig(budget=24, sink=2, recent=4, offload_layers=-1))
    (output,) = llm.generate(prompts[2:3], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
    assert output.stats["tokens_read_per_step"] == 24


OLD = {
    "Gemma3": {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower."},
    "Mistral3": {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    "Qwen2_5_VL": {"model.language_model.": "model.", "model.visual.": "visual."},
}


@pytest.mark.parametrize("kind", OLD)
@pytest.mark.parametrize("tied", [False, True])
def test_names_of_former_versions(kind: str, tied: bool, write: Write, tmp_path: Path, prompts: list[list[int]]) -> None:
    model = write(kind, tie_word_embeddings=tied)
    right = right_tokens(model, prompts[1:2])
    file = tmp_path / "model.safetensors"
    renamed = {}
    for name, tensor in load_file(file).items():
        for new, old in OLD[kind].items():
            name = old + name.removeprefix(new) if name.startswith(new) else name
        renamed[name] = tensor
    save_file(renamed, file, {"format": "pt"})
    llm = LLM(tmp_path, config=SpeContextConfig(method="full"), device="cpu")
    assert tokens_of(llm, prompts[1:2]) == right


def test_a_tensor_of_the_language_model_that_is_missing_or_foreign_is_named(write: Write, tmp_path: Path) -> None:
    write("Qwen2_5_VL")
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    gone = next(name for name in whole if name.endswith("layers.1.self_attn.q_proj.weight"))
    save_file({name: tensor for name, tensor in whole.items() if name != gone}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack model\.layers\.1\.self_attn\.q_proj\.weight"):
        LLM(tmp_path, config=SpeContextConfig(method="full"), device="cpu")
    save_file(whole | {gone.replace("weight", "scale"): torch.ones(1)}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj\.scale"):
        LLM(tmp_path, config=SpeContextConfig(method="full"), device="cpu")


def test_random_weights_need_the_config_alone(write: Write, tmp_path: Path) -> None:
    write("Qwen3VL")
    (tmp_path / "model.safetensors").unlink()
    llm = LLM(tmp_path, config=SpeContextConfig(method="full"), device="cpu", load_format="dummy")
    assert len(tokens_of(llm, [[5, 6, 7]])[0]) == 12
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen3_vl"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), list(zip(KINDS, cycle((2, 4)), strict=False)))
def test_ranks_compute_what_one_process_computes(kind: str, size: int, write: Write, tmp_path: Path) -> None:
    write(kind)
    check(tmp_path, size)

"""What a config says of attention, positions and length: followed, refused by name, or a bound of the context."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

import specontext
from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.cli.named_model import find_facts
from specontext.errors import ConfigError, ModelError, RequestError
from specontext.locations import quantization_of_source, read_config, shape_of
from specontext.model_shape import ModelShape
from specontext.models.config_check import check_supported
from tests.conftest import need_latents

NEWER = ("DeepseekV32Config",)  # which the oldest supported version of transformers does not have
SIZES = {
    "vocab_size": 1839,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LINEAR = {"type": "linear", "factor": 2.0}
FULL = SpeContextConfig(method="full")


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., PreTrainedConfig]:
    """read(model_type, entries): the config, as it is read from a file that has these entries too."""

    def written(model_type: str, **entries: Any) -> PreTrainedConfig:
        values = SIZES | {"model_type": model_type, "architectures": ["SomeModel"]} | entries
        (tmp_path / "config.json").write_text(json.dumps(values))
        config: PreTrainedConfig = AutoConfig.from_pretrained(tmp_path)
        return config

    return written


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0} | more


@pytest.mark.parametrize(
    ("config", "feature"),
    [
        *[
            (getattr(transformers, name)(), "uses layers of type indexed_attention")
            for name in NEWER
            if hasattr(transformers, name)
        ],
        (T5Config(), "is an encoder-decoder"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PreTrainedConfig) else "",
)
def test_unsupported_attention_is_refused_by_name(config: PreTrainedConfig, feature: str) -> None:
    config.architectures = ["SomeModel"]
    with pytest.raises(ModelError, match=rf"SomeModel is not supported: it {feature}"):
        check_supported(config)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(),
        MistralConfig(sliding_window=None),
        Qwen2Config(),  # names a window, and does not use it
        Qwen3Config(),
        LlamaConfig(rope_parameters=rope("linear")),
        LlamaConfig(rope_parameters=rope("yarn", original_max_position_embeddings=64)),
    ],
    ids=lambda config: type(config).__name__,
)
def test_plain_decoders_are_accepted(config: PreTrainedConfig) -> None:
    check_supported(config)


@pytest.mark.parametrize("model_type", ["clip", "align"])
def test_several_models_in_one_are_refused_as_such(
    model_type: str, read: Callable[..., PreTrainedConfig], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"it is made of several models .*only decoders of text|encoder-decoder"):
        check_supported(read(model_type))
    with pytest.raises(ModelError, match="it is made of several models"):
        shape_of(tmp_path)


@pytest.mark.parametrize("entries", [{"rope_parameters": rope("default") | {"rope_type": [[1]]}}, {"architectures": 5}])
def test_entries_of_another_kind_are_one_sentence(tmp_path: Path, entries: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": "llama"} | entries))
    with pytest.raises(ModelError) as refused:
        LLM(tmp_path, config=FULL, load_format="dummy")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", [{}, [], 5, True, "", "x", "torch.bfloat16", "Tensor"])
def test_a_number_format_that_is_none(tmp_path: Path, name: str, value: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": "llama", name: value}))
    with pytest.raises(ModelError, match=f"{name} is .*, which names no number format"):
        read_config(tmp_path)


def test_weights_in_64_bits_are_not_quantised_and_run_in_32(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": "llama", "dtype": "float64"}))
    assert quantization_of_source(tmp_path) is None
    assert read_config(tmp_path).dtype == torch.float32


def test_an_activation_that_nobody_knows(read: Callable[..., PreTrainedConfig]) -> None:
    with pytest.raises(ModelError, match="hidden_act nope"):
        check_supported(read("llama", hidden_act="nope"))


def test_attention_both_ways_is_refused_unless_it_is_that_of_images() -> None:
    kinds = ["sliding_attention", "full_attention"]
    check_supported(Gemma4TextConfig(num_hidden_layers=2, layer_types=kinds, use_bidirectional_attention="vision"))
    with pytest.raises(ModelError, match="its attention is not causal"):
        check_supported(Gemma4TextConfig(num_hidden_layers=2, layer_types=kinds, use_bidirectional_attention="all"))


def test_layers_that_would_use_the_kv_of_none_or_of_whom_their_class_does_not_know(read: Callable[..., PreTrainedConfig]) -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    why = r"layer 2 uses the keys and values of a full_attention layer before layer 2, and there is none \(num_kv_shared_layers 2"
    with pytest.raises(ModelError, match=why):
        check_supported(Gemma3nTextConfig(num_hidden_layers=4, layer_types=kinds, num_kv_shared_layers=2))
    with pytest.raises(ModelError, match="its config has num_kv_shared_layers 2, which changes attention"):
        check_supported(read("llama", num_kv_shared_layers=2))
    check_supported(Gemma3nTextConfig())


def test_a_text_model_with_a_config_of_text_in_it(read: Callable[..., PreTrainedConfig], tmp_path: Path) -> None:
    read("llama", text_config={"a": 1})
    with pytest.raises(ModelError, match=r"it has a config of text in it \(text_config\)"):
        LLM(tmp_path, config=FULL)


@pytest.mark.parametrize(
    ("new", "old", "said"),
    [
        ({"rope_theta": 5e5, "rope_type": "default"}, {"rope_theta": 1e4}, "rope_theta 500000.0, .* 10000.0"),
        ({"rope_theta": 5e5, "rope_type": "default"}, {"rope_scaling": {"type": "linear", "factor": 4.0}}, "factor None, .* 4.0"),
        ({"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}, {"rope_scaling": {"factor": 4.0}}, "factor 2.0, .* 4.0"),
        ({"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}, {"rope_scaling": LINEAR}, "rope_theta 500000.0, .* None"),
        ({"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}, {"rope_theta": 5e5, "rope_scaling": LINEAR}, None),
        ({"rope_theta": 5e5, "rope_type": "default"}, {"rope_theta": 5e5, "rope_scaling": None}, None),
        ({"rope_type": "default"}, {"rope_theta": 5e5}, None),
    ],
    ids=["base", "type", "factor", "base lost", "same", "same base", "base of old"],
)
def test_positions_that_are_said_twice(new: Any, old: Any, said: str | None, read: Callable[..., Any], tmp_path: Path) -> None:
    read("llama", rope_parameters=new, **old)
    if said is None:
        assert read_config(tmp_path).rope_parameters["rope_theta"] == 5e5
        return
    with pytest.raises(ModelError, match=f"config.json contradicts itself: .*{said}"):
        read_config(tmp_path)


# Vendor entries -------------------------------------------------------------------------------------------------------

REFUSED: list[dict[str, Any]] = [
    {"use_logn_attn": True},
    {"use_dynamic_ntk": True},
    {"no_rope_layers": [0, 1, 1, 1]},
    {"query_pre_attn_scalar": 16},
    {"use_qk_norm": True},
    {"qk_layernorm": True},
    {"attn_logit_softcapping": 50.0},
    {"final_logit_softcapping": 30.0},
    {"alibi": True},
    {"position_embedding_type": "alibi"},
    {"attention_type": "local"},
    {"attention_multiplier": 0.5},
    {"attention_sinks": 4},
    {"attention_sink_size": 4},
    {"attention_window": 64},
    {"window_size": [64, 0]},
    {"sparse_attention_config": {"block": 64}},
    {"dual_chunk_attention_config": {"mode": 1}},
    {"use_cache_quantization": True},
    {"kv_cache_scheme": {"num_bits": 8}},
    {"block_sparse": True},
    {"cross_attention_layers": [1]},
    {"rope_interleaved": True},
    {"rope_ratio": 4},
    {"embedding_multiplier": 12.0},
    {"residual_multiplier": 0.22},
    {"logits_scaling": 8.0},
    {"logit_scale": 0.0625},
    {"use_mup": True},
    {"parallel_residual": True},
    {"normalize_embedding": True},
    {"nope_layers": [1]},
    {"temperature_tuning": True},
    {"index_topk": 2048},
    {"mscale": 2.0},
    {"scale_emb": 12},
    {"scale_depth": 1.4},
    {"dim_model_base": 32},
    {"rotary_pct": 0.25},
    {"rotary_emb_base": 1e6},
    {"partial_rotary_factor": 0.5},
    {"use_rope": False},
    {"scale_attn_weights": False},
    {"use_mrope": True},
    {"is_causal": False},
    {"use_bidirectional_attention": True},
    {"kv_lora_rank": 32},
    {"cross_layer_attention": True},
    {"max_input_length": 64},
    {"sliding_window": -1},
    {"layer_types": ["linear_attention"] * 4},
    {"rope_scaling": {"type": "su", "factor": 2.0}},
    {"rope_scaling": {"type": "ntk", "factor": 2.0}},
    {"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 4]}},
    {"rope_scaling": {"rope_type": "default", "type": "mrope", "mrope_section": [2, 2, 4]}},
    {"rope_scaling": {"factor": 2.0}},
    {"rope_scaling": {"name": "yarn", "factor": 2.0}},
    {"rope_scaling": {"type": "yarn", "factor": 2.0, "attn_factor": 2.0}},
    {"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 1000}},
    {"rope_scaling": {"type": "linear", "factor": "2"}},
    {"rope_scaling": {"type": "linear", "factor": 0.5}},
    {"rope_scaling": {"type": "yarn", "factor": -2.0}},
    {"rope_scaling": {"type": "longrope", "factor": 2.0, "short_factor": [1.0] * 3, "long_factor": [1.0] * 8}},
    {"rope_scaling": {"type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": ["a"] * 8}},
    {"softmax_scale": 0.5},
    {"sparse_config": {"kernel_size": 32, "block_size": 64}},
    {"use_sparse": True},
    {"use_pos_enc": False},
    {"pos_emb": "alibi"},
    {"pe_type": "alibi"},
    {"use_xpos": True},
    {"is_neox_style": False},
    {"use_k_norm": True},
    {"value_residual": True},
    {"use_cla": True},
    {"share_kv": True},
    {"compress_ratios": [4, 1, 4, 1]},
    {"local_layers": [0, 1]},
    {"global_every": 4},
    {"chunk_size": 64},
    {"num_meta_tokens": 16},
    {"hybrid_layer_pattern": [0, 1, 0, 1]},
    {"token_mixer": "mamba"},
    {"llama_4_scaling": {"beta": 0.1}},
    {"full_attn_mod": 2},
    {"emb_scale": 8.0},
    {"norm_head": True},
    {"final_logits_cap": 30.0},
    {"swiglu_limit": 7.0},
    {"total_ut_steps": 4},
    {"width_mult": 0.25},
    {"rope_theta": 0},
    {"rope_theta": "1e6"},
    {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
]


@pytest.mark.parametrize("entries", REFUSED, ids=str)
def test_entries_that_are_not_followed_are_refused_by_name(
    entries: dict[str, Any], read: Callable[..., PreTrainedConfig]
) -> None:
    (name,) = entries
    said = "rope_parameters" if name == "rope_scaling" else name
    with pytest.raises(ModelError, match=rf"SomeModel is not supported: .*{said}"):
        check_supported(read("llama", **entries))


OUTER = [
    ("rope_parameters", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("rope_theta", {"rope_theta": 5e5}),
    ("sliding_window", {"sliding_window": 16}),
    ("max_position_embeddings", {"max_position_embeddings": 128}),
    ("model_max_length", {"model_max_length": 128}),
    ("attention_sinks", {"attention_sinks": 4}),
    ("logits_scaling", {"logits_scaling": 8.0}),
    ("", {"rope_theta": 1e4, "max_position_embeddings": 512, "num_attention_heads": 4}),  # what text_config says, too
    ("", {"sliding_window": 16, "use_sliding_window": False, "model_max_length": 4096, "attention_sinks": None}),
    ("", {"image_seq_length": 4, "max_image_seq_len": 4, "vision_position": "rope", "projector_scale": 2.0}),
]


@pytest.mark.parametrize(("named", "entries"), OUTER, ids=str)
def test_entries_beside_a_text_config_are_not_passed_over(named: str, entries: dict[str, Any], tmp_path: Path) -> None:
    text = SIZES | {"model_type": "llama", "rope_theta": 1e4}
    values = {"model_type": "llava", "text_config": text, "vision_config": {"model_type": "clip_vision_model"}} | entries
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = read_config(tmp_path)
    if not named:
        return check_supported(config)
    with pytest.raises(ModelError, match=f"has {named} .* outside of text_config"):
        check_supported(config)


EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "num_experts": 4, "n_routed_experts": 4}
LATENTS = {"kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
ROUTING = [
    ("qwen3_moe", {"scoring_func": "sigmoid"}, True),
    ("qwen3_moe", {"moe_router_score_function": "sigmoid"}, True),
    ("qwen3_moe", {"routed_scaling_factor": 2.5}, True),
    ("qwen3_moe", {"router_scale": 2.5}, True),
    ("qwen3_moe", {"n_group": 4}, True),
    ("qwen3_moe", {"scoring_func": "softmax", "routed_scaling_factor": 1.0, "n_group": 1, "norm_topk_prob": True}, False),
    ("llama", {"scoring_func": "sigmoid", "routed_scaling_factor": 2.5}, False),  # of no experts
    ("deepseek_v3", LATENTS | {"scoring_func": "softmax"}, True),
    ("deepseek_v3", LATENTS | {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "routed_scaling_factor": 2.5}, False),
    ("deepseek_v2", LATENTS | {"norm_topk_prob": True}, True),  # which its class reads and does not do
    ("deepseek_v2", LATENTS | {"norm_topk_prob": False, "scoring_func": "softmax"}, False),
    ("minimax_m2", {"scoring_func": "sigmoid", "use_routing_bias": True}, False),
    ("mixtral", {"norm_topk_prob": True}, False),
]


@pytest.mark.parametrize(("model_type", "entries", "refused"), ROUTING, ids=str)
def test_entries_that_route_tokens_otherwise_than_the_class(
    model_type: str, entries: dict[str, Any], refused: bool, read: Callable[..., PreTrainedConfig]
) -> None:
    if "kv_lora_rank" in entries:
        need_latents()
    config = read(model_type, **EXPERTS, **entries)
    if not refused:
        return check_supported(config)
    with pytest.raises(ModelError, match=f"its config has {list(entries)[-1]} .* experts"):
        check_supported(config)


HARMLESS: list[tuple[str, dict[str, Any]]] = [
    ("phi3", {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False}),  # Phi-4-mini
    ("stablelm", {"rotary_scaling_factor": 1.0, "rope_pct": 0.25}),
    ("lfm2", {"use_pos_enc": True, "full_attn_idxs": [1, 3], "block_use_swiglu": True}),
    ("qwen3_5_text", {"attn_output_gate": True, "full_attention_interval": 4, "mamba_ssm_dtype": "float32"}),
    ("llama", {"decoder_sparse_step": 1, "compress_ratios": [1] * 4, "cla_share_factor": 2, "use_cla": False}),
    ("starcoder2", {"activation_function": "gelu", "scale_attention_softmax_in_fp32": True, "scale_attn_weights": True}),
    (
        "llama",
        {"torch_dtype": "float32", "auto_map": {}, "pretraining_tp": 2, "transformers_version": "4.1", "unsloth_version": "1"},
    ),
    ("llama", {"_name_or_path": "x", "attention_dropout": 0.1, "attn_implementation": "sdpa", "use_flash_attn": True}),
    ("llama", {"task_specific_params": {"text": 1}, "max_length": 20, "sequence_parallel": True, "output_attentions": False}),
    (
        "llama",
        {"use_logn_attn": False, "use_dynamic_ntk": False, "attention_sinks": 0, "use_mrope": False, "rope_interleaved": False},
    ),
    ("cohere2", {"use_parallel_block": True}),
    ("llama", {"mscale": 1.0, "use_mup": False, "nope_layers": [], "parallel_residual": False}),
    ("llama", {"residual_multiplier": 1.0, "logits_scaling": 1, "dim_model_base": 64, "ffn_dim_multiplier": 1.3}),
    ("granite", {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0, "attention_multiplier": 0.5}),
    ("llama", {"rope_theta": 1e6, "rotary_emb_base": 1e6, "rotary_pct": 1.0, "position_embedding_type": "rope"}),
    ("llama", {"attention_window": 512, "train_seq_len": 64, "attention_type": "gqa", "attention_bias": True}),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "attn_factor": 1.0, "finetuned": True}}),
    ("gptj", {"rotary": True, "rotary_dim": 8, "scale_attn_weights": True}),
    ("gpt_neox", {"rotary_pct": 0.25, "rotary_emb_base": 10000, "use_parallel_residual": True}),
    ("stablelm", {"rope_pct": 0.25, "qk_layernorm": False}),
    ("glm", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    ("minimax_m2", {"rotary_dim": 8, "attn_type_list": [1] * 4, "qk_norm_type": "per_layer", "use_qk_norm": True}),
    (
        "hunyuan_v1_dense",
        {
            "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "mscale": 1.0},
            "use_qk_norm": True,
        },
    ),
]


@pytest.mark.parametrize(("model_type", "entries"), HARMLESS, ids=str)
def test_what_does_not_change_attention_is_no_obstacle(
    model_type: str, entries: dict[str, Any], read: Callable[..., PreTrainedConfig]
) -> None:
    check_supported(read(model_type, **entries))


# Lengths --------------------------------------------------------------------------------------------------------------

ORIGINAL = {"original_max_position_embeddings": 128}
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
LENGTHS: list[tuple[str, dict[str, Any], int, str]] = [
    ("llama", {}, 512, ""),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 4}}, 2048, ""),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, 2048, ""),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.5, "original_max_position_embeddings": 512}}, 1280, ""),
    (
        "llama",
        {"rope_scaling": {"type": "yarn", "factor": 4.0} | ORIGINAL},
        512,
        "",
    ),  # max_position_embeddings has the factor in it
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 16.0} | ORIGINAL}, 2048, ""),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 16.0}} | ORIGINAL, 2048, ""),
    ("llama", {"rope_scaling": rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0) | ORIGINAL}, 512, ""),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 512, ""),
    ("llama", {"rope_scaling": {"type": "longrope"} | FACTORS | ORIGINAL}, 128, "original_max_position_embeddings 128"),
    ("llama", {"seq_length": 64}, 64, "seq_length 64"),
    ("llama", {"n_ctx": 64, "max_sequence_length": 100}, 64, "n_ctx 64"),
    ("llama", {"model_max_length": 4096}, 512, ""),
    ("llama", {"max_sequence_length": 512, "rope_scaling": {"type": "linear", "factor": 4.0}}, 2048, ""),
    ("llama", {"max_sequence_length": 1024, "rope_scaling": {"type": "linear", "factor": 4.0}}, 1024, "max_sequence_length 1024"),
    ("cohere", {"model_max_length": 4096}, 4096, ""),
    ("llama", {"sliding_window": 64}, 64, "sliding_window 64"),
    ("llama", {"attention_chunk_size": 64}, 64, "attention_chunk_size 64"),
    ("llama", {"dual_chunk_attention_config": {"chunk_size": 96, "local_size": 32}}, 64, "dual_chunk_attention_config"),
    ("mistral", {"sliding_window": 64}, 512, ""),
    ("mistral", {"sliding_window": 512}, 512, ""),
    ("mistral", {"sliding_window": None}, 512, ""),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 64}, 512, ""),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, 512, ""),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}, 512, ""),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 4}, 512, ""),
    ("olmo3", {"sliding_window": 64, "layer_types": ["sliding_attention"] * 4}, 512, ""),
    ("olmo3", {"sliding_window": 64}, 512, ""),
    ("olmo3", {"sliding_window": 64, "layer_types": ["full_attention"] * 4}, 512, ""),
    ("llama4_text", {"attention_chunk_size": 64, "head_dim": 16}, 512, ""),
    ("gpt2", {"n_ctx": 256}, 256, "n_ctx 256"),
]


@pytest.mark.parametrize(("model_type", "entries", "longest", "limited_by"), LENGTHS, ids=str)
def test_the_longest_context(
    model_type: str, entries: dict[str, Any], longest: int, limited_by: str, read: Callable[..., PreTrainedConfig], tmp_path: Path
) -> None:
    config = read(model_type, **entries)
    check_supported(config)
    shape = ModelShape.from_config(config)
    assert shape.max_position == longest
    assert shape.limited_by.startswith(limited_by) and bool(shape.limited_by) == bool(limited_by)
    if model_type == "llama":
        assert find_facts(str(tmp_path), "auto").shape.max_position == longest, "the plan's length is the engine's"


def test_no_length_at_all() -> None:
    config = BloomConfig()
    with pytest.raises(ModelError, match=r"does not name its longest context .max_position_embeddings"):
        check_supported(config)
    config.max_seq_len = 77
    assert ModelShape.from_config(config).max_position == 77


# Served ---------------------------------------------------------------------------------------------------------------


def tokens_of(llm: LLM, prompt: list[int], count: int) -> list[int]:
    (output,) = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True))
    return output.token_ids


@pytest.mark.parametrize(
    ("family", "changes", "longest"),
    [
        ("llama", {"sliding_window": 64}, 64),
        ("mistral", {"sliding_window": 64}, 512),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, 512),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **ORIGINAL, **FACTORS, "factor": 4.0}}, 128),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, 512),
    ],
)
def test_up_to_its_bound_a_model_gives_hugging_face_s_tokens_and_is_not_asked_for_more(
    family: str,
    changes: dict[str, Any],
    longest: int,
    write_family: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    if "rope_parameters" in changes and "short_factor" in changes["rope_parameters"]:
        changes["rope_parameters"] |= {"short_factor": [1.0 + i / 9 for i in range(12)], "long_factor": [3.0] * 12}
    folder = write_family(family, **changes)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    llm = LLM(folder, config=FULL, device="cpu")
    assert llm.engine.parts.max_tokens == longest
    prompt = torch.randint(4, 1839, (longest - 12,), generator=torch.Generator().manual_seed(0)).tolist()
    right = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=1)
    assert tokens_of(llm, prompt, 12) == right[0, len(prompt) :].tolist()
    if longest == 512:
        return
    reason = llm.shape.limited_by
    assert reason in caplog.text, "the engine says how long contexts may be, where nobody asked for a length"
    for _ in range(2):
        with pytest.raises(RequestError, match=f"the model's maximum is {longest} .{reason}"):
            tokens_of(llm, prompt * 2, 4)
    with pytest.raises(ConfigError, match=f"max_model_len 513 exceeds the model's maximum of {longest} tokens .{reason}"):
        LLM(folder, config=FULL, device="cpu", max_model_len=513)


def longrope(family: str, write_family: Callable[..., Path]) -> Path:
    factors = {"short_factor": [1.0 + i / 9 for i in range(12)], "long_factor": [3.0 - i / 9 for i in range(12)], "factor": 4.0}
    return write_family(family, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **ORIGINAL, **factors})


def test_longrope_has_the_angles_of_the_length_that_is_asked_for(write_family: Callable[..., Path]) -> None:
    folder = longrope("llama", write_family)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    prompt = torch.randint(4, 1839, (230,), generator=torch.Generator().manual_seed(0)).tolist()
    llm = LLM(folder, config=FULL, device="cpu", max_model_len=400, max_num_batched_tokens=50)
    assert llm.shape.reach == 512 and llm.shape.max_position == 128

    def right(ids: list[int]) -> list[int]:
        output = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=1)
        return output[0, len(ids) :].tolist()

    alone = tokens_of(llm, prompt, 12)
    assert alone == right(prompt), "beyond the original length, from the first chunk on"
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    outputs = llm.generate([prompt[:20], prompt], params)
    assert outputs[1].token_ids == alone and outputs[0].token_ids == tokens_of(llm, prompt[:20], 12)
    short = LLM(folder, config=FULL, device="cpu", max_model_len=128)
    assert tokens_of(short, prompt[:100], 12) == right(prompt[:100])


def test_dynamic_rope_is_fixed_for_the_length_that_is_asked_for(write_family: Callable[..., Path]) -> None:
    folder = write_family("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    rotary = model.model.rotary_emb
    rotary(torch.zeros(1), torch.tensor([[799]]))
    rotary.rope_type = "default"
    prompt = torch.randint(4, 1839, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    right = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=1)
    llm = LLM(folder, config=FULL, device="cpu", max_model_len=800, max_num_batched_tokens=250)
    assert tokens_of(llm, prompt, 12) == right[0, 600:].tolist()
    said = r"max_model_len 1025 exceeds the model's maximum of 512 tokens .1024 where max_model_len"
    with pytest.raises(ConfigError, match=said):
        LLM(folder, config=FULL, device="cpu", max_model_len=1025)


def test_an_enabled_model_keeps_its_own_angles(write_family: Callable[..., Path]) -> None:
    folder = longrope("llama", write_family)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    prompt = torch.randint(4, 1839, (1, 230), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    right = model.generate(prompt, **options), model.generate(prompt[:, :60], **options)
    specontext.enable(model, config=FULL, max_model_len=300)
    assert torch.equal(model.generate(prompt, **options), right[0])
    with torch.no_grad():
        model.get_decoder()(prompt)  # the owner's own pass
    assert torch.equal(model.generate(prompt, **options), right[0])
    specontext.disable(model)
    assert torch.equal(model.generate(prompt[:, :60], **options), right[1])
    assert torch.equal(model.generate(prompt, **options), right[0])


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_scaled_contexts_are_served_beyond_max_position_embeddings(kind: str, write_family: Callable[..., Path]) -> None:
    parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    folder = write_family("llama", max_position_embeddings=64, rope_parameters=parameters)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    llm = LLM(folder, config=FULL, device="cpu", max_model_len=256)
    prompt = torch.randint(4, 1839, (230,), generator=torch.Generator().manual_seed(0)).tolist()
    right = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=1)
    assert tokens_of(llm, prompt, 12) == right[0, len(prompt) :].tolist()

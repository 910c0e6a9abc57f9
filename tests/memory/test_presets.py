"""Presets are the public models: their parameters are counted here from the modules themselves, without memory."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import LlamaConfig

from specontext.errors import ModelError
from specontext.memory.facts import facts_of_config
from specontext.memory.latent_preset import LatentPreset
from specontext.memory.listed_presets import LISTED
from specontext.memory.preset import Preset
from specontext.memory.presets import PRESETS, did_you_mean, find_preset
from specontext.models.attention import register_attention
from specontext.models.experts import experts_of
from specontext.models.loading import check_supported
from specontext.models.quantized import linear_layers, skeleton_of
from specontext.retrieval.head import head_parameters
from specontext.retrieval.head_config import HeadConfig

LATENT = [preset for preset in PRESETS.values() if isinstance(preset, LatentPreset)]
PUBLISHED = {  # parameters of the public checkpoints, a shared table counted once
    "llama-3.1-8b": 8_030_261_248,
    "r1-distill-llama-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.3-70b": 70_553_706_496,
    "r1-distill-llama-70b": 70_553_706_496,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,  # of its text part
    "gemma-3-12b": 11_766_034_176,
    "gemma-3-27b": 27_009_346_304,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3": 671_026_404_352,
    "deepseek-r1": 671_026_404_352,
    "glm-4.7-flash": 29_943_390_976,  # without the layer that predicts a further token
    "gemma-3n-e2b": 4_435_182_688,  # of the text part of this and the next ones
    "gemma-3n-e4b": 6_835_235_568,
    "gemma-4-e2b": 4_628_569_344,
    "gemma-4-e4b": 7_463_013_376,
    "gemma-4-26b-a4b": 25_233_141_760,
    "gemma-4-31b": 30_697_345_280,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "qwen3-next-80b-a3b": 79_674_391_296,  # without the layer that predicts a further token
    "granite-4.0-h-tiny": 6_939_037_248,
    "granite-4.0-h-small": 32_207_337_984,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "r1-distill-qwen-7b": 7_615_616_512,
    "r1-distill-qwen-14b": 14_770_033_664,
    "r1-distill-qwen-32b": 32_763_876_352,
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameters(name: str) -> None:
    preset = PRESETS[name]
    assert preset.parameters == PUBLISHED[name]
    config = preset.config()
    counted = facts_of_config(name, config)
    assert counted == preset.facts()
    check_supported(config)


@pytest.mark.slow
@pytest.mark.parametrize("preset", [*LISTED, *LATENT], ids=lambda preset: preset.name)
def test_matrices_of_models_whose_layers_differ(preset: Preset) -> None:
    register_attention()
    skeleton = skeleton_of(preset.config(), {"trust_remote_code": False})
    found = Counter((one.out_features, one.in_features) for one in linear_layers(skeleton).values() if one.in_features % 32 == 0)
    for experts in experts_of(skeleton):
        found += Counter(list(experts.tables.values()) * experts.count)
    assert found == Counter(preset.linear_layers)
    assert isinstance(preset, LatentPreset) or found == preset.matrices  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", PRESETS)
def test_head_is_that_of_a_draft_with_the_model_s_own_shape(name: str) -> None:
    facts = PRESETS[name].facts()
    shape, head = facts.shape, facts.head
    config = HeadConfig(
        "features",
        hidden_size=shape.hidden_size,
        target_hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        heads=head.heads,
        kv_heads=head.kv_heads,
        head_dim=head.head_dim,
        feature_layers=(2, shape.depth // 2, shape.depth - 3),
    )
    config.check_target(shape)
    assert head.parameters == head_parameters(config)
    assert head.feature_width == 3 * shape.hidden_size


def test_heads_of_the_two_models_of_the_paper() -> None:
    assert {PRESETS[name].facts().head.parameters for name in ("llama-3.1-8b", "qwen3-8b")} == {92_282_880}


def test_names() -> None:
    assert find_preset("Qwen3-8B") is PRESETS["qwen3-8b"]
    assert find_preset("qwen3") is None
    assert did_you_mean("llama-3.1-8").startswith(": did you mean llama-3.1-8b or ")
    assert "mistral-7b-v0.3" in did_you_mean("mistralai/Mistral-7B-Instruct-v0.3")
    assert "qwen3-0.6b" in did_you_mean("Qwen/Qwen3-0.6B")
    assert did_you_mean("falcon-180b") == ""


def test_number_format_and_config_entries_can_be_chosen() -> None:
    preset = PRESETS["llama-3.2-1b"]
    assert preset.shape().dtype == torch.bfloat16
    assert preset.facts(torch.float32).weight_bytes == 4 * preset.parameters
    config = preset.config(num_hidden_layers=2)
    assert config.num_hidden_layers == 2 and config.rope_parameters["factor"] == 32.0


def test_models_without_kv_heads_are_refused() -> None:
    config = LlamaConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=4, num_key_value_heads=4, vocab_size=9)
    config.num_key_value_heads = 0
    with pytest.raises(ModelError, match="0 KV heads"):
        facts_of_config("broken", config)
    config.num_key_value_heads = 3
    with pytest.raises(ModelError, match="4 query heads over 3 KV heads"):
        facts_of_config("broken", config)

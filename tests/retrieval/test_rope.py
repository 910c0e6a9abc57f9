"""RoPE of the head: transformers' own frequencies for every static kind, and YaRN beyond the trained length."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from specontext import LLM, ConfigError, SamplingParams, SpeContextConfig
from specontext.errors import HeadError
from specontext.retrieval.head import RetrievalHead
from specontext.retrieval.head_config import HeadConfig

TRAINED = 256
POSITIONS = torch.tensor([0, 1, 17, 255, 256, 1000, 4095])
PLAIN = HeadConfig("features", 32, 32, 100, 4, 2, 16, (1, 2), rope_theta=700.0, trained_length=TRAINED)
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "factor": 5.0, "original_max_position_embeddings": 64, "beta_fast": 16.0, "truncate": False},
    "yarn with its own attention factor": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 512,
        "attention_factor": 1.7,
    },
}


def make_head(config: HeadConfig = PLAIN) -> RetrievalHead:
    head = RetrievalHead(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, 0.3, 0.4, generator=generator)
    return head.requires_grad_(False)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(POSITIONS), 32, generator=generator), torch.randn(len(POSITIONS), 64, generator=generator)


def as_hugging_face(head: RetrievalHead, start: int, rope_parameters: dict[str, Any]) -> list[Tensor]:
    """The head's queries and keys, rotated by Hugging Face's rotary embedding with these parameters."""
    unturned = head(*inputs(), torch.zeros(len(POSITIONS)))
    form = LlamaConfig(head_dim=16, max_position_embeddings=start, rope_parameters=dict(rope_parameters))
    cos, sin = LlamaRotaryEmbedding(form)(unturned[0], POSITIONS[None])
    return [
        apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)[0][0].transpose(0, 1) for x in unturned
    ]


def assert_all_close(mine: tuple[Tensor, ...], expected: list[Tensor]) -> None:
    for ours, theirs in zip(mine, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def unscaled(head: RetrievalHead) -> RetrievalHead:
    """The same weights with plain RoPE, whose position 0 turns nothing."""
    plain = RetrievalHead(replace(head.config, rope_scaling=None)).requires_grad_(False)
    plain.load_state_dict(head.state_dict())
    return plain


@pytest.mark.parametrize("kind", SCALINGS)
def test_scaled_kinds_are_transformers_own(kind: str) -> None:
    scaling = SCALINGS[kind]
    head = make_head(replace(PLAIN, rope_scaling=scaling))
    start = scaling.get("original_max_position_embeddings", TRAINED)
    expected = as_hugging_face(unscaled(head), start, scaling | {"rope_theta": 700.0})
    assert_all_close(head(*inputs(), POSITIONS), expected)


@pytest.mark.parametrize("factor", [1.5, 4.0, 32.0])
def test_yarn_from_the_trained_length_is_transformers_own(factor: float) -> None:
    head, plain = make_head(), make_head()
    head.set_rope(yarn_factor=factor)
    assert (head.yarn_factor, head.rope_theta) == (factor, 700.0)
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": TRAINED, "rope_theta": 700.0}
    assert_all_close(head(*inputs(), POSITIONS), as_hugging_face(plain, TRAINED, yarn))
    assert head.attention_scaling > 1
    assert not torch.allclose(head(*inputs(), POSITIONS)[0], plain(*inputs(), POSITIONS)[0], atol=1e-2)


def test_a_factor_of_one_changes_nothing() -> None:
    head = make_head()
    before = head(*inputs(), POSITIONS)
    head.set_rope(yarn_factor=7.0)
    head.set_rope(yarn_factor=1)
    assert all(torch.equal(a, b) for a, b in zip(head(*inputs(), POSITIONS), before, strict=True))
    assert head.yarn_factor == 1.0


def test_the_base_is_a_setting_and_comes_back_from_the_config() -> None:
    head, other = make_head(), make_head(replace(PLAIN, rope_theta=90.0))
    head.set_rope(theta=90, yarn_factor=2.0)
    other.set_rope(yarn_factor=2.0)
    assert torch.equal(head.inverse_frequencies, other.inverse_frequencies) and head.rope_theta == 90.0
    assert head.config.rope_theta == 700.0, "what is saved stays"
    head.set_rope()
    assert head.rope_theta == 700.0 and torch.equal(head.inverse_frequencies, make_head().inverse_frequencies)
    scaled = make_head(replace(PLAIN, rope_scaling=SCALINGS["llama3"]))
    scaled.set_rope(theta=90.0)
    again = make_head(replace(PLAIN, rope_scaling=SCALINGS["llama3"], rope_theta=90.0))
    assert torch.equal(scaled.inverse_frequencies, again.inverse_frequencies)


def test_frequencies_are_recomputed_in_place_and_stay_exact_in_half_precision() -> None:
    head = make_head()
    exact, place = head.inverse_frequencies.clone(), head.inverse_frequencies.data_ptr()
    head.set_rope(yarn_factor=3.0)
    assert head.inverse_frequencies.data_ptr() == place
    stretched = head.inverse_frequencies.clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(head.to(dtype).inverse_frequencies, stretched)
    assert head.inverse_frequencies.dtype == torch.float32
    head.to(torch.bfloat16).set_rope()
    assert torch.equal(head.inverse_frequencies, exact) and head.q_proj.weight.dtype == torch.bfloat16
    assert "inverse_frequencies" not in head.state_dict()


def test_the_embedding_variant_keeps_the_rope_in_use() -> None:
    head = make_head()
    head.set_rope(theta=90.0, yarn_factor=2.0)
    small = head.embedding_variant()
    assert (small.rope_theta, small.yarn_factor) == (90.0, 2.0)
    assert torch.equal(small.inverse_frequencies, head.inverse_frequencies)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "proportional", "mrope", "su"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_kinds_that_change_with_the_length_or_are_unknown_are_refused_by_name(kind: str, key: str) -> None:
    with pytest.raises(HeadError, match=f"RoPE of type {kind} is not supported .* default, linear, llama3, yarn"):
        replace(PLAIN, rope_scaling={key: kind, "factor": 2.0})


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "linear"}, "incomplete or wrong: 'factor'"),
        ({"rope_type": "linear", "factor": "two"}, "factor in the linear scaling .* must be a number above 0"),
        ({"rope_type": "linear", "factor": 0}, "must be a number above 0, got 0"),
        ({"rope_type": "linear", "factor": -2.0}, "must be a number above 0"),
        ({"rope_type": "linear", "factor": 2.0, "short_factor": [1.0]}, "linear with short_factor"),
        ({"full_attention": {"rope_type": "linear", "factor": 2.0}}, "default with full_attention"),
        ({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64}, "incomplete or wrong"),
        ({"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings in the yarn scaling .* must be a positive"),
        ({"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 64}, "incomplete or wrong: .*freq_factor"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("yarn", "rope_scaling of a retrieval head must be an object"),
    ],
)
def test_incomplete_scalings(scaling: Any, message: str) -> None:
    with pytest.raises(HeadError, match=message):
        RetrievalHead(replace(PLAIN, rope_scaling=scaling))


def test_default_is_no_scaling_of_its_own() -> None:
    for scaling in ({"rope_type": "default"}, {"type": "default"}, {}):
        assert replace(PLAIN, rope_scaling=scaling).rope_scaling is None


@pytest.mark.parametrize("values", [{"theta": 0}, {"theta": -1.0}, {"theta": float("nan")}, {"theta": True}, {"theta": "10"}])
def test_wrong_bases(values: dict[str, Any]) -> None:
    with pytest.raises(HeadError, match=r"rope_theta .* must be a number above 0"):
        make_head().set_rope(**values)


@pytest.mark.parametrize("factor", [0.5, 0, -2.0, float("nan"), float("inf"), True, "2"])
def test_wrong_factors_change_nothing(factor: Any) -> None:
    head = make_head()
    with pytest.raises(HeadError, match=r"YaRN factor .* at least 1"):
        head.set_rope(theta=90.0, yarn_factor=factor)
    assert head.rope_theta == 700.0


def test_a_head_with_its_own_scaling_is_not_extended() -> None:
    config = replace(PLAIN, rope_scaling=SCALINGS["llama3"])
    assert config.yarn_factor(10 * TRAINED) == 1.0
    head = make_head(config)
    head.set_rope(yarn_factor=1)
    with pytest.raises(HeadError, match=r"its own rope_scaling \(llama3\) .* head_yarn_factor"):
        head.set_rope(yarn_factor=2)


def test_the_automatic_factor() -> None:
    assert [PLAIN.yarn_factor(n) for n in (1, TRAINED, 2 * TRAINED, 1000)] == [1.0, 1.0, 2.0, 1000 / TRAINED]
    assert replace(PLAIN, yarn=False).yarn_factor(1000) == 1.0


# The engine fixes it --------------------------------------------------------------------------------------------------


@pytest.fixture
def short(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A head for the tiny Llama (512 positions) that was trained on 64 tokens."""
    folder = Path(shutil.copytree(checkpoint("llama") / "retrieval_head", tmp_path / "head"))
    change(folder, trained_length=64)
    return folder


def change(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))


def rope_of(llm: LLM) -> tuple[float, float]:
    (output,) = llm.generate([[5, 6, 7] * 10], SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))
    head = llm.engine.parts.selector.head  # type: ignore[attr-defined]
    assert (head.rope_theta, head.yarn_factor) == (output.stats["head_rope_theta"], output.stats["head_yarn_factor"])
    return head.rope_theta, head.yarn_factor


def test_the_factor_follows_from_the_longest_context(short: Path, checkpoint: Callable[[str], Path]) -> None:
    model, config = checkpoint("llama"), SpeContextConfig(budget=21)
    assert rope_of(LLM(model, short, config)) == (500.0, 8.0)
    assert rope_of(LLM(model, short, config, max_model_len=160)) == (500.0, 2.5)
    assert rope_of(LLM(model, short, config, max_model_len=60)) == (500.0, 1.0)
    assert rope_of(LLM(model, short, config, head_yarn_factor=1)) == (500.0, 1.0)
    llm = LLM(model, short, config, head_yarn_factor=3.5, head_rope_theta=1e6)
    assert rope_of(llm) == (1e6, 3.5)
    llm.reconfigure(SpeContextConfig(budget=30), retrieval_head=short)
    assert rope_of(llm) == (1e6, 3.5)


def test_a_config_can_rule_yarn_out_and_a_scaling_does(short: Path, checkpoint: Callable[[str], Path]) -> None:
    change(short, yarn=False)
    assert rope_of(LLM(checkpoint("llama"), short)) == (500.0, 1.0)
    assert rope_of(LLM(checkpoint("llama"), short, head_yarn_factor=2))[1] == 2.0
    change(short, yarn=True, rope_scaling=SCALINGS["yarn"])
    assert rope_of(LLM(checkpoint("llama"), short))[1] == 1.0
    with pytest.raises(HeadError, match="its own rope_scaling"):
        LLM(checkpoint("llama"), short, head_yarn_factor=2)


def test_the_engine_says_what_it_fixed(short: Path, checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="specontext"):
        LLM(checkpoint("llama"), short)
    (line,) = [said for record in caplog.records if "RoPE" in (said := record.getMessage())]
    assert "RoPE base 500" in line and "YaRN factor 8" in line and "64 tokens" in line and "512" in line


def test_methods_without_a_head_have_no_rope(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm("llama", "streaming", budget=21)
    (output,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2))
    assert output.stats["head_rope_theta"] is None and output.stats["head_yarn_factor"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            ({"head_rope_theta": value}, "head_rope_theta must be a number above 0")
            for value in (0, -1.0, True, "1", float("inf"))
        ),
        *(({"head_yarn_factor": value}, "head_yarn_factor must be a number of at least 1") for value in (0.9, 0, -1, True, "2")),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM("nano", **settings)

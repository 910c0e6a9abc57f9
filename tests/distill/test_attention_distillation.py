"""Attention distillation on a tiny random Llama: true teacher rows, a head that learns, exact continuation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from specontext.distill.attention import (
    Batch,
    DistillConfig,
    Target,
    candidates,
    distillation_loss,
    head_log_weights,
    keep_top,
    measure,
    sample_rows,
    train,
)
from specontext.retrieval.head import HeadConfig, RetrievalHead

LENGTH, LAYERS, HEADS, GROUPS = 96, 3, 4, 2
CONFIG = DistillConfig(steps=60, learning_rate=1e-2, warmup=5, queries=32, sink=2, recent=4, measure_every=1000, save_every=7)


@pytest.fixture
def target() -> Target:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=8,
        max_position_embeddings=LENGTH,
        initializer_range=0.2,
    )
    return Target(LlamaForCausalLM(config), (0, 1, 2))


def make_head(variant: str = "features") -> RetrievalHead:
    torch.manual_seed(1)
    layers = (0, 1, 2) if variant == "features" else ()
    return RetrievalHead(HeadConfig(variant, 32, 32, 64, HEADS, GROUPS, 16, layers))


def draw(step: int) -> Batch:
    """One of two fixed batches; every position from 20 on precedes an answer."""
    ids = torch.randint(64, (2, LENGTH), generator=torch.Generator().manual_seed(step % 2))
    return ids, (torch.arange(LENGTH) >= 20).expand(2, -1)


def eager(target: Target, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Attention probabilities and hidden states of Hugging Face's own eager attention."""
    model = LlamaForCausalLM(target.model.config)
    model.load_state_dict(target.model.state_dict())
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(ids, output_attentions=True, output_hidden_states=True)
    return list(out.attentions), list(out.hidden_states)


def test_teacher_rows_and_features_are_the_models_own(target: Target) -> None:
    ids, _ = draw(0)
    rows = torch.tensor([[0, 95, 7, 40, 40], [1, 2, 94, 63, 5]])
    seen = target.observe(ids, rows)
    attentions, hidden = eager(target, ids)
    assert len(seen.attention) == LAYERS
    for mine, theirs in zip(seen.attention, attentions, strict=True):
        expected = torch.stack([theirs[n][:, rows[n]] for n in range(2)])  # [N, Hq, Q, S]
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(seen.features[:, 1:], torch.cat(hidden[:3], -1)[:, :-1], rtol=1e-4, atol=1e-5)
    assert not seen.features[:, 0].any()
    teacher = seen.teacher(GROUPS, "max")
    first_group = torch.stack([layer[:, :2].amax(1) for layer in seen.attention]).mean(0)
    torch.testing.assert_close(teacher[:, 0], first_group)


def test_rows_stand_before_answers_and_filling_does_not_count() -> None:
    answers = torch.zeros(3, LENGTH, dtype=torch.bool)
    answers[0, 50:60] = True
    answers[1, 10:90] = True
    rows, real = sample_rows(answers, 20, 0.1, torch.Generator().manual_seed(0))
    assert real.sum(1).tolist() == [12, 20, 0]
    assert sorted(rows[0, :10].tolist()) == list(range(50, 60))
    assert len(set(rows[1, :18].tolist())) == 18 and answers[1, rows[1, :18]].all()
    assert (rows[0, 10:12] < 60).all()


def test_selection_keeps_sinks_recent_tokens_and_the_best_candidates() -> None:
    rows = torch.tensor([[9, 3]])
    far, always = candidates(rows, 12, sink=2, recent=3)
    assert far[0, 0, 0].nonzero().flatten().tolist() == [2, 3, 4, 5, 6]
    assert always[0, 0, 0].nonzero().flatten().tolist() == [0, 1, 7, 8, 9]
    assert not far[0, 0, 1].any() and always[0, 0, 1].nonzero().flatten().tolist() == [0, 1, 2, 3]
    kept = keep_top(torch.arange(12.0).expand(1, 1, 2, 12), far, always, 2)
    assert kept[0, 0, 0].nonzero().flatten().tolist() == [0, 1, 5, 6, 7, 8, 9]
    assert kept[0, 0, 1].nonzero().flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_loss_is_zero_for_the_teacher_itself_and_finite_without_candidates(target: Target, pool: str) -> None:
    ids, _ = draw(0)
    rows, real = torch.tensor([[1, 60, 90], [30, 2, 95]]), torch.ones(2, 3, dtype=torch.bool)
    seen = target.observe(ids, rows)
    far, _ = candidates(rows, LENGTH, 2, 4)
    teacher = seen.teacher(GROUPS, "max")
    perfect = (teacher * far).clamp_min(1e-30).log()
    assert distillation_loss(perfect, teacher, far, real).abs() < 1e-5
    head = make_head()
    loss = distillation_loss(head_log_weights(head, seen, rows, far, pool), teacher, far, real)  # type: ignore[arg-type]
    loss.backward()
    assert loss > 0 and all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("variant", ["features", "embedding"])
def test_training_lowers_the_loss_and_raises_recall(target: Target, tmp_path: Path, variant: str) -> None:
    head = make_head(variant)
    batches = [draw(0), draw(1)]
    before = measure(head, target, batches, CONFIG, (12,))[12]
    train(head, target, draw, CONFIG, tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    after = measure(head, target, batches, CONFIG, (12,))[12]
    assert len(losses) == CONFIG.steps and sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert after["head"] > before["head"] + 0.03
    assert after["window"] < after["head"] < after["shared"] < after["layer"] <= 1.0


def test_a_stopped_training_continues_exactly(target: Target, tmp_path: Path) -> None:
    whole, parts = make_head(), make_head()
    config = DistillConfig(steps=12, warmup=3, queries=8, sink=2, recent=4, save_every=5)
    train(whole, target, draw, config, tmp_path / "whole")
    train(parts, target, draw, config, tmp_path / "parts", until=5)
    resumed = make_head()
    train(resumed, target, draw, config, tmp_path / "parts")
    assert any(not torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name

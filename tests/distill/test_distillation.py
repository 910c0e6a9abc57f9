"""Distillation on a tiny random Llama: true teacher rows, a head that learns, exact continuation."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from specontext.distill.attention import Pool, Teacher, attention_loss, head_log_weights, map_of
from specontext.distill.data.source import DataError, Sequences
from specontext.distill.draft import Draft
from specontext.distill.queries import candidates, sample_rows
from specontext.distill.recall import keep, measure
from specontext.distill.settings import DistillConfig
from specontext.distill.student import Student
from specontext.distill.target import Target
from specontext.distill.trainer import train
from specontext.errors import ConfigError, SpeContextError
from specontext.retrieval.head import RetrievalHead
from specontext.retrieval.head_config import HeadConfig
from specontext.retrieval.head_map import band_map

LENGTH, LAYERS, HEADS, GROUPS = 96, 3, 4, 2
IDENTITY = ((0, 1),) * LAYERS
CONFIG = DistillConfig(
    steps=60,
    lengths=((LENGTH, 1.0),),
    tokens_per_step=2 * LENGTH,
    learning_rate=1e-2,
    warmup=5,
    queries=32,
    sink=2,
    recent=4,
    measure_every=1000,
    save_every=7,
    unroll_steps=2,
)


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
    """Also of variant 'bands': two groups for each band of layers, and one wide key that knows its own token."""
    torch.manual_seed(1)
    if variant == "bands":
        wide: dict[str, Any] = {"key_heads": 1, "key_inputs": "around", "query_rank": 12, "head_map": band_map(LAYERS, GROUPS, 3)}
        return RetrievalHead(HeadConfig("features", 32, 32, 64, 12, 6, 24, (0, 1, 2), **wide))
    layers = (0, 1, 2) if variant == "features" else ()
    return RetrievalHead(HeadConfig(variant, 32, 32, 64, HEADS, GROUPS, 16, layers))


def batch(number: int) -> tuple[Tensor, Tensor]:
    """One of two fixed batches; every position from 20 on precedes an answer."""
    ids = torch.randint(64, (2, LENGTH), generator=torch.Generator().manual_seed(number % 2))
    return ids, (torch.arange(LENGTH) >= 20).expand(2, -1)


class Fixed:
    """A source of these batches."""

    def draw(self, step: int, length: int, rows: int) -> Sequences:
        ids, wanted = batch(step)
        return Sequences(ids[:rows, :length], torch.full((rows,), length), wanted[:rows, :length])


def student_of(objective: str, variant: str = "features") -> Student:
    head = make_head(variant)
    return Student(head, Draft(head, intermediate_size=48) if objective != "attention" else None)


def eager(target: Target, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Attention probabilities and hidden states of Hugging Face's own eager attention."""
    model = LlamaForCausalLM(target.model.config)
    model.load_state_dict(target.model.state_dict())
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(ids, output_attentions=True, output_hidden_states=True)
    return list(out.attentions), list(out.hidden_states)


def test_teacher_rows_features_and_hidden_states_are_the_models_own(target: Target) -> None:
    ids, _ = batch(0)
    rows = torch.tensor([[0, 95, 7, 40, 40], [1, 2, 94, 63, 5]])
    shown: list[Tensor] = []
    teacher = Teacher(IDENTITY, GROUPS)
    before = target.model.config._attn_implementation
    seen = target.observe(ids, rows, lambda layer, weights: shown.append(weights), teacher)
    assert target.model.config._attn_implementation == before
    attentions, hidden = eager(target, ids)
    assert len(shown) == LAYERS
    for mine, theirs in zip(shown, attentions, strict=True):
        expected = torch.stack([theirs[n][:, rows[n]] for n in range(2)])  # [N, Hq, Q, S]
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(seen.features, torch.cat(hidden[:3], -1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.hidden, hidden[-1], rtol=1e-4, atol=1e-5)
    first_group = torch.stack([layer[:, :2].amax(1) for layer in shown]).mean(0)
    torch.testing.assert_close(teacher.weights[:, 0], first_group)


@pytest.mark.parametrize("layers", ["mean", "max"])
def test_the_head_map_says_which_heads_teach_a_group(layers: Pool) -> None:
    weights = [torch.rand(1, HEADS, 3, 8) for _ in range(LAYERS)]
    teacher = Teacher(((0, 0), (2, 0), (2, 2)), 3, layers=layers)
    for layer, each in enumerate(weights):
        teacher(layer, each)
    pairs = [[each[:, 2 * h : 2 * h + 2].amax(1) for h in range(2)] for each in weights]
    for group, read in ((0, (pairs[0][0], pairs[0][1], pairs[1][1])), (2, (pairs[1][0], pairs[2][0], pairs[2][1]))):
        together = torch.stack(read)
        torch.testing.assert_close(teacher.weights[:, group], together.mean(0) if layers == "mean" else together.amax(0))
    assert not teacher.weights[:, 1].any()


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
    kept = keep(torch.arange(12.0).expand(1, 1, 2, 12), far, always, 2)
    assert kept[0, 0, 0].nonzero().flatten().tolist() == [0, 1, 5, 6, 7, 8, 9]
    assert kept[0, 0, 1].nonzero().flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_loss_is_zero_for_the_teacher_itself_and_finite_without_candidates(target: Target, pool: str) -> None:
    ids, _ = batch(0)
    rows, real = torch.tensor([[1, 60, 90], [30, 2, 95]]), torch.ones(2, 3, dtype=torch.bool)
    teacher = Teacher(IDENTITY, GROUPS)
    seen = target.observe(ids, rows, teacher)
    far, _ = candidates(rows, LENGTH, 2, 4)
    perfect = (teacher.weights * far).clamp_min(1e-30).log()
    assert attention_loss(perfect, teacher.weights, far, real).abs() < 1e-5
    head = make_head()
    loss = attention_loss(head_log_weights(head, seen, rows, far, pool), teacher.weights, far, real)  # type: ignore[arg-type]
    loss.backward()
    assert loss > 0 and all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_recall_is_the_mass_of_the_kept_tokens(target: Target) -> None:
    ids, wanted = batch(0)
    [recall] = measure(make_head(), target, [(ids, wanted)], [12], queries=7, sink=2, recent=4).values()
    rows, real = sample_rows(wanted, 7, 0.0, torch.Generator().manual_seed(0))
    assert real.all()
    expected = {"layer": 0.0, "window": 0.0}
    for attention in eager(target, ids)[0]:
        for n in range(2):
            for row in rows[n].tolist():
                for group in range(GROUPS):
                    mine = attention[n, 2 * group : 2 * group + 2, row]  # [2, S]
                    competing = range(2, max(2, row - 3))
                    best = sorted(competing, key=lambda t: -mine[:, t].max().item())[:6]
                    always = {*range(2), *range(max(2, row - 3), row + 1)}
                    for name, kept in (("layer", always | set(best)), ("window", {0, 1, *range(row - 9, row + 1)})):
                        expected[name] += mine[:, sorted(kept)].sum(-1).mean().item() / (LAYERS * 2 * 7 * GROUPS)
    assert recall["layer"] == pytest.approx(expected["layer"], abs=1e-4)
    assert recall["window"] == pytest.approx(expected["window"], abs=1e-4)


@pytest.mark.parametrize(
    ("objective", "variant"),
    [*(("attention", variant) for variant in ("features", "embedding", "bands")), ("both", "features"), ("output", "features")],
)
def test_training_lowers_the_loss_and_raises_recall(target: Target, tmp_path: Path, objective: str, variant: str) -> None:
    student = student_of(objective, variant)
    batches = [batch(0), batch(1)]
    before = measure(student.head, target, batches, (12,), sink=2, recent=4)[12]
    train(student, target, Fixed(), replace(CONFIG, objective=objective), tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(log) == CONFIG.steps
    for name in {"attention", "output"} & set(log[0]):
        losses = [row[name] for row in log]
        assert sum(losses[-4:]) < 0.96 * sum(losses[:4]), name
    after = measure(student.head, target, batches, (12,), sink=2, recent=4)[12]
    if objective != "output":  # what output distillation does to recall is measured, not promised
        assert after["head"] > before["head"] + 0.03
        assert after["window"] < after["head"] < after["layer"] <= 1.0 and after["shared"] < after["layer"]
        assert after["head"] < after["shared"] or variant == "bands"
    else:
        assert log[-1]["agreement"] > log[0]["agreement"]


@pytest.mark.parametrize(("objective", "loop_steps"), [("attention", 0), ("both", 0), ("attention", 6)])
def test_a_stopped_training_continues_exactly(target: Target, tmp_path: Path, objective: str, loop_steps: int) -> None:
    config = replace(CONFIG, steps=8 - loop_steps, warmup=3, queries=8, save_every=3, objective=objective, loop_steps=loop_steps)
    whole, parts, resumed = (student_of(objective) for _ in range(3))
    train(whole, target, Fixed(), config, tmp_path / "whole")
    train(parts, target, Fixed(), config, tmp_path / "parts", until=3)
    train(resumed, target, Fixed(), config, tmp_path / "parts")
    assert any(not torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_accumulated_gradients_are_those_of_the_whole_batch(target: Target, tmp_path: Path) -> None:
    """Two batches of one step move the head as their mean does."""

    class Two:
        def draw(self, step: int, length: int, rows: int) -> Sequences:
            ids, wanted = batch(0)
            part = slice(step % 2, step % 2 + 1) if rows == 1 else slice(None)
            return Sequences(ids[part], torch.full((rows,), length), wanted[part])

    config = replace(CONFIG, steps=1, queries=LENGTH, random_share=0.0, warmup=1, clip=1e9, effect_weight=0.0)
    whole, parts = student_of("attention"), student_of("attention")
    train(whole, target, Two(), config, tmp_path / "whole")
    train(parts, target, Two(), replace(config, accumulate=2), tmp_path / "parts")
    start = make_head().q_proj.weight
    moved, same = whole.head.q_proj.weight - start, parts.head.q_proj.weight - start
    # Adam's first step is the sign of the gradient; the two losses weigh their queries by slightly different masses.
    assert (moved.sign() == same.sign()).float().mean() > 0.95


def test_a_checkpoint_of_other_settings_or_a_broken_one_is_refused(target: Target, tmp_path: Path) -> None:
    config = replace(CONFIG, steps=1, queries=4)
    train(student_of("attention"), target, Fixed(), config, tmp_path)
    with pytest.raises(SpeContextError, match=r"other settings \(learning_rate\)"):
        train(student_of("attention"), target, Fixed(), replace(config, learning_rate=1e-3), tmp_path)
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    best = {"step": 1, "value": 0.5, "lowest": 0.5, "state": {}}
    for broken in (saved | {"step": 7}, saved | {"config": None}, saved | {"best": best}, [saved], saved | {"student": 1}):
        torch.save(broken, tmp_path / "checkpoint.pt")
        with pytest.raises(SpeContextError, match=r"cannot resume from .*: begin again in another directory"):
            train(student_of("attention"), target, Fixed(), config, tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(whole[:200])
    with pytest.raises(SpeContextError, match=r"cannot resume from .*: begin again in another directory"):
        train(student_of("attention"), target, Fixed(), config, tmp_path)


def test_a_row_that_cannot_be_read_loses_no_step(target: Target, tmp_path: Path) -> None:
    """What was trained before it is kept, and goes on as if nothing had been once the row is mended."""

    class Broken(Fixed):
        def draw(self, step: int, length: int, rows: int) -> Sequences:
            if step == 2:
                raise DataError("line 7 is no JSON")
            return super().draw(step, length, rows)

    config = replace(CONFIG, steps=4, queries=4, save_every=100)
    whole, parts, resumed = (student_of("attention") for _ in range(3))
    train(whole, target, Fixed(), config, tmp_path / "whole")
    with pytest.raises(DataError, match="line 7"):
        train(parts, target, Broken(), config, tmp_path / "parts")
    train(resumed, target, Fixed(), config, tmp_path / "parts")
    assert len((tmp_path / "parts" / "log.jsonl").read_text().splitlines()) == 4
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_place_that_cannot_be_written_is_one_sentence(target: Target, tmp_path: Path) -> None:
    config = replace(CONFIG, steps=1, queries=4)
    (tmp_path / "file").touch()
    with pytest.raises(SpeContextError, match="file cannot be written"):
        train(student_of("attention"), target, Fixed(), config, tmp_path / "file")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # as if the disk were full
    try:
        with pytest.raises(SpeContextError, match=r"checkpoint\.pt cannot be written: .*; make room and resume"):
            train(student_of("attention"), target, Fixed(), config, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [file.name for file in tmp_path.iterdir() if "checkpoint" in file.name] == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"objective": "logits"}, "unknown objective 'logits': choose one of attention, output, both"),
        ({"precision": "int8"}, "unknown precision"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"teacher_layers": "median"}, "unknown teacher_layers 'median': choose one of max, mean"),
        ({"effect_weight": -1.0}, "effect_weight must be at least 0"),
        ({"attention_weight": 0.0, "effect_weight": 0.0}, "are both 0: raise one of them"),
        ({"loop_temperature": 0.0}, "loop_temperature must be above 0"),
        ({"loop_steps": 2, "objective": "output"}, "the loop teaches a head to select"),
        ({"loop_steps": 2, "loop_weight": 0.0}, "loop_weight is 0"),
        ({"lengths": ((20, 1.0),), "sink": 4, "recent": 16}, r"longer than sink \+ recent = 20"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **setting)  # type: ignore[arg-type]


def test_map_of_a_head_is_its_own_or_the_identity() -> None:
    config = make_head().config
    assert map_of(config, LAYERS, GROUPS) == IDENTITY
    own = ((1, 0), (0, 0), (1, 1))
    assert map_of(replace(config, head_map=own), LAYERS, GROUPS) == own

"""What the model loses with a selection: the numbers of the evaluation suite, and the best head of a training by them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specontext import LLM
from specontext.distill.data.source import Sequences
from specontext.distill.fidelity import last_positions, measure_losses
from specontext.distill.held_out import HeldOut
from specontext.distill.settings import DistillConfig
from specontext.distill.student import Student
from specontext.distill.target import Target
from specontext.distill.trainer import CRITERION, Progress, train
from specontext.evaluation.fidelity.compare import Comparison
from specontext.evaluation.windows import Window
from specontext.retrieval.checkpoint import load_head
from specontext.retrieval.head import RetrievalHead

BUDGET = 14
KEPT = {"sink": 2, "recent": 4}


def target_and_head(llm: LLM, folder: Path) -> tuple[Target, RetrievalHead]:
    head = load_head(folder, target=llm.engine.loaded.shape)
    return Target(llm.engine.loaded.model, head.config.feature_layers), head


@pytest.mark.parametrize(
    ("family", "compared"),
    [
        ("mistral", 12),
        ("llama", 1),
        ("qwen2", 1),
        ("qwen3", 1),
        ("windows", 1),
        ("shared", 1),
        ("sinks", 1),
        ("delta", 1),
        ("latents", 1),
    ],
)
def test_losses_are_those_of_the_evaluation_suite(
    make_llm: Callable[..., LLM], checkpoint: Callable[[str], Path], prompts: list[list[int]], family: str, compared: int
) -> None:
    """A head without features selects the same in both; others do at the first token, before features drift in the engine."""
    llm = make_llm(family, "speculative", budget=BUDGET, methods=("full", "streaming"))
    target, head = target_and_head(llm, checkpoint(family))
    ids = prompts[2][:60]
    wanted = [number != 3 for number in range(compared)]
    comparison = Comparison(llm, [Window("0", ids, wanted)])
    full, theirs = comparison.full[0], comparison.methods([("speculative", BUDGET), ("streaming", BUDGET)])[0]
    marks = torch.tensor([[*[False] * (59 - compared), *wanted, False, False, False, False]])
    padded = torch.tensor([[*ids, 7, 7, 7]])
    found = measure_losses(head, target, [(padded, marks)], [BUDGET, 400], queries=compared, **KEPT)
    for mine, their in zip((found[BUDGET]["head"], found[BUDGET]["window"]), theirs, strict=True):
        assert mine.kl_divergence == pytest.approx(their.kl_divergence, rel=1e-3, abs=1e-5) and mine.kl_divergence > 0.01
        assert math.log(mine.perplexity_ratio) == pytest.approx(their.cross_entropy - full.cross_entropy, rel=1e-3, abs=1e-4)
        assert mine.agreement == their.agreement
    for lost in found[400].values():  # everything fits
        assert (lost.kl_divergence, lost.perplexity_ratio, lost.agreement) == pytest.approx((0.0, 1.0, 1.0), abs=1e-4)


def test_windows_end_at_the_last_wanted_position_and_short_sequences_are_left_out() -> None:
    wanted = torch.zeros(4, 20, dtype=torch.bool)
    wanted[0, 9:13] = wanted[1, 2] = wanted[3, 19] = True
    ids, window = last_positions(torch.arange(80).view(4, 20), wanted, 6)
    assert ids[:, 0].tolist() == [0, 60]
    assert window.rows.tolist() == [[7, 8, 9, 10, 11, 12], [14, 15, 16, 17, 18, 19]]
    assert window.real.tolist() == [[False, False, True, True, True, True], [False] * 5 + [True]]


class Random:
    def draw(self, step: int, length: int, rows: int) -> Sequences:
        ids = torch.randint(4, 500, (rows, length), generator=torch.Generator().manual_seed(step))
        wanted = (torch.arange(length) < length - 1).expand(rows, -1)
        return Sequences(ids, torch.full((rows,), length), wanted)


def test_the_log_has_recall_and_losses_and_what_they_are_measured_against(
    make_llm: Callable[..., LLM], checkpoint: Callable[[str], Path]
) -> None:
    target, head = target_and_head(make_llm("llama", "full"), checkpoint("llama"))
    held_out = HeldOut(target, Random(), 256, **KEPT)
    found, again = held_out.judge(head, 1), held_out.judge(head, 1)
    assert found == again  # the references of the first time are those of the second
    parts = ("recall", "of_shared_oracle", "kl", "kl_shared_oracle", "kl_window", "perplexity_ratio", "agreement")
    places = ("256_32", "256_16", "64_8")  # 1/16 of 64 is less than sinks and recent tokens
    assert set(found) == {f"{part}_{place}" for part in parts for place in places} | {CRITERION}
    assert found[CRITERION] == pytest.approx(sum(found[f"kl_{place}"] for place in places) / 3, abs=1e-4)
    other = HeldOut(target, Random(), 24, **KEPT)
    assert CRITERION not in other.judge(head, 1)  # no room for any selection


def some_config(steps: int) -> DistillConfig:
    return DistillConfig(
        steps=steps, lengths=((64, 1.0),), tokens_per_step=64, queries=8, replay_queries=4, measure_every=2, save_every=3, **KEPT
    )


def test_the_best_head_of_a_training_is_kept_across_a_stop(
    make_llm: Callable[..., LLM], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """By what is measured, not by what came last."""
    llm = make_llm("llama", "full")
    config = replace(some_config(6), loop_steps=3)
    states: dict[str, list[dict[str, Tensor]]] = {}

    def training(run: str, until: int | None, values: Iterator[float]) -> tuple[int | None, Student]:
        target, head = target_and_head(llm, checkpoint("llama"))
        student = Student(head)

        def evaluate() -> dict[str, float]:
            states.setdefault(run, []).append({name: tensor.clone() for name, tensor in student.state_dict().items()})
            return {CRITERION: next(values)}

        best = train(student, target, Random(), config, tmp_path / run, evaluate=evaluate, until=until)
        return (None if best is None else best.step), student

    kept, whole = training("whole", None, iter([3.0, 1.0, math.nan, 2.0, 1.5]))
    assert kept == 4
    assert [
        row["step"] for row in map(json.loads, (tmp_path / "whole" / "log.jsonl").read_text().splitlines()) if CRITERION in row
    ] == [
        2,
        4,
        6,
        8,
        9,
    ]
    assert all(torch.equal(tensor, states["whole"][1][name]) for name, tensor in whole.state_dict().items())
    training("parts", 5, iter([3.0, 1.0]))
    kept, resumed = training("parts", None, iter([4.0, 2.0, 1.5]))
    assert kept == 4
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in resumed.state_dict().items())
    for mine, theirs in zip(states["parts"][-1].values(), states["whole"][-1].values(), strict=True):
        assert torch.equal(mine, theirs)  # the last state, loop included, is also the same


@pytest.mark.parametrize(
    ("values", "kept"),
    [([3e-5, 9e-5], 1), ([0.0100, 0.0101], 1), ([0.0100, 0.0104], 0), ([0.5, 0.505, 0.5099, 0.5149], 2), ([0.2, 0.1, 0.15], 1)],
)
def test_of_heads_that_lose_alike_the_one_that_was_trained_longest_is_kept(
    values: list[float], kept: int, make_llm: Callable[..., LLM], checkpoint: Callable[[str], Path]
) -> None:
    student = Student(target_and_head(make_llm("llama", "full"), checkpoint("llama"))[1])
    progress = Progress()
    for step, value in enumerate(values):
        progress.step = step
        progress.see(student, value)
    assert progress.best is not None and progress.best.step == kept


@pytest.mark.parametrize("options", [{"effect_weight": 0.0}, {"attention_weight": 0.0}, {"teacher_layers": "mean"}, {}])
def test_training_lowers_what_is_lost(
    make_llm: Callable[..., LLM], checkpoint: Callable[[str], Path], tmp_path: Path, options: dict[str, object]
) -> None:
    target, head = target_and_head(make_llm("llama", "full"), checkpoint("llama"))

    class Same:
        def draw(self, step: int, length: int, rows: int) -> Sequences:
            return Random().draw(0, length, rows)

    config = replace(some_config(40), learning_rate=2e-2, warmup=5, queries=32, replay_queries=32, measure_every=1000, **options)  # type: ignore[arg-type]
    batch = Same().draw(0, 64, 1)
    batches = [(batch.ids, batch.wanted)]
    before = measure_losses(head, target, batches, [BUDGET], queries=32, compared=("head",), **KEPT)[BUDGET]["head"]
    train(Student(head), target, Same(), config, tmp_path)
    after = measure_losses(head, target, batches, [BUDGET], queries=32, compared=("head",), **KEPT)[BUDGET]["head"]
    assert after.kl_divergence < 0.8 * before.kl_divergence

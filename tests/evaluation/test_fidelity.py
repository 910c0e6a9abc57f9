"""Fidelity to full attention: against Hugging Face's own logits, and the whole suite on small texts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from specontext import LLM
from specontext.distill.fidelity import measures
from specontext.evaluation.fidelity.compare import Comparison, Fidelity
from specontext.evaluation.fidelity.run import run_fidelity
from specontext.evaluation.report import write_report
from specontext.evaluation.run import Advance
from specontext.evaluation.samples import EvaluationError
from specontext.evaluation.settings import EvaluationSettings
from specontext.evaluation.windows import Window
from tests.evaluation.test_windows import write

MakeLLM = Callable[..., LLM]
COMPARED = 12


def silently(phase: str, parts: int) -> Advance:
    return lambda done: None


@pytest.fixture(scope="module")
def window(prompts: list[list[int]]) -> Window:
    """Random tokens, of whose last ones all but two are compared."""
    wanted = [True] * COMPARED
    wanted[0] = wanted[5] = False
    return Window("0", prompts[2], wanted)


@pytest.fixture(scope="module")
def llm(make_llm: MakeLLM) -> LLM:
    return make_llm("llama", "speculative", budget=100, methods=("full", "streaming", "oracle"), measure_recall=True)


def compare_window(llm: LLM, window: Window, ways: list[tuple[str, int | None]]) -> list[Fidelity]:
    """Full attention's own numbers, then those of each method and budget."""
    comparison = Comparison(llm, [window])
    return [comparison.full[0], *comparison.methods(ways)[0]]


def plain(fidelity: Fidelity) -> tuple[float, ...]:
    return (fidelity.agreement, fidelity.kl_divergence, fidelity.cross_entropy, fidelity.full_cross_entropy)


def test_a_budget_that_holds_everything_changes_nothing(llm: LLM, window: Window) -> None:
    full, *others = compare_window(llm, window, [("speculative", 100), ("streaming", 100), ("oracle", 100), ("full", None)])
    assert plain(full)[:2] == (1.0, 0.0) and full.cross_entropy == full.full_cross_entropy
    for other in others:
        assert plain(other) == pytest.approx(plain(full), abs=1e-5)
        assert other.agreement == 1.0


def test_full_attention_has_hugging_face_s_perplexity(
    llm: LLM, window: Window, reference: Callable[[str], PreTrainedModel]
) -> None:
    (full,) = compare_window(llm, window, [])
    ids = torch.tensor(window.token_ids)
    losses = torch.nn.functional.cross_entropy(reference("llama")(ids[None]).logits[0, :-1], ids[1:], reduction="none")
    expected = losses[-COMPARED:][torch.tensor(window.wanted)].mean().item()
    assert full.cross_entropy == pytest.approx(expected, abs=1e-4)


def test_a_small_window_of_tokens_against_masked_attention(
    llm: LLM, window: Window, reference: Callable[[str], PreTrainedModel], masked_forward: Callable[..., Any]
) -> None:
    """Two sinks and the last 14 tokens, computed by Hugging Face's model under a mask."""
    full, streaming = compare_window(llm, window, [("streaming", 16)])
    model, ids = reference("llama"), window.token_ids
    causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril().expand(model.config.num_attention_heads, -1, -1)
    sparse = causal.clone()
    for position in range(len(ids) - COMPARED - 1, len(ids)):
        sparse[:, position, 2 : position + 1 - 14] = False
    layers = model.config.num_hidden_layers
    p, q = (
        masked_forward(model, ids, [mask] * layers).logits[0, -COMPARED - 1 : -1].log_softmax(-1) for mask in (causal, sparse)
    )
    wanted = torch.tensor(window.wanted)
    expected = (
        (p.argmax(-1) == q.argmax(-1))[wanted].double().mean().item(),
        (p.exp() * (p - q)).sum(-1)[wanted].mean().item(),
        -q.gather(1, torch.tensor(ids[-COMPARED:])[:, None])[wanted].mean().item(),
        full.cross_entropy,
    )
    assert plain(streaming) == pytest.approx(expected, rel=1e-3)
    assert streaming.kl_divergence > 0.1


def test_recall_of_every_layer(llm: LLM, window: Window) -> None:
    for fidelity in compare_window(llm, window, [("streaming", 16), ("oracle", 16)]):
        layers = fidelity.stats["attention_recall_by_layer"]
        assert len(layers) == llm.shape.layers
        assert sum(layers) / len(layers) == pytest.approx(fidelity.stats["attention_recall"])


def test_methods_are_the_same_alone_and_in_any_company(make_llm: MakeLLM, llm: LLM, window: Window) -> None:
    choices = [("streaming", 16), ("speculative", 20), ("oracle", 16)]
    together = [plain(fidelity) for fidelity in compare_window(llm, window, choices)[1:]]
    alone = [plain(compare_window(llm, window, [choice])[1]) for choice in choices]
    # One seat: full attention has ended before the others begin. A chunk of 9: it decodes while they are prefilled.
    slow = make_llm("llama", "speculative", budget=100, methods=("full", "streaming", "oracle"), max_num_seqs=1)
    chunked = make_llm("llama", "speculative", budget=100, methods=("full", "streaming", "oracle"), max_num_batched_tokens=9)
    for found in (alone, *([plain(one) for one in compare_window(other, window, choices)[1:]] for other in (slow, chunked))):
        for one, expected in zip(found, together, strict=True):
            assert one == pytest.approx(expected, abs=1e-5)


def test_measures_by_hand() -> None:
    full, other = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.25, 0.5, 0.25]).log()
    never = torch.tensor([0.5, 0.5, 0.0]).log()
    found = measures(torch.stack((full, full)), torch.stack((full, other)), torch.tensor([1, 1]))
    divergence = 0.5 * math.log(2) - 0.25 * math.log(2)
    expected = torch.tensor([[1.0, 0.0, math.log(4)], [0.0, divergence, math.log(2)]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert measures(never[None], never[None], torch.tensor([1]))[0].tolist() == pytest.approx([1.0, 0.0, math.log(2)])


# The suite ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> EvaluationSettings:
    folder = tmp_path_factory.mktemp("fidelity")
    return EvaluationSettings(
        "nano",
        ("fidelity",),
        folder / "out",
        methods=("speculative", "streaming"),
        budgets=(64, 256),
        lengths=(192, 400, 99_999),
        limit=2,
        texts=("tasks:retrieval", str(write(folder, tokenizer, 300))),
        compared=16,
        engine={"device": "cpu", "max_num_seqs": 4, "max_model_len": 512, "measure_recall": True},
        command="specontext eval nano",
    )


@pytest.fixture(scope="module")
def results(settings: EvaluationSettings) -> dict[str, Any]:
    return run_fidelity(settings, silently)


def test_rows_of_all_texts(results: dict[str, Any], settings: EvaluationSettings) -> None:
    cells = {(row["task"], row["length"], row["method"], row["budget"]): row for row in results["rows"]}
    choices = [("full", None), *((method, 64) for method in settings.methods)]
    more = [(method, 256) for method in settings.methods]
    places = [("tasks:retrieval", 192, choices), ("text.txt", 192, choices), ("tasks:retrieval", 400, choices + more)]
    assert set(cells) == {(task, length, *choice) for task, length, some in places for choice in some}
    for (_, length, method, _), row in cells.items():
        scores = row["scores"]
        assert row["n"] == 2 and 0 <= row["score"] <= 1 and row["output_tokens"] == 16
        assert scores["kl_low"] <= scores["kl_divergence"] <= scores["kl_high"]
        assert scores["ratio_low"] <= scores["perplexity_ratio"] <= scores["ratio_high"]
        full = cells[row["task"], length, "full", None]["scores"]
        assert scores["perplexity"] == pytest.approx(scores["perplexity_ratio"] * full["perplexity"])
        assert sum(row["attention_recall_by_layer"]) / 4 == pytest.approx(row["attention_recall"])
        if method == "full":
            assert (row["score"], scores["kl_divergence"], scores["perplexity_ratio"], row["attention_recall"]) == (1, 0, 1, 1)
        else:
            assert row["attention_recall"] < 1 and scores["kl_divergence"] > 0
    known, blind = (cells["tasks:retrieval", 400, method, 64] for method in ("speculative", "streaming"))
    assert known["score"] == 1 and known["scores"]["kl_divergence"] < 0.01
    assert blind["score"] < 0.9 and blind["scores"]["perplexity_ratio"] > 2


def test_pairs_notes_and_report(results: dict[str, Any], settings: EvaluationSettings) -> None:
    assert {(pair["method"], pair["other"]) for pair in results["pairs"]} == {
        ("speculative", "full"),
        ("streaming", "full"),
        ("speculative", "streaming"),
    }
    notes = {(note.get("task"), note["length"]): note["why"] for note in results["meta"]["notes"]}
    assert "end at 512 tokens" in notes["tasks:retrieval", 99_999]
    assert "too few for a window of 400" in notes["text.txt", 400]
    assert notes[None, 192] == "skipped: a budget of 256 holds all of 192 tokens, which is what full reads"
    report = write_report(settings.out)[1].read_text()
    assert "kl\\_divergence" in report and "tasks:retrieval" in report
    chapter = report.partition("## What is lost against full attention")[2].partition("## Accuracy")[0]
    assert "speculative beside each other method" in chapter and "KL of speculative minus this" in chapter
    assert "mean over 2 texts, 192 tokens" in chapter and "tasks:retrieval, 400 tokens" in chapter


def test_differences_in_what_is_lost_are_paired(results: dict[str, Any], settings: EvaluationSettings) -> None:
    samples = [json.loads(line) for line in (settings.out / "samples.jsonl").read_text().splitlines()]
    of = {(one["task"], one["length"], one["method"], one["budget"], one["key"]): one["scores"] for one in samples}
    for pair in results["pairs"]:
        place, budget = (pair["task"], pair["length"]), pair["budget"]
        keys = [name[-1] for name in of if name[:4] == (*place, pair["method"], budget)]
        other = None if pair["other"] == "full" else budget
        for name in ("kl_divergence", "cross_entropy"):
            mine, theirs = (
                [of[*place, method, entries, key][name] for key in keys]
                for method, entries in ((pair["method"], budget), (pair["other"], other))
            )
            differences, said = [a - b for a, b in zip(mine, theirs, strict=True)], pair["differences"][name]
            assert said["mean"] == pytest.approx(sum(differences) / len(differences))
            assert said["low"] == pytest.approx(min(differences)) and said["high"] == pytest.approx(max(differences))  # of two


def test_a_second_run_measures_only_what_is_missing(results: dict[str, Any], settings: EvaluationSettings) -> None:
    before = (settings.out / "samples.jsonl").read_text()
    again = run_fidelity(settings, silently)
    assert (settings.out / "samples.jsonl").read_text() == before and again["rows"] == results["rows"]
    more = run_fidelity(replace(settings, methods=("random",), budgets=(64,), lengths=(192,)), silently)
    added = (settings.out / "samples.jsonl").read_text().removeprefix(before).splitlines()
    assert [json.loads(line)["method"] for line in added] == ["random"] * 4
    known = [row for row in more["rows"] if row["method"] != "random"]
    assert sorted(map(json.dumps, known)) == sorted(map(json.dumps, results["rows"]))


def test_recall_is_measured_where_it_is_asked_for_and_then_added(settings: EvaluationSettings, tmp_path: Path) -> None:
    engine = {name: value for name, value in settings.engine.items() if name != "measure_recall"}
    plain = replace(settings, out=tmp_path / "out", lengths=(192,), methods=("streaming",), limit=1, engine=engine)
    rows = run_fidelity(plain, silently)["rows"]
    assert all(row["attention_recall"] is None and "attention_recall_by_layer" not in row for row in rows)
    asked = run_fidelity(replace(plain, engine=settings.engine), silently)["rows"]
    assert all(0 < row["attention_recall"] <= 1 and row["n"] == 1 for row in asked) and len(asked) == len(rows)


def test_other_windows_are_not_mixed_in(results: dict[str, Any], settings: EvaluationSettings) -> None:
    rows = run_fidelity(replace(settings, limit=1), silently)["rows"]
    assert {row["n"] for row in rows} == {2}
    short = replace(settings, lengths=(192,), methods=("streaming",), texts=settings.texts[1:])
    assert max(row["n"] for row in run_fidelity(replace(short, limit=3), silently)["rows"]) == 3  # one more between the two
    for other in ({"limit": 4}, {"limit": 3, "compared": 8}):
        with pytest.raises(EvaluationError, match="other windows of"):
            run_fidelity(replace(short, **other), silently)


def test_a_text_that_has_changed_is_refused(settings: EvaluationSettings, tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "texts").mkdir()
    file = write(tmp_path / "texts", tokenizer, 60)
    one = replace(settings, texts=(str(file),), lengths=(32,), limit=1, budgets=(24,), methods=("full",), out=tmp_path / "out")
    run_fidelity(one, silently)
    words = file.read_text().split(" ")
    file.write_text(" ".join([words[1], words[0], *words[2:]]))
    with pytest.raises(EvaluationError, match="answers to other problems of fidelity"):
        run_fidelity(one, silently)


def test_what_cannot_be_run_is_named(settings: EvaluationSettings, tmp_path: Path, tokenizer: Any) -> None:
    asked = replace(settings, out=tmp_path / "out")
    with pytest.raises(EvaluationError, match="end at 512 tokens"):
        run_fidelity(replace(asked, lengths=(600,)), silently)
    with pytest.raises(EvaluationError, match="at least 16 tokens, got 8"):
        run_fidelity(replace(asked, lengths=(8,)), silently)
    with pytest.raises(EvaluationError, match="same name"):
        (tmp_path / "other").mkdir()
        run_fidelity(replace(asked, texts=(settings.texts[1], str(write(tmp_path / "other", tokenizer, 50)))), silently)
    with pytest.raises(EvaluationError, match="needs texts"):
        replace(settings, texts=())
    with pytest.raises(EvaluationError, match="by itself"):
        replace(settings, suites=("fidelity", "ruler"))
    with pytest.raises(EvaluationError, match="compared tokens"):
        replace(settings, compared=0)

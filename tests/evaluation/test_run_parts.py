"""The pieces of an evaluation: intervals, samples on disk, rows and pairs, competitors and cells."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from specontext.evaluation.bootstrap import mean_interval
from specontext.evaluation.cells import choose_tasks, draw_cells
from specontext.evaluation.competitors import Competitor, parse_competitors
from specontext.evaluation.results import read_meta, write_results
from specontext.evaluation.rows import cell_rows
from specontext.evaluation.samples import FILE, EvaluationError, Sample, SampleFile
from specontext.evaluation.settings import EvaluationSettings
from specontext.evaluation.suites import SUITES, Example, TextTools
from specontext.evaluation.text_tools import text_tools

METHODS = ("full", "speculative", "quest")


def sample(key: str, method: str = "full", budget: int | None = None, score: float = 1.0, **changes: Any) -> Sample:
    stats = {"tokens_read_per_step": 100.0 * score, "overlap": None, "ttft_s": 1.0, "tpot_s": 0.5}
    values = {"suite": "s", "task": "t", "length": 512, "scores": {"score": score, "steps": 0.5}, "output": "out"}
    values |= {"finish_reason": "stop", "output_tokens": 3, "stats": stats, "seconds": 2.0}
    return Sample(**{**values, "key": key, "method": method, "budget": budget, "score": score, **changes})


# Intervals ------------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_shrinks_with_the_root_of_the_number() -> None:
    rng = random.Random(0)
    few, many = ([rng.gauss(0.5, 0.2) for _ in range(n)] for n in (25, 2500))
    for values in (few, many):
        low, high = mean_interval(values, seed=0)
        assert low is not None and high is not None
        error = 0.2 / len(values) ** 0.5
        assert high - low == pytest.approx(2 * 1.96 * error, rel=0.35)
        assert low < sum(values) / len(values) < high


def test_intervals_cover_the_true_mean_about_as_often_as_they_say() -> None:
    rng = random.Random(1)
    covered = 0
    for trial in range(200):
        low, high = mean_interval([float(rng.random() < 0.7) for _ in range(60)], seed=trial)
        assert low is not None and high is not None
        covered += low <= 0.7 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_intervals_are_reproducible_and_undefined_where_nothing_varies() -> None:
    assert mean_interval([0.0, 1.0, 1.0], seed=3) == mean_interval([0.0, 1.0, 1.0], seed=3)
    assert mean_interval([1.0], seed=0) == mean_interval([], seed=0) == (None, None)
    assert mean_interval([1.0] * 5, seed=0) == (1.0, 1.0)


# Rows and pairs -------------------------------------------------------------------------------------------------------


def test_rows_are_means_of_the_problems() -> None:
    samples = [sample("0"), sample("1", score=0.0), sample("0", "quest", 64), sample("1", "quest", 64)]
    rows, _ = cell_rows(samples, methods=METHODS, seed=0)
    full, quest = rows
    wanted = "suite task method budget length n score ci_low ci_high tokens_read selection_bytes bytes_loaded overlap "
    wanted += "attention_recall output_tokens seconds"
    assert set(wanted.split()) <= set(full)
    assert (full["method"], full["budget"], full["n"], full["score"]) == ("full", None, 2, 0.5)
    assert full["tokens_read"] == 50 and full["overlap"] is None and full["selection_bytes"] is None
    assert full["scores"] == {"steps": 0.5}
    assert full["answer_seconds"] == 2.0
    assert (quest["method"], quest["budget"], quest["score"]) == ("quest", 64, 1.0)


def test_pairs_are_made_on_common_problems_and_equal_budgets() -> None:
    scores = {"full": [1, 1, 1, 1], "speculative": [1, 1, 0, 1], "quest": [0, 1, 0, 0]}
    samples = []
    for method, values in scores.items():
        for budget in (None,) if method == "full" else (64, 128):
            samples += [sample(str(i), method, budget, score=float(value)) for i, value in enumerate(values)]
    samples = [s for s in samples if not (s.method == "quest" and s.budget == 128 and s.key == "0")]
    samples = [s for s in samples if not (s.method == "speculative" and s.budget == 128)]
    _, pairs = cell_rows(samples, methods=METHODS, seed=0)
    found = {(p["method"], p["other"], p["budget"]): p for p in pairs}
    assert set(found) == {
        ("speculative", "quest", 64),
        ("speculative", "full", 64),
        ("quest", "full", 64),
        ("quest", "full", 128),
    }
    both = found["speculative", "quest", 64]
    assert both["n"] == 4 and both["difference"] == 0.5
    assert both["ci_low"] >= 0 and both["ci_high"] <= 1
    assert found["quest", "full", 128]["n"] == 3
    assert found["quest", "full", 128]["difference"] == pytest.approx(-2 / 3)


def test_pairing_removes_what_problems_have_in_common() -> None:
    rng = random.Random(0)
    hardness = [rng.random() for _ in range(50)]
    samples = [sample(str(i), "full", None, score=h) for i, h in enumerate(hardness)]
    samples += [sample(str(i), "quest", 64, score=max(0.0, h - 0.01)) for i, h in enumerate(hardness)]
    rows, (pair,) = cell_rows(samples, methods=METHODS, seed=0)
    assert pair["ci_high"] < 0
    assert pair["ci_high"] - pair["ci_low"] < 0.1 * (rows[0]["ci_high"] - rows[0]["ci_low"])


# Files ----------------------------------------------------------------------------------------------------------------


def test_samples_come_back_and_a_torn_line_does_not(tmp_path: Path) -> None:
    file = SampleFile(tmp_path)
    breaks = "a\nb\r\u2028c\u2029d\x85e\x0bf\x1cg"  # all that some reader takes for the end of a line
    file.add([sample("0", output=f"ein Wort – naïve {breaks}"), sample("1", "quest", 64)])
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole + whole[:40])
    again = SampleFile(tmp_path)
    assert list(again.samples.values()) == list(file.samples.values())
    again.add([sample("2")])
    assert [s.key for s in SampleFile(tmp_path).samples.values()] == ["0", "1", "2"]


def test_a_file_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"suite": "s"}\n')
    with pytest.raises(EvaluationError, match=r"line 1 of .* is no sample"):
        SampleFile(tmp_path)


def test_results_have_one_line_a_row_and_are_replaced_as_a_whole(tmp_path: Path) -> None:
    rows, pairs = cell_rows([sample("0"), sample("0", "quest", 64)], methods=METHODS, seed=0)
    assert read_meta(tmp_path) is None
    for some in ([], rows):
        write_results(tmp_path, {"model": "naïve", "notes": [{"why": "x"}]}, some, pairs)
        text = (tmp_path / "results.json").read_text()
        assert json.loads(text) == {"meta": {"model": "naïve", "notes": [{"why": "x"}]}, "rows": some, "pairs": pairs}
    assert sum('"score"' in line for line in text.splitlines()) == len(rows)
    assert read_meta(tmp_path) == {"model": "naïve", "notes": [{"why": "x"}]}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_meta(tmp_path)


# What is asked for ----------------------------------------------------------------------------------------------------


def test_competitors() -> None:
    full, other, own = parse_competitors(["full", "speculative", "speculative@runs/head", "full"])
    assert full.budgets((64, 128)) == (None,) and other.budgets((64, 128)) == (64, 128)
    assert own == Competitor("speculative@runs/head", "speculative", "runs/head")


@pytest.mark.parametrize(
    ("method", "says"),
    [("chess", "unknown method 'chess'"), ("random@runs/head", "has none"), ("speculative@", "names no retrieval head")],
)
def test_competitors_that_are_none(method: str, says: str) -> None:
    with pytest.raises(EvaluationError, match=says):
        parse_competitors([method])


def settings_of(tmp_path: Path, **changes: Any) -> EvaluationSettings:
    return EvaluationSettings(**{"model": "nano", "suites": ("ruler",), "out": tmp_path, "limit": 2, **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"suites": ()}, "no suite was named: choose among ruler, .*fidelity, continuation"),
        ({"suites": ("chess",)}, "unknown suite 'chess'"),
        ({"methods": ()}, "no method"),
        ({"methods": ("chess",)}, "unknown method"),
        ({"budgets": (20,)}, "a budget must be at least 21"),
        ({"budgets": ()}, "no budget"),
        ({"lengths": (0,)}, "a length must be at least 1"),
        ({"limit": 0}, "a limit must be at least 1"),
        ({"suites": ("ruler", "reasoning"), "data": "x"}, "one by one"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(EvaluationError, match=says):
        settings_of(tmp_path, **changes)


class Fixed:
    """A task with two problems of its own, one of which is long."""

    suite, name = "fixed", "fixed"

    def __init__(self, keys: tuple[str, ...] = ("a", "b")) -> None:
        self.keys = keys

    def examples(self, *, length: int | None, n: int, seed: int, text: TextTools) -> list[Example]:
        prompts = [" sun", " sun" * 600]
        return [Example(self.suite, self.name, k, p, ("sun",), 5, length) for k, p in zip(self.keys, prompts, strict=True)]

    def score(self, example: Example, output: str) -> dict[str, float]:
        return {"score": 0.0}


def test_problems_and_lengths_beyond_the_model_are_named(tmp_path: Path, tokenizer: Any) -> None:
    text, notes = text_tools(tokenizer), list[dict[str, Any]]()
    settings = settings_of(tmp_path, lengths=(30, 256, 1024), limit=3)
    tasks = [task for task in SUITES["ruler"]() if task.name == "niah_multikey"]
    cells = list(draw_cells(tasks, settings, text, tokenizer, 512, notes))
    assert [(cell.length, len(cell.problems)) for cell in cells] == [(256, 3)]
    assert {note["length"]: note["why"].split(":")[0] for note in notes} == {30: "skipped", 1024: "skipped"}
    assert "512 tokens" in next(note["why"] for note in notes if note["length"] == 1024)
    notes.clear()
    (cell,) = draw_cells([Fixed()], settings_of(tmp_path, limit=3), text, tokenizer, 512, notes)
    assert cell.length is None and [p.example.key for p in cell.problems] == ["a"]
    assert [note["why"].split(" ")[0] for note in notes] == ["1", "the"]
    with pytest.raises(EvaluationError, match="two problems with one key"):
        list(draw_cells([Fixed(("a", "a"))], settings_of(tmp_path), text, tokenizer, 512, notes))


def test_special_tokens_leave_the_answer_its_room_at_the_model_s_end(tokenizer: Any, tmp_path: Path) -> None:
    text, tasks = text_tools(tokenizer), ("niah_multivalue",)
    settings = EvaluationSettings("nano", ("ruler",), tmp_path, limit=8, tasks=tasks, lengths=(300, 299))
    cells = list(draw_cells(choose_tasks(settings, text, 300, []), settings, text, tokenizer, 300, []))
    assert [cell.length for cell in cells] == [300, 299]
    for problem in (problem for cell in cells for problem in cell.problems):
        answer = text.count_tokens(" " + problem.example.details["answer"])
        assert len(problem.token_ids) + answer <= 300 and len(problem.token_ids) > text.count_tokens(problem.example.prompt)


def test_tasks_that_do_not_fit_are_named_and_run_only_when_asked_for(tmp_path: Path, tokenizer: Any) -> None:
    text, notes = text_tools(tokenizer), list[dict[str, Any]]()
    chosen = choose_tasks(settings_of(tmp_path), text, 512, notes)
    assert "niah_single" in {task.name for task in chosen} and len(chosen) == 5
    assert {note["task"] for note in notes} >= {"cwe", "qa_1"} and all("left out" in note["why"] for note in notes)
    notes.clear()
    chosen = choose_tasks(settings_of(tmp_path, tasks=("cwe", "niah_multivalue")), text, 512, notes)
    assert [(task.name, type(task).__name__) for task in chosen] == [
        ("niah_multivalue", "TrainedTask"),
        ("cwe", "CommonWordsTask"),
    ]
    assert [note["task"] for note in notes] == ["cwe"] and "since it was asked for" in notes[0]["why"]
    with pytest.raises(EvaluationError, match=r"no task 'chess'.*niah_single"):
        choose_tasks(settings_of(tmp_path, tasks=("chess",)), text, 512, notes)

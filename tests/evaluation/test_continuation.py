"""Long continuations beside full attention's: what is measured, and the suite on a small text."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.evaluation.continuation.measures import (
    common_ngrams,
    distinct,
    edit_distance,
    first_difference,
    repetition,
    similarity,
)
from specontext.evaluation.continuation.run import run_continuation
from specontext.evaluation.report import write_report
from specontext.evaluation.samples import EvaluationError
from specontext.evaluation.settings import EvaluationSettings
from tests.evaluation.test_fidelity import silently
from tests.evaluation.test_windows import numbered


def by_recursion(a: list[int], b: list[int]) -> int:
    if not a or not b:
        return len(a) + len(b)
    replaced = by_recursion(a[1:], b[1:]) + (a[0] != b[0])
    return min(replaced, by_recursion(a[1:], b) + 1, by_recursion(a, b[1:]) + 1)


def test_edit_distances() -> None:
    rng = random.Random(0)
    for _ in range(60):
        a, b = ([rng.randrange(3) for _ in range(rng.randrange(6))] for _ in range(2))
        assert edit_distance(a, b) == by_recursion(a, b)
    assert similarity([1, 2, 3, 4], [1, 2, 4]) == 0.75 and similarity([], []) == 1 and similarity([1], [2]) == 0


def test_where_continuations_part() -> None:
    assert first_difference([1, 2, 3], [1, 2, 4]) == 2
    assert first_difference([1, 2], [1, 2, 4]) == 2 and first_difference([1, 2], [1, 2]) == 2 and first_difference([], [1]) == 0


def test_ngrams() -> None:
    assert common_ngrams([1, 2, 3, 4, 5], [9, 1, 2, 3, 4]) == 0.5 and common_ngrams([1], [2]) == 1
    assert distinct([1, 2, 1, 2, 1], 2) == 0.5 and distinct([1], 2) == 1
    assert repetition([1, 2, 3, 4] * 2) == pytest.approx(1 - 4 / 5) and repetition(list(range(9))) == 0


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EvaluationSettings:
    folder = tmp_path_factory.mktemp("continuation")
    return EvaluationSettings(
        "nano",
        ("continuation",),
        folder / "out",
        methods=("speculative", "streaming"),
        budgets=(40,),
        lengths=(120, 99_999),
        limit=2,
        texts=(str(numbered(folder / "rows.jsonl", [90, 40, 130])),),
        new_tokens=24,
        engine={"device": "cpu", "max_num_seqs": 2, "max_model_len": 256},
    )


@pytest.fixture(scope="module")
def results(settings: EvaluationSettings) -> dict[str, Any]:
    return run_continuation(settings, silently)


def samples_of(settings: EvaluationSettings) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (settings.out / "samples.jsonl").read_text().splitlines()]


def test_rows_pairs_and_report(results: dict[str, Any], settings: EvaluationSettings) -> None:
    cells = {row["method"]: row for row in results["rows"]}
    assert set(cells) == {"full", "speculative", "streaming"}
    full = cells["full"]
    assert full["score"] == 1 and full["parting"]["never"] == 1 and full["scores"]["common_ngrams"] == 1
    for row in cells.values():
        assert row["n"] == 2 and row["length"] == 120 and row["scores"]["tokens_written"] <= 24
        spread = row["intervals"]["log_probability"]
        assert spread["low"] <= row["scores"]["log_probability"] <= spread["high"] <= 0
        assert row["parting"]["low"] <= row["parting"]["median"] <= row["parting"]["high"]
    (pair,) = [pair for pair in results["pairs"] if (pair["method"], pair["other"]) == ("streaming", "full")]
    difference = cells["streaming"]["scores"]["log_probability"] - full["scores"]["log_probability"]
    assert pair["differences"]["log_probability"]["mean"] == pytest.approx(difference)
    assert any("end at 256 tokens" in note["why"] for note in results["meta"]["notes"])
    report = write_report(settings.out)[1].read_text()
    assert "Long continuations beside full attention" in report and "rows.jsonl, prompt and continuation 120 tokens" in report


def test_samples_are_compared_with_full_attention_s(results: dict[str, Any], settings: EvaluationSettings) -> None:
    samples = samples_of(settings)
    full = {one["key"]: one["stats"]["token_ids"] for one in samples if one["method"] == "full"}
    for one in samples:
        written = one["stats"]["token_ids"]
        assert one["scores"]["parted_after"] == first_difference(written, full[one["key"]])
        assert one["score"] == similarity(written, full[one["key"]])


def test_log_probabilities_are_those_of_decoding_densely(settings: EvaluationSettings, results: dict[str, Any]) -> None:
    """What a method wrote, forced through full attention token by token."""
    llm = LLM("nano", None, SpeContextConfig(method="full"), device="cpu", max_model_len=256)
    one = next(sample for sample in samples_of(settings) if sample["method"] == "streaming")
    number, start = int(one["key"].split(",")[0].removeprefix("document ")), int(one["key"].split("from ")[1].split(",")[0])
    ids = llm.tokenizer(json.loads(Path(settings.texts[0]).read_text().splitlines()[number])["text"])["input_ids"]
    written, found = one["stats"]["token_ids"], []
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=len(written))
    generation = llm.engine.add_request(
        "one", [ids[0], *ids[1 + start : start + 60]], params, forced=written, on_logits=lambda row: found.append(row.clone())
    )
    while not generation.finished:
        llm.engine.step()
    expected = torch.stack(found).log_softmax(-1)[torch.arange(len(written)), torch.tensor(written)].mean()
    assert one["scores"]["log_probability"] == pytest.approx(float(expected), abs=1e-4)


def test_a_second_run_writes_only_what_is_missing(results: dict[str, Any], settings: EvaluationSettings) -> None:
    before = samples_of(settings)
    assert run_continuation(settings, silently)["rows"] == results["rows"] and samples_of(settings) == before
    run_continuation(replace(settings, methods=("random",)), silently)
    added = samples_of(settings)[len(before) :]
    assert [one["method"] for one in added] == ["random"] * 2
    with pytest.raises(EvaluationError, match="other windows of"):
        run_continuation(replace(settings, new_tokens=12), silently)


def test_what_cannot_be_continued(settings: EvaluationSettings, tmp_path: Path) -> None:
    asked = replace(settings, out=tmp_path / "out")
    with pytest.raises(EvaluationError, match="'tasks' is generated"):
        run_continuation(replace(asked, texts=("tasks",)), silently)
    with pytest.raises(EvaluationError, match="no document of"):
        run_continuation(replace(asked, lengths=(400,), engine=asked.engine | {"max_model_len": 512}), silently)
    with pytest.raises(EvaluationError, match="number of new tokens must be at least 1"):
        replace(settings, new_tokens=0)
    with pytest.raises(EvaluationError, match="continuation needs texts"):
        replace(settings, texts=())
    with pytest.raises(EvaluationError, match="take texts"):
        replace(settings, suites=("ruler",))

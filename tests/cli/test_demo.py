"""`specontext demo` on a tiny random model: the path and the table, not the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from specontext.tasks import TASKS


def test_demo(run: Any, tiny: Path) -> None:
    words = ["demo", "--tasks", "niah_single,niah_multiquery", "--length", 400, "--problems", 2, tiny]
    ran = run(*words, "--json")
    assert ran.status == 0, ran.stderr
    rows = ran.json["rows"]
    assert [(row["task"], row["method"], row["budget"]) for row in rows] == [
        (task, method, budget)
        for task in ("niah_single", "niah_multiquery")
        for method, budget in (("full", None), ("speculative", 50), ("speculative", 25), ("streaming", 50), ("streaming", 25))
    ]
    for row in rows:
        assert row["context"] == 400 and row["problems"] == 2
        if row["method"] != "full":
            assert row["tokens_read_per_step"] == row["budget"]
            assert row["hit_rate"] < 1
        assert (row["bytes_loaded_per_step"] > 0) == (row["method"] != "full")
        assert (row["overlap"] is not None) == (row["method"] != "full")


def test_demo_prints_problems_and_a_table(run: Any, tiny: Path) -> None:
    ran = run("demo", "--tasks", "niah_single", "--length", 400, "--problems", 1, tiny)
    assert ran.status == 0, ran.stderr
    assert "Remember the facts" in ran.stdout and "characters" in ran.stdout
    for word in ("expected", "exact match", "tokens read", "bytes loaded", "overlap", "s in all"):
        assert word in ran.stdout


@pytest.mark.slow
def test_demo_scores_steps_of_programs(run: Any, tiny: Path) -> None:
    ran = run("demo", "--tasks", "program", "--length", 400, "--problems", 1, tiny, "--json")
    assert all(0 <= row["correct_steps"] <= 1 for row in ran.json["rows"])


def test_demo_shows_all_three_kinds_by_default() -> None:
    from specontext.cli.demo import DEFAULT_TASKS

    assert set(DEFAULT_TASKS) <= set(TASKS)
    assert {name.split("_")[0] for name in DEFAULT_TASKS} == {"niah", "variable", "program"}

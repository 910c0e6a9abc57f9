"""`specontext eval --suite fidelity`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMALL = ["--lengths", 160, "--limit", 2, "--max-model-len", 256, "--compare", 8, "--budgets", 40]


def test_a_table_for_each_text_and_a_command_that_can_be_repeated(run: Any, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(" the sun = 100. the moon = 200." * 20)
    ran = run(
        "eval", "nano", "--suite", "fidelity", "--text", text, "--text", "tasks", *SMALL, "--methods", "streaming", "-o", out
    )
    assert ran.status == 0, ran.stderr
    for said in ("fidelity: text.txt", "fidelity: tasks", "agreement", "streaming", "full", "100.0"):
        assert said in ran.stdout
    assert (out / "report.html").exists()
    results = json.loads((out / "results.json").read_text())
    assert {(row["task"], row["method"]) for row in results["rows"]} == {
        (task, method) for task in ("text.txt", "tasks") for method in ("full", "streaming")
    }
    before = (out / "samples.jsonl").read_bytes()
    assert run(*results["meta"]["command"].split()[1:]).status == 0
    assert (out / "samples.jsonl").read_bytes() == before


def test_budgets_as_shares_of_the_length(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ["eval", "nano", "--suite", "fidelity", "--text", "tasks", "--lengths", "128,256", "--limit", 1, "--compare", 4]
    ran = run(*asked, "--methods", "streaming", "--budgets", "1/4,1/8,64", "--max-model-len", 256, "-o", out)
    assert ran.status == 0, ran.stderr
    assert "1/8 of 128 tokens is less than the 21 of sinks" in " ".join(ran.stderr.split())
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [(row["length"], row["budget"]) for row in rows if row["budget"]] == [(128, 32), (128, 64), (256, 32), (256, 64)]
    assert all(row["tokens_read"] == row["budget"] for row in rows if row["budget"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "needs texts"),
        (("--text", "/no/such/file"), "there is no file or directory /no/such/file"),
        (("--text", "tasks:chess"), "no tasks 'chess'"),
        (("--text", "tasks", "--lengths", "300"), "the model's contexts end at 256 tokens"),
        (("--text", "tasks", "--compare", "0"), "must be at least 1, got 0"),
        (("--text", "tasks", "--budgets", "1/0"), "takes KV entries, or shares of the length"),
        (("--text", "tasks", "--budgets", "half"), "takes KV entries, or shares of the length"),
        (("--text", "tasks", "--budgets", "5/4"), "no share of the length"),
        (("--text", "tasks", "--budgets", "1/4,8"), "at least 21 (sink + recent + 1), got 8"),
    ],
)
def test_what_cannot_be_compared(fails: Callable[..., str], tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    assert says in fails(["eval", "nano", "--suite", "fidelity", *SMALL, "-o", tmp_path / "out", *options])

"""`specontext report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.made_results import made_results, write


def test_reports_are_written_again(run: Any, tmp_path: Path) -> None:
    ran = run("report", write(tmp_path, made_results()))
    assert ran.status == 0
    assert ran.stdout.split() == [str(tmp_path / "report.html"), str(tmp_path / "report.md")]
    assert "keeps 98.9" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(("method", "budget"), [("speculative", 32), ("speculative-union", 32), ("full", None)])
def test_selections_are_recorded(run: Any, tiny: Path, tmp_path: Path, method: str, budget: int | None) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("the code of the eagle is five; " * 9)
    words = [
        "report",
        tmp_path / "out",
        "--record",
        tiny,
        "--prompt-file",
        prompt,
        "--method",
        method,
        "--tokens",
        4,
        "--ignore-eos",
    ]
    ran = run(*words, *(["--budget", budget] if budget else []))
    assert ran.status == 0, ran.stderr
    assert [Path(line).name for line in ran.stdout.split()] == ["selections.json", "report.html", "report.md"]
    made = json.loads((tmp_path / "out" / "selections.json").read_text())
    assert (made["method"], made["budget"], len(made["steps"])) == (method, budget, 4)
    assert "What the heads read" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no results.json"),
        (["--prompt", "a"], "need --record MODEL"),
        (["--budget", 64], "need --record MODEL"),
        (["--record", "nano"], "one prompt: give --prompt TEXT or --prompt-file FILE"),
        (["--record", "nano", "--prompt", "a", "--prompt-file", "b"], "one prompt"),
        (["--record", "nano", "--prompt", "a", "--method", "best"], "unknown method 'best'"),
        (["--record", "nano", "--prompt-file", "missing"], "cannot read the prompt"),
    ],
)
def test_bad_usage_is_named(fails: Any, tmp_path: Path, words: list[object], message: str) -> None:
    assert message in fails(["report", tmp_path, *words])
    assert not list(tmp_path.iterdir())

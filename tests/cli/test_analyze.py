"""`specontext head analyze`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specontext.installing import install_command

SMALL = ("--length", 256, "--queries", 8, "--sequences", 1, "--calibration-sequences", 1)


def test_analyze_writes_rows_and_plots(run: Any, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "analysis"
    words = ("head", "analyze", tiny, "--target", tiny, "--text", "tasks", "-o", out, *SMALL)
    ran = run(*words, "--budgets", "32,64,999", "--lengths", "none", "--drift-tokens", 0)
    assert ran.status == 0, ran.stderr
    report = json.loads((out / "analysis.json").read_text())
    assert report["budgets"] == [32, 64] and report["length"] == 256 and str(tiny) not in json.dumps(report)
    subjects = ("recall", "hit_rate", "kl_divergence", "perplexity_ratio", "agreement", "overlap")
    plots = [*(f"{subject}_vs_budget.png" for subject in subjects), "recall_heat_map.png"]
    assert ran.stdout.splitlines()[-8:] == [str(out / name) for name in ("analysis.json", *plots)]
    assert {path.name for path in out.iterdir()} == {"analysis.json", *plots}
    assert "Budget 32 of 256 tokens" in ran.stdout and "shared oracle" in ran.stdout
    for said in ("recall at 256 tokens", "budgets of 999 left out", "drift of features left out: not asked for"):
        assert said in ran.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--length", 4096), "exceeds the model's maximum of 512 tokens"),
        (("--lengths", "256,9999"), "--lengths 9999 exceeds"),
        (("--budgets", "8"), "must exceed sink + recent"),
        (("--budgets", "a,b"), "whole numbers"),
        (("--text", "no/such/file.txt"), "no/such/file.txt"),
        (("--text", "tasks:chess"), "chess"),
        (("--compare", "/no/such/head"), "/no/such/head"),
        (("--queries", 1), "queries must be at least 2"),
        (("--device", "abacus"), "cpu"),
    ],
)
def test_what_cannot_be_analyzed(
    fails: Callable[..., str], tiny: Path, tmp_path: Path, options: tuple[object, ...], says: str
) -> None:
    message = fails(["head", "analyze", tiny, "--target", tiny, "--text", "tasks", "-o", tmp_path / "out", *SMALL, *options])
    assert says in message
    assert not list(tmp_path.iterdir())


def test_texts_that_are_too_short(fails: Callable[..., str], tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("the sun sees a red boat. " * 40)
    message = fails(["head", "analyze", tiny, "--target", tiny, "--text", text, "-o", tmp_path / "out", *SMALL])
    assert "hold no sequences of 256 tokens" in message
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_a_file_in_the_place_of_the_directory(fails: Callable[..., str], tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    message = fails(["head", "analyze", tiny, "--target", tiny, "--text", "tasks", "-o", tmp_path / "out", *SMALL])
    assert "is a file: name a directory" in message


def test_plots_need_matplotlib(fails: Callable[..., str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    words = ["head", "analyze", tiny, "--target", tiny, "--text", "tasks", "-o", tmp_path / "out", *SMALL]
    assert f"plots need matplotlib: {install_command('plots')}" in fails(words, status=1)
    assert not list(tmp_path.iterdir())

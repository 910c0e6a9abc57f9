"""`specontext eval`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMALL = ["--suite", "ruler", "--tasks", "niah_single,niah_multikey", "--lengths", 256, "--limit", 2, "--max-model-len", 512]


def test_tables_files_and_a_command_that_can_be_repeated(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["eval", "nano", *SMALL, "--methods", "full,streaming", "--budgets", "64,512", "--measure-recall", "-o", out]
    ran = run(*words)
    assert ran.status == 0, ran.stderr
    for said in ("ruler: niah_single", "ruler: niah_multikey", "ruler: mean over tasks", "streaming", "100.0"):
        assert said in ran.stdout
    files = [out / name for name in ("results.json", "report.html", "report.md")]
    assert ran.stdout.splitlines()[-3:] == [str(file) for file in files] and all(file.exists() for file in files)
    assert "a budget of 512 holds all of 256 tokens" in ran.stderr
    assert "Traceback" not in ran.stderr
    results = json.loads(files[0].read_text())
    assert len(results["rows"]) == 4
    recalls = {row["method"]: row["attention_recall"] for row in results["rows"]}
    assert recalls["full"] == pytest.approx(1) and 0 < recalls["streaming"] < 1
    command = results["meta"]["command"]
    assert "--limit 2" in command and "--measure-recall" in command and "--dtype" not in command
    before = (out / "samples.jsonl").read_bytes()
    assert run(*command.split()[1:]).status == 0
    assert (out / "samples.jsonl").read_bytes() == before
    assert json.loads(files[0].read_text())["meta"]["command"] == command


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--suite", "chess"), "unknown suite 'chess'"),
        (("--methods", "full,chess"), "unknown method 'chess'"),
        (("--budgets", "many"), "shares of the length"),
        (("--budgets", "8"), "a budget must be at least 21"),
        (("--lengths", "20000"), "the model's contexts end at 512 tokens"),
        (("--lengths", "15"), "ask for a greater length"),
        (("--tasks", "chess"), "no task 'chess'"),
        (("--limit", "0"), "a limit must be at least 1"),
        (("--data", "somewhere"), "takes no data"),
        (("--retrieval-head", "none"), "needs a retrieval head"),
        (("--methods", "speculative@/no/such/head"), "/no/such/head"),
        (("--device", "abacus"), "unknown device"),
        (("--new-tokens", "5"), "--new-tokens has no effect without the suite continuation"),
        (("--compare", "5"), "--compare has no effect without the suite fidelity"),
        (("--tasks", ","), "no task was named"),
        (("--tensor-parallel-size", "2"), "No such option"),
        (("--judge", "http://localhost:1/v1"), "--judge and --judge-model belong together"),
        (("--judge", "http://localhost:1/v1", "--judge-model", "m"), "the answers of 'ruler' are not judged"),
    ],
)
def test_what_cannot_be_evaluated(fails: Callable[..., str], tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    assert says in fails(["eval", "nano", *SMALL, "--budgets", "64", "-o", tmp_path / "out", *options])
    assert not (tmp_path / "out" / "samples.jsonl").exists()


def test_no_such_model(fails: Callable[..., str], tmp_path: Path) -> None:
    assert "no checkpoint directory" in fails(["eval", "./nowhere", *SMALL, "-o", tmp_path / "out"], status=1)

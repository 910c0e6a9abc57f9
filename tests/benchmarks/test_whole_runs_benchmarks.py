"""Benchmarks of whole runs at tiny sizes: starts in processes of their own, and tokens a second by requests and context."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import path_with

ROOT = Path(__file__).parents[2]


SMALL = ("--model", "nano", "--device", "cpu", "--dtype", "float32", "--json")


@pytest.mark.slow
def test_starts() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "starts.py"), *SMALL, "--budget", "64", "--max-model-len", "256"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | path_with(ROOT))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for kind in ("cold", "warm"):
        assert set(found[kind]) == {"import_s", "load_s", "start_s", "first_token_s"} and min(found[kind].values()) > 0


@pytest.mark.slow
def test_tokens_a_second(load_benchmark: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    script = load_benchmark("tokens_a_second")
    script.main([*SMALL, "--budget", "32", "--contexts", "24,64", "--requests", "1,2", "--output", "6"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(one["requests"], one["context"]) for one in found["cases"]] == [(1, 24), (2, 24), (1, 64), (2, 64)]
    for one in found["cases"]:
        best = {system: min(run["seconds"] for run in runs) for system, runs in one["runs"].items()}
        assert one["speculative_over_full"] == pytest.approx(best["full"] / best["speculative"])
        assert all(len(runs) == 2 for runs in one["runs"].values())

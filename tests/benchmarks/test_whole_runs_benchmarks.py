"""Benchmarks of whole runs at tiny sizes: starts in processes of their own, and tokens a second by requests and context."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import path_with

ROOT = Path(__file__).parents[2]


def report(script: str, *words: str) -> dict[str, Any]:
    """What a benchmark of nano on a CPU reports."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--model", "nano", "--device", "cpu", "--dtype", "float32"]
    environment = os.environ | path_with(ROOT)
    done = subprocess.run([*command, *words, "--json"], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_starts() -> None:
    found = report("starts.py", "--budget", "64", "--max-model-len", "256")
    for kind in ("cold", "warm"):
        assert set(found[kind]) == {"import_s", "load_s", "start_s", "first_token_s"} and min(found[kind].values()) > 0


@pytest.mark.slow
def test_tokens_a_second() -> None:
    words = ("--budget", "32", "--contexts", "24,64", "--requests", "1,2", "--output", "6")
    found = report("tokens_a_second.py", *words)
    assert [(one["requests"], one["context"]) for one in found["cases"]] == [(1, 24), (2, 24), (1, 64), (2, 64)]
    for one in found["cases"]:
        best = {system: min(run["seconds"] for run in runs) for system, runs in one["runs"].items()}
        assert one["speculative_over_full"] == pytest.approx(best["full"] / best["speculative"])
        assert all(len(runs) == 2 for runs in one["runs"].values())

"""What choosing tokens costs, at a tiny size."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType

import pytest


def test_report(load_benchmark: Callable[[str], ModuleType], capfd: pytest.CaptureFixture[str]) -> None:
    script = load_benchmark("sampling")
    script.main(["--requests", "2", "--context", "128", "--budget", "32", "--steps", "2"])
    *table, line = capfd.readouterr().out.splitlines()
    report = json.loads(line)
    assert len(table) == 1 + len(report["rows"]) and report["spread"] == 4
    assert [(row["requests"], row["sampling"]) for row in report["rows"]] == [(2, way) for way in script.WAYS]
    greedy = report["rows"][0]
    for row in report["rows"]:
        assert row["over_greedy"] == pytest.approx(row["step_s"] / greedy["step_s"]) and row["step_s"] > 0
        assert row["pytorch_over_greedy"] == pytest.approx(row["pytorch_s"] / greedy["step_s"])

"""What the kernels of a draw take: without a GPU the benchmark says where else to look, with one it reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu(load_benchmark: Callable[[str], ModuleType], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load_benchmark("token_choice").main([])
    assert ended.value.code == 2 and "see sampling.py" in capfd.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_report(load_benchmark: Callable[[str], ModuleType], capfd: pytest.CaptureFixture[str]) -> None:
    script = load_benchmark("token_choice")
    script.main(["--vocab-size", "5000", "--rows", "2", "--spreads", "4"])
    *table, line = capfd.readouterr().out.splitlines()
    rows = json.loads(line)["rows"]
    assert len(table) == 1 + len(rows) and [row["sampling"] for row in rows] == list(script.WAYS)
    assert all(set(row["kernels_us"]) == {"_survey", "_choose"} and row["draw_us"] > 0 for row in rows)


def test_table(load_benchmark: Callable[[str], ModuleType], capfd: pytest.CaptureFixture[str]) -> None:
    row = {"rows": 3, "spread": 4.0, "sampling": "top-k 50", "kernels_us": {"_survey": 10.0, "_choose": 2.5}}
    load_benchmark("token_choice").show([row | {"host_us": 200.0, "draw_us": 210.0}])
    assert capfd.readouterr().out.split()[-9:] == ["top-k", "50", "_survey", "10.0,", "_choose", "2.5", "12.5", "200.0", "210.0"]

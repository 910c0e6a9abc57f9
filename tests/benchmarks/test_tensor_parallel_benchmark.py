"""The benchmark of ranks: which parts it runs, in which order, and what its numbers are held against."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.forked import COMMANDS


@pytest.fixture
def script(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("tensor_parallel")


def row(ranks: int, kv: str, requests: int, step_ms: float, loaded: float = 0.0) -> dict[str, Any]:
    names = {"model": "m", "ranks": ranks, "kv": kv, "requests": requests, "context": 64, "large": False, "overlap": None}
    return names | {"step_ms": step_ms, "floor_ms": 1.0, "loaded_bytes": loaded, "prompt_tokens_s": 1.0}


def test_numbers_are_held_against_their_targets(script: ModuleType) -> None:
    rows = [
        row(1, "resident", 16, 8.0),
        row(2, "resident", 16, 4.0),
        row(2, "host", 16, 7.0, loaded=2 * 42e6),
        row(2, "host", 1, 3.0),
    ]
    rows += [
        row(2, "resident", 1, 2.0),
        {"model": "m", "ranks": 2, "requests": 16, "sums_ms": 0.5},
        {"part": "x", "failed": "so"},
    ]
    one, two, three = script.targets_of(rows)
    assert "2.00 x one rank, to be 1.6 or more" in one
    assert "7.00 ms, loads at 42 GB/s a rank + 3 ms are 4.00 ms" in two and "1.50 x resident" in three
    assert len(script.table_of(rows).rows) == 5


def test_parts_run_side_by_side_where_there_are_cards(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def measured(part: Any, seconds: float, cards: list[str]) -> list[dict[str, Any]]:
        begun.append((part.kind, part.ranks, list(cards)))
        return [{"part": part.name}]

    monkeypatch.setattr(script, "measured", measured)
    asked = [("resident", 1), ("host", 2), ("large", 3), ("sums", 9)]
    parts = [script.Part(kind, "m", ranks, (), "cuda", 1, 1, None, "float32") for kind, ranks in asked]
    ended = [(part.kind, rows) for part, rows in script.all_measured(parts, ["4", "5", "6"], 60)]
    assert begun[:2] == [("resident", 1, ["4"]), ("host", 2, ["5", "6"])] and set(begun[2][2]) == {"4", "5", "6"}
    assert dict(ended)["sums"][0]["failed"] == "skipped: there are 3 cards" and len(ended) == 4


@pytest.mark.slow
def test_parts_run_one_after_the_other_and_one_without_time_is_skipped(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "subprocess", COMMANDS)
    options = ["--device", "cpu", "--model", "nano", "--large", "nano", "--ranks", "1,2", "--cases", "1x128", "--budget", "64"]
    script.main([*options, "--steps", "4", "--only", "sums,resident", "--json", "--out", str(tmp_path / "rows")])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    measured = [(found.get("kv", "sums"), found["ranks"]) for found in report["rows"]]
    assert measured == [("resident", 1), ("resident", 2), ("sums", 2)]
    assert len((tmp_path / "rows").read_text().splitlines()) == 3
    script.main([*options, "--minutes", "0", "--json"])
    assert all(found["failed"] == "skipped: no time" for found in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"])

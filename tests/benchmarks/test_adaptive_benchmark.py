"""The benchmark of adaptive residency on the bundled model at tiny lengths: every layer moves, and the report is complete."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from specontext.engine.residency import Move

SMALL = ["--model", "nano", "--requests", "1", "--budget", "64", "--end-length", "800", "--points", "1", "--steps", "5"]
TOP = {
    "benchmark",
    "date",
    "machine",
    "versions",
    "command",
    "model",
    "device_memory",
    "thresholds",
    "summary",
    "points",
    "crossings",
}


@pytest.fixture
def script(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("adaptive")


def test_report(script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script.main([*SMALL, "--json", "--plot", str(tmp_path / "plot.png")])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(report) >= TOP and (tmp_path / "plot.png").stat().st_size > 10_000
    crossings, points, plan = report["crossings"], report["points"], report["thresholds"]
    assert [c["layer"] for c in crossings] == [3, 2, 1, 0] and all(c["to_host"] for c in crossings)
    for i, c in enumerate(crossings):
        # A layer leaves before its threshold, and no more than a move and two pages before it.
        assert plan[i] - 2 * script.PAGE - c["steps"] <= c["length"] <= plan[i]
        assert c["bytes"] == c["length"] * 512 and c["slowest_step"] > 0 and c["cost_against_all"] is not None
    for point in points:
        speeds = point["tokens_per_s"]
        assert speeds["adaptive"] > 0 and speeds["all"] > 0 and point["ratio"] > 0
        assert speeds["never"] is None or point["length"] <= report["last_length"]["never"]
    assert {point["offloaded"] for point in points} == {0, 1, 2, 3, 4}
    assert points[0]["tokens_per_s"]["never"] > 0 and points[-1]["tokens_per_s"]["never"] is None


def test_crossings_are_compared_with_the_steps_beside_them(script: ModuleType) -> None:
    def round_(length: int, offloaded: int, seconds: float, moves: tuple[Move, ...] = (), moving: bool = False) -> Any:
        speeds = {"adaptive": seconds, "all": 2.0}
        return script.Round(0, length, offloaded, moving or bool(moves), False, (), speeds, moves)

    move = Move(step=9, layer=3, to_host=True, bytes=100, stall_s=0.5)
    rounds = [round_(n, 0, 1.0) for n in range(5)] + [round_(5, 0, 1.5, moving=True), round_(6, 1, 1.75, (move,))]
    rounds += [round_(n, 1, 1.25) for n in range(7, 12)]
    [crossing] = script.crossings_of(rounds, 5, requests=4)
    assert crossing["length"] == 6 and crossing["steps"] == 2 and crossing["tokens_per_s"] == [4.0, 3.2]
    assert crossing["cost"] == pytest.approx(0.2) and crossing["cost_against_all"] == pytest.approx(0.2)
    assert crossing["slowest_step"] == 1.75 and crossing["extra_s"] == pytest.approx(1.25)
    before, after = script.points_of(rounds, requests=4)
    assert (before["ratio"], after["ratio"]) == (2.0, 1.6) and after["offloaded"] == 1


@pytest.mark.parametrize(
    "option", [["--steps", "4"], ["--points", "0"], ["--model", "nothing"], ["--clock", "cpu", "--device", "cuda"]]
)
def test_options_that_cannot_be_honoured(script: ModuleType, option: list[str]) -> None:
    with pytest.raises(SystemExit):
        script.parse(option)


@pytest.mark.parametrize("option", [["--start-length", "800"], ["--device-memory", "300000"]])
def test_lengths_and_memory_that_do_not_fit(script: ModuleType, option: list[str]) -> None:
    with pytest.raises(SystemExit):
        script.main([*SMALL, *option])

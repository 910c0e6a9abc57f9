"""The end-to-end benchmark at tiny sizes: every part runs on engines as users get them, and the report is complete."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

SYSTEMS = {"full", "speculative", "host"}
ON_DEVICE = {"full", "speculative"}


@pytest.fixture
def script(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("end_to_end")


@pytest.mark.slow
def test_report(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    script.main(["--device", "cpu", "--quick", "--json", "--dtype", "float32"])
    *table, line = capsys.readouterr().out.splitlines()
    report = json.loads(line)
    assert table and report["sizes"]["rounds"] == 1 and report["chunk"] == 16
    assert set(report["ttft_over_hf"]) == {"32", "64"}
    for length, ratios in report["ttft_over_hf"].items():
        assert set(ratios) == SYSTEMS
        for system, found in ratios.items():
            assert found == pytest.approx(report["ttft_s"][length][system] / report["ttft_hf_s"][length][system])
    for field, systems in (("prefill_over_hf", ON_DEVICE), ("loop_over_step", ON_DEVICE), ("mixed_over_parts", SYSTEMS)):
        assert set(report[field]) == systems and all(value > 0 for value in report[field].values())
    assert all(one["decode_only"] > 0 and one["p50"] <= one["p99"] for one in report["itl_s"].values())
    assert all(value >= 1 for value in report["worst_step_after_ready_over_median"].values())
    for kinds in report["steps_by_kind"].values():
        assert set(kinds) == {"chunks", "mixed", "1 decodes", "2 decodes"} and kinds["mixed"]["steps"] >= 2


def test_parts_are_chosen(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    script.main(["--device", "cpu", "--quick", "--json", "--dtype", "float32", "--only", "ttft,loop", "--lengths", "32"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(report["loop_over_step"]) == ON_DEVICE and set(report["ttft_over_hf"]) == {"32"}
    assert all(report[field] is None for field in script.RATIOS if field not in ("loop_over_step", "ttft_over_hf"))


@pytest.mark.parametrize(
    "option", [["--only", "nothing"], ["--lengths", "8,x"], ["--lengths", "0"], ["--rounds", "0"], ["--chunk", "-1"]]
)
def test_options_that_cannot_be_honoured(script: ModuleType, option: list[str]) -> None:
    with pytest.raises(SystemExit):
        script.parse(["--device", "cpu", *option])


def test_unknown_models(script: ModuleType) -> None:
    with pytest.raises(SystemExit, match="nothing-here"):
        script.main(["--device", "cpu", "--model", "nothing-here"])


def test_a_mixed_step_is_compared_with_what_its_parts_take(script: ModuleType) -> None:
    parts, step = sys.modules["end_to_end_parts"], sys.modules["engine_runs"].StepTime
    prompts = [[step(3.0, 8, 10), step(1.0, 8, 6)], [step(2.5, 8, 10), step(2.5, 8, 6)]]  # 4.0 and 5.0 s, two steps each
    found = parts.mixed_report(script.QUICK, [2.0, 3.0], prompts, [0.5, 0.5, 9.0])
    assert found["mixed_over_parts"] == pytest.approx(4.5 / (2.5 + 2 * 0.5))
    assert found["mixed_over_bound"] == pytest.approx(4.5 / (2.5 + 2 * 0.6))

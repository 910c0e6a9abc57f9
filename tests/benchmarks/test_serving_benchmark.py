"""The serving benchmark at a tiny size: everything it reports is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType

import pytest

from tests import forked


@pytest.fixture
def script(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("serving")


@pytest.mark.slow
def test_report(script: ModuleType, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "subprocess", forked.COMMANDS)
    sizes = ["--num-prompts", "4", "--input-len", "8", "--output-len", "6", "--concurrency", "4"]
    script.main([*sizes, "--rounds", "1", "--engine", "--budget 64 --device cpu --max-model-len 256"])
    *table, line = capfd.readouterr().out.splitlines()
    report = json.loads(line)
    assert table and report["workload"] == {"num_prompts": 4, "input_len": 8, "output_len": 6, "concurrency": 4}
    [found] = report["rounds"]
    assert set(report["targets"]) <= set(found) and report["median"] == found
    assert found["overhead_whole"] == pytest.approx(found["offline"] / found["whole"] - 1)
    assert found["concurrency_gain"] == pytest.approx(found["whole"] / found["one"])
    assert all(found[name] > 0 for name in ("ready_s", "streamed", "offline_cpu_ms_a_token", "streamed_cpu_ms_a_token"))


def test_medians(script: ModuleType) -> None:
    assert script.medians([{"a": 1.0, "b": 5.0}, {"a": 3.0, "b": 6.0}, {"a": 2.0, "b": 9.0}]) == {"a": 2.0, "b": 6.0}


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "subprocess", forked.COMMANDS)
    with (
        pytest.raises(SystemExit, match=r"(?s)`specontext serve nano --budget 0` did not start: .*budget"),
        script.server(["nano", "--budget", "0"]),
    ):
        pass

"""The benchmark of kernels at tiny sizes: every operation passes its check and has a complete line; a wrong one ends the run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from specontext.kernels.dispatch import VARIABLE
from specontext.layer_sizes import LatentSizes
from specontext.model_shape import ModelShape
from specontext.retrieval.selector import Budget

FIELDS = {
    "name",
    "shape",
    "us",
    "bytes",
    "gb_s",
    "tflop_s",
    "floor_us",
    "floor_ratio",
    "share_of_floor",
    "error",
    "timed",
    "note",
}
TOP = {"benchmark", "date", "machine", "versions", "model", "bandwidth_gb_s", "copy_gb_s", "h2d_gb_s", "operations", "failed"}


@pytest.fixture
def script(load_benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """benchmarks/kernels.py, with machine speeds that take no time to measure."""
    monkeypatch.setenv(VARIABLE, "torch")
    module = load_benchmark("kernels")
    for name in ("read_bandwidth", "copy_bandwidth"):
        monkeypatch.setattr(module, name, lambda device: 1e10)
    monkeypatch.setattr(module, "multiply_rate", lambda dtype, device: 1e11)
    yield module


def tiny(module: ModuleType, **changes: Any) -> Any:
    shape = ModelShape(
        layers=3, hidden_size=32, query_heads=4, kv_heads=2, head_dim=16, vocab_size=50, max_position=256, dtype=torch.float32
    )
    settings: dict[str, Any] = {
        "shape": shape,
        "context": 150,
        "budget": Budget(44, 4, 16),
        "slots": 50,
        "requests": 2,
        "overlap": 0.75,
        "chunk": 8,
        "device": torch.device("cpu"),
        "long_rows": (2, 300, 20),
        "rotated_bytes": 1,
    }
    return module.Case(**settings | changes)


INT8, FP8 = (ModelShape(3, 32, 4, 2, 16, 50, 256, torch.float32, kv_dtype=codes) for codes in (torch.int8, torch.float8_e4m3fn))
LATENTS = ModelShape(3, 48, 4, 1, 24, 100, 4096, torch.float32, latent=LatentSizes(16, 8, key=20, value=12))


@pytest.mark.parametrize(
    "head",
    [{}, {"bands": 3, "key_heads": 1, "key_dim": 24, "query_rank": 8}, {"shape": LATENTS}, {"shape": INT8}, {"shape": FP8}],
    ids=["own", "wide", "latents", "int8", "fp8"],
)
def test_report(
    head: dict[str, Any], script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "case_of", lambda arguments, device: tiny(script, **head))
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--quick", "--json"])
    script.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(report) >= TOP and report["failed"] == {}
    names = {line["name"] for line in report["operations"]}
    assert len(names) == len(report["operations"]) >= len(script.OPERATIONS)
    for line in report["operations"]:
        assert set(line) >= FIELDS
        assert line["timed"] == "host" and line["us"] > 0 and line["error"] < 1e-4
        assert line["floor_us"] * line["floor_ratio"] == pytest.approx(line["us"])
        assert (line["bytes"] is None) == (line["name"] == "prefill_attention")


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
def test_selections_repeat_and_miss_what_is_new(script: ModuleType, overlap: float) -> None:
    case = tiny(script, overlap=overlap, context=1000)
    kept = round(case.budget.scored * overlap)
    steady = case.plans[len(case.selections) :]
    for before, tokens, (_, missing) in zip([case.selections[-1], *case.selections[:-1]], case.selections, steady, strict=True):
        for a, b in zip(before.flatten(0, 1).tolist(), tokens.flatten(0, 1).tolist(), strict=True):
            assert len(set(a) & set(b)) == kept and len(set(b)) == case.budget.scored
        assert (missing.sum(-1) == case.budget.scored - kept).all()


def test_wrong_results_end_the_run(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def first(scores: Tensor, k: int) -> Tensor:
        return torch.arange(k).expand(*scores.shape[:-1], k)

    monkeypatch.setattr("kernel_choice.top_k_positions", first)
    with pytest.raises(script.WrongResult, match="top_k"):
        script.measure(tiny(script), ["top_k", "scores"], rounds=1)
    report = script.measure(tiny(script), ["top_k", "scores"], rounds=1, keep_going=True)
    assert "top_k" in report["failed"] and [line["name"] for line in report["operations"]] == ["retrieval_scores"]


@pytest.mark.parametrize("option", [["--only", "nothing"], ["--rounds", "2"], ["--budget", "20"], ["--overlap", "2"]])
def test_options_that_cannot_be_honoured(script: ModuleType, option: list[str]) -> None:
    with pytest.raises(SystemExit):
        script.parse(option)

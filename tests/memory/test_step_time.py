"""Expected step times against those that GPUs took, their order, and the choice of the most tokens a second."""

from __future__ import annotations

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from specontext.memory.facts import NO_HEAD
from specontext.memory.model import RunSettings, measured_model
from specontext.memory.planner import GIB, MemoryPlan
from specontext.memory.presets import find_preset
from specontext.memory.probe import kept_speeds, machine_speed, probe, read_speed, why_kv_stays, write_speed
from specontext.memory.sharing import Share
from specontext.memory.speed import Bandwidths, decode_floor
from specontext.memory.step_time import CPU, H100, H200, MachineSpeed, StepClock, known_machine
from specontext.memory.throughput import ServiceLimits, choose, operation, throughput_curve

LLAMA = find_preset("llama-3.1-8b")
assert LLAMA is not None
FACTS = LLAMA.facts()


def clock(machine: MachineSpeed = H100, budget: int | None = 2048, overlap: float = 0.85) -> StepClock:
    return StepClock(FACTS, machine, budget, overlap)


@pytest.mark.parametrize(
    ("machine", "requests", "length", "offloaded", "milliseconds"),
    [
        (H200, 1, 32768, 0, 5.35),  # 5.2 to 5.5
        (H200, 4, 32768, 0, 6.2),
        (H200, 4, 32768, 32, 6.9),
        (H200, 32, 18432, 0, 8.9),
        (H200, 32, 18432, 14, 14.3),
        (H200, 22, 18432, 0, 7.77),
        (H200, 36, 18432, 0, 9.27),
        (H200, 31, 2048, 0, 8.26),
        (H200, 31, 23893, 0, 8.85),
        (H200, 62, 10240, 0, 11.06),
        (H200, 22, 33000, 0, 8.24),
        (H200, 52, 16384, 0, 10.38),
        (H200, 48, 15000, 0, 9.87),
        (H200, 48, 15000, 1, 11.2),
        (H200, 48, 15000, 4, 11.3),
        (H100, 1, 32768, 0, 6.79),
        (H100, 1, 32768, 32, 6.96),
        (H100, 4, 32768, 0, 7.84),
        (H100, 32, 10240, 0, 1000 * 32 / 2852),
        (H100, 24, 18432, 0, 1000 * 24 / 2376),
    ],
)
def test_steps_that_were_measured(machine: MachineSpeed, requests: int, length: int, offloaded: int, milliseconds: float) -> None:
    expected = clock(machine).decode([length] * requests, offloaded)
    assert 1000 * expected.seconds == pytest.approx(milliseconds, rel=0.1)


@pytest.mark.parametrize(("requests", "length", "tokens_per_s"), [(32, 10240, 1407), (16, 18432, 778), (8, 33792, 402)])
def test_full_attention_that_was_measured(requests: int, length: int, tokens_per_s: float) -> None:
    assert clock(budget=None).tokens_per_s([length] * requests, 0) == pytest.approx(tokens_per_s, rel=0.1)


@pytest.mark.parametrize(
    ("ranks", "requests", "length", "milliseconds"),
    [(2, 16, 8192, 5.26), (2, 1, 32768, 3.75), (4, 16, 8192, 4.25), (4, 1, 32768, 2.92)],
)
def test_steps_of_ranks_that_were_measured(ranks: int, requests: int, length: int, milliseconds: float) -> None:
    """benchmarks/results/h200/tensor-parallel.txt; without what ranks tell each other up to 27 % are missing."""
    part = Share(0, ranks).facts(FACTS)
    expected = StepClock(part, H200, 2048, ranks=ranks).decode([length] * requests, 0).seconds
    assert 1000 * expected == pytest.approx(milliseconds, rel=0.13)
    assert expected > StepClock(part, H200, 2048).decode([length] * requests, 0).seconds


def test_what_makes_a_step_longer() -> None:
    base = clock().decode([16384] * 4, 0).seconds
    assert clock().decode([16384] * 5, 0).seconds > base
    assert clock().decode([32768] * 4, 0).seconds > base
    assert clock().decode([16384] * 4, 8).seconds > base
    assert clock(budget=4096).decode([16384] * 4, 0).seconds > base
    assert clock(replace(H100, device=2e12)).decode([16384] * 4, 0).seconds > base
    assert clock().decode([500, 1500], 32).seconds == clock(overlap=0.0).decode([500, 1500], 32).seconds, "nothing is left out"
    waits = clock(replace(H100, host=1e9)).decode([16384] * 4, 8)
    assert waits.loads_limit and waits.seconds == waits.loads_s > 5 * base
    assert clock(overlap=1.0).decode([16384] * 4, 8).loads_s == 0.0


@pytest.mark.parametrize("name", ["gemma-3-12b", "granite-4.0-h-small", "qwen3-next-80b-a3b", "llama-3.1-8b"])
@pytest.mark.parametrize("offloaded", [0, 2])
def test_a_step_is_expected_to_take_longer_than_its_floor(name: str, offloaded: int) -> None:
    """Windows and states are read for every request, and all layers are launched, those whose KV does not grow among them."""
    preset = find_preset(name)
    assert preset is not None
    facts = preset.facts()
    expected, speed = StepClock(facts, H100, 512), Bandwidths(H100.device, H100.host)
    for requests in (1, 32, 256):
        rest: dict[str, Any] = {"requests": requests, "offloaded": offloaded, "budget": 512, "overlap": 0.85}
        floor = decode_floor(facts, speed, length=4096, **rest).seconds + facts.shape.depth * H100.layer_s
        assert expected.decode([4096] * requests, offloaded).seconds > floor


def test_every_token_comes_from_the_host_where_all_are_read() -> None:
    facts = replace(FACTS, head=NO_HEAD)
    full = StepClock(facts, H100, None).decode([32768], 32)
    assert full.loads_s > 32768 * 32 * FACTS.shape.kv_heads * FACTS.shape.row_bytes / H100.host


def test_a_single_layer_of_a_block_takes_as_long_to_load_as_the_block() -> None:
    bus = {away: clock(H200).decode([16384] * 48, away).bus_s for away in (4, 5, 8)}
    assert bus[5] == bus[8] == pytest.approx(2 * bus[4])


@pytest.mark.parametrize("length, seconds", [(2048, 0.0526), (8192, 0.2287), (16384, 0.5215), (32768, 1.277), (130048, 10.81)])
def test_prompts_that_were_measured(length: int, seconds: float) -> None:
    assert clock(H200, budget=None).prefill_s(length, 8192) == pytest.approx(seconds, rel=0.1)


def test_prompts_take_their_products() -> None:
    step = clock()
    assert step.chunk_s(1024) < step.chunk_s(1024, 65536), "attention to what is stored"
    whole = sum(step.chunk_s(1024, start) for start in range(0, 32768, 1024))
    assert whole == pytest.approx(step.chunk_s(32768))
    assert step.prefill_s(32768, 1024) > whole
    assert step.prefill_s(100, 1024) >= step.weights / H100.device, "weights are read once at least"


# Choosing -------------------------------------------------------------------------------------------------------------


def plan_of(requests: int, gpu_memory: int = 80 * GIB, length: int = 32768) -> MemoryPlan:
    run = RunSettings(requests, length, 2048, 2048)
    return MemoryPlan(FACTS, measured_model(FACTS, run), requests, gpu_memory, 100 * GIB, length)


def test_more_requests_are_not_always_faster() -> None:
    curve = throughput_curve(plan_of, clock(), 18432, range(1, 65))
    chosen = choose(curve, ServiceLimits(64))
    assert chosen is not None and chosen.tokens_per_s == max(one.tokens_per_s for one in curve)
    assert 1 < chosen.requests < len(curve) and curve[-1].tokens_per_s < 0.8 * chosen.tokens_per_s
    assert [one.requests for one in curve] == list(range(1, len(curve) + 1))
    assert all(one.offloaded_layers <= later.offloaded_layers for one, later in pairwise(curve))
    for one in curve:
        assert one.tokens_per_s == pytest.approx(one.requests / one.step_s)
        assert plan_of(one.requests).reach[one.offloaded_layers] >= 18432


def test_limits() -> None:
    curve = throughput_curve(plan_of, clock(), 32768, range(1, 65))
    free = choose(curve, ServiceLimits(64))
    assert free is not None
    fewer = choose(curve, ServiceLimits(4))
    assert fewer is not None and fewer.requests == 4
    more = choose(curve, ServiceLimits(64, min_num_seqs=30))
    assert more is not None and more.requests >= 30 > free.requests and more.tokens_per_s < free.tokens_per_s
    most = choose(curve, ServiceLimits(64, min_num_seqs=60))
    assert most is not None and most.requests == len(curve) < 60
    quick = choose(curve, ServiceLimits(64, max_tpot_ms=8.0))
    assert quick is not None and quick.step_s <= 0.008 and curve[quick.requests].step_s > 0.008
    impossible = choose(curve, ServiceLimits(64, max_tpot_ms=0.1))
    assert impossible is not None and impossible.requests == 1
    assert choose([], ServiceLimits(64)) is None


def test_what_does_not_fit_has_no_operation() -> None:
    assert operation(plan_of(4, gpu_memory=15 * GIB), clock(), 32768) is None
    assert throughput_curve(lambda n: plan_of(n, 15 * GIB), clock(), 32768, range(1, 9)) == []


# Machines -------------------------------------------------------------------------------------------------------------


def test_machines_by_name() -> None:
    assert known_machine("NVIDIA H200") is H200 and known_machine("NVIDIA H100 80GB HBM3") is H100
    assert known_machine("NVIDIA A100-SXM4-80GB") is H100
    assert machine_speed(torch.device("cpu")) is CPU


def test_a_measurement_is_kept_and_a_broken_one_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECONTEXT_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA H200")
    calls: list[torch.device] = []

    def measure(device: torch.device) -> MachineSpeed:
        calls.append(device)
        return replace(H200, device=4e12, pinned=1 << 28)

    monkeypatch.setattr("specontext.memory.probe.probe", measure)
    device = torch.device("cuda")
    assert machine_speed(device) == machine_speed(device) == replace(H200, device=4e12, pinned=1 << 28)
    assert len(calls) == 1 and kept_speeds() == [machine_speed(device)]
    [file] = (tmp_path / "machines").glob("*.json")
    for text in ("{", "[]", json.dumps(json.loads(file.read_text()) | {"version": 0}), json.dumps({"version": 1})):
        file.write_text(text)
        assert read_speed(file) is None and kept_speeds() == []
    machine_speed(device)
    assert len(calls) == 2 and len(kept_speeds()) == 1


def test_files_of_other_machines_and_gpus_are_not_taken_for_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Homes are shared, machines are called alike, and files are copied."""
    monkeypatch.setattr("platform.node", lambda: "gpu")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr("specontext.memory.probe.probe", lambda _: H200)
    write_speed(tmp_path / "gpu-2-NVIDIA-H200.json", replace(H200, device=1e12))
    write_speed(tmp_path / "gpu-NVIDIA-H200.json", replace(H100, device=2e12))
    assert kept_speeds(tmp_path) == []
    assert machine_speed(torch.device("cuda"), tmp_path) == H200 and kept_speeds(tmp_path) == [H200]
    assert kept_speeds(tmp_path / "nowhere") == []


def test_of_engines_that_start_together_one_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside each other they would measure each other: who comes second waits, and takes what was measured."""
    waits = threading.Event()

    class Watched(FileLock):
        def acquire(self, *arguments: Any, **options: Any) -> Any:
            waits.set()
            return super().acquire(*arguments, **options)

    def measure(_: torch.device) -> MachineSpeed:
        raise AssertionError("another engine measures")

    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr("platform.node", lambda: "gpu")
    monkeypatch.setattr("specontext.memory.probe.probe", measure)
    file = tmp_path / "gpu-NVIDIA-H200.json"
    with ThreadPoolExecutor(1) as threads:
        with FileLock(file.with_suffix(".lock")):
            monkeypatch.setattr("filelock.FileLock", Watched)
            second = threads.submit(machine_speed, torch.device("cuda"), tmp_path)
            assert waits.wait(30)
            write_speed(file, replace(H200, device=5e12))
        assert second.result().device == 5e12


@pytest.mark.parametrize(
    "entries",
    [
        {"device": math.nan},
        {"host": math.inf},
        {"products": -1.0},
        {"layer_s": "5e-05"},
        {"step_s": -1.0},
        {"pinned": "all"},
        {"piece": 0.5},
        {"name": 7},
        {"device": [3e12]},
    ],
)
def test_numbers_of_no_machine_are_measured_again(entries: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    write_speed(file, H100)
    assert read_speed(file) == H100
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    assert read_speed(file) is None


def test_a_speed_that_cannot_be_kept_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("specontext.memory.probe.json.dump", full)
    with pytest.raises(OSError, match="no space"):
        write_speed(tmp_path / "machine.json", H100)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECONTEXT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA H100")
    monkeypatch.setattr("specontext.memory.probe.probe", lambda _: H100)
    assert machine_speed(torch.device("cuda")) == H100
    with pytest.raises(OSError):
        write_speed(tmp_path / "file" / "machine.json", H100)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"pinned": 1 << 28}, None),
        ({"pinned": 1 << 20}, "1 MiB"),
        ({"pinned": 0}, "memlock"),
        ({"host": 1e9}, "1.00 GB/s"),
    ],
)
def test_why_kv_stays_on_the_device(changes: dict[str, float], says: str | None) -> None:
    found = why_kv_stays(replace(H100, **changes))  # type: ignore[arg-type]
    assert found is None if says is None else found is not None and says in found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU")
def test_a_gpu_is_measured() -> None:
    found = probe(torch.device("cuda"))
    assert found.device > 1e11 and found.host > 1e8 and found.products > 1e12 and found.pinned

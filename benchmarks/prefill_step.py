"""Where the time of one chunk of a prompt goes: seconds, launches, and what the device computes in it.

Usage: python benchmarks/prefill_step.py [--model llama-3.1-8b] [--chunk 8192] [--stored 0,24576] [--systems full,host] [--top 20]

Engines are those of `end_to_end.py`. A prompt is computed up to --stored tokens; what is measured is the step of the chunk behind
them: its seconds, several times on fresh prompts, and one of them under PyTorch's profiler. On a GPU `launches` are kernels and
copies on the device, and `device_s` the time in which at least one of them ran; on a CPU they are operations.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import specontext  # noqa: F401  # isort: skip  # before torch: it says how torch's threads wait
import torch
from engine_runs import SYSTEMS, Driver, Setup, load
from measure import clock, machine, versions
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from specontext.config import EngineConfig
from specontext.engine.generation import Generation
from specontext.errors import SpeContextError
from specontext.evaluation.paper.shapes import DTYPES


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    try:
        loaded, dummy = load(options.model, options.dtype, device)
    except SpeContextError as error:
        raise SystemExit(str(error)) from error
    setup = Setup(loaded, dummy, options.budget, options.chunk, options.chunk, torch.Generator().manual_seed(0))
    found = {system: of_system(setup, system, options) for system in options.systems}
    about = {"benchmark": "prefill_step", "machine": machine(device), "versions": versions(), "model": options.model}
    print(json.dumps(about | {"dtype": options.dtype, "chunk": options.chunk, "by_system_and_stored": found}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default=None)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--chunk", type=int, help="default: the engine's")
    parser.add_argument("--stored", default=None, help="tokens before the chunk, several with commas between them")
    parser.add_argument("--systems", default="full", help=f"of {', '.join(SYSTEMS)}, with commas between them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--top", type=int, default=20, help="kernels in the table")
    options = parser.parse_args()
    gpu = options.device == "cuda"
    options.model = options.model or ("llama-3.1-8b" if gpu else "nano")
    options.chunk = options.chunk or EngineConfig(options.model).step_tokens(options.device).alone
    options.stored = [int(number) for number in (options.stored or ("0,24576" if gpu else "0,64")).split(",")]
    options.systems = options.systems.split(",")
    if unknown := [system for system in options.systems if system not in SYSTEMS]:
        parser.error(f"unknown system '{unknown[0]}': choose among {', '.join(SYSTEMS)}")
    return options


def of_system(setup: Setup, system: str, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    longest = max(options.stored) + setup.chunk + 1
    with setup.engine(system, seats=1, longest=longest) as driver:
        driver.engine.warm_up()
        return {str(stored): of_chunk(setup, driver, system, stored, options) for stored in options.stored}


def of_chunk(setup: Setup, driver: Driver, system: str, stored: int, options: argparse.Namespace) -> dict[str, Any]:
    def before() -> list[Generation]:
        """A prompt that has come to its last chunk."""
        added = driver.add([setup.prompt(stored + setup.chunk)], 1)
        while added[0].request.computed < stored:
            driver.step(wait=True)
        return added

    seconds = []
    for _ in range(options.rounds + 1):
        before()
        began = clock(driver.device)
        driver.step()
        seconds.append(clock(driver.device) - began)
    before()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (driver.device.type == "cuda")
    with profile(activities=activities) as watched:
        driver.step(wait=True)
    events = [event for event in watched.events() or () if of_device(event, driver.device)]
    layers = setup.loaded.shape.layers
    report = {
        "seconds": statistics.median(seconds[1:]),
        "samples_s": seconds[1:],
        "device_s": busy_seconds(events),
        "launches": len(events),
        "launches_per_layer": len(events) / layers,
    }
    print(f"{system}, {setup.chunk} tokens behind {stored}: " + ", ".join(f"{k} {v}" for k, v in report.items()), flush=True)
    key = "self_device_time_total" if driver.device.type == "cuda" else "self_cpu_time_total"
    print(watched.key_averages().table(sort_by=key, row_limit=options.top, max_name_column_width=70), flush=True)
    return report


def of_device(event: FunctionEvent, device: torch.device) -> bool:
    """Whether an event is something that the device did."""
    on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
    return on_gpu if device.type == "cuda" else event.cpu_parent is None


def busy_seconds(events: list[FunctionEvent]) -> float:
    """Seconds in which at least one of some events ran, however many streams they are on."""
    busy, until = 0.0, float("-inf")
    for start, end in sorted((event.time_range.start, event.time_range.end) for event in events):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / 1e6


if __name__ == "__main__":
    main()

"""Tokens a second of whole runs, prompts and outputs, of our speculative over our full attention, by requests and context.

    python benchmarks/tokens_a_second.py [--device cpu] [--model qwen3-0.6b] [--contexts 2048,8192] [--requests 1,8] [--json]

Engines are those that `LLM` starts, one of each method for all sizes, and a case is a batch of random prompts that come at once,
each with the same number of output tokens. The engines take turns (full, speculative, speculative, full), so that what drifts
meets both alike; of each case the faster of a method's two runs counts, and both are kept. Where a batch does not fit the device,
layers leave it or requests wait, as the plan has it. Heads with random weights choose other tokens at every step, which no
trained head does, so with layers on the host loads are more than they would be: such cases are marked.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from datetime import date
from typing import Any

import specontext  # noqa: F401  # isort: skip  # before torch: it says how torch's threads wait
import torch
from engine_runs import Driver, Setup, StepTime, load
from measure import clock, machine, versions

from specontext.memory.presets import PRESETS

TURNS = ("full", "speculative", "speculative", "full")
STEPS = 32  # of a kind, that a median is of at least
Case = tuple[int, int]  # requests, context
Run = dict[str, Any]


def main(words: Sequence[str] | None = None) -> None:
    options = parse(words)
    device = torch.device(options.device)
    loaded, dummy = load(options.model, options.dtype, device)
    setup = Setup(loaded, dummy, options.budget, None, None, torch.Generator().manual_seed(0))
    cases = [(requests, context) for context in options.contexts for requests in options.requests]
    runs: dict[Case, dict[str, list[Run]]] = {case: {"full": [], "speculative": []} for case in cases}
    began = time.perf_counter()
    for turn, system in enumerate(TURNS):
        if turn == 2 and time.perf_counter() - began > options.seconds:
            break
        longest = max(options.contexts) + options.output + 1
        with setup.engine(system, seats=max(options.requests), longest=longest, spill=True) as driver:
            driver.engine.warm_up()
            driver.run(driver.add([setup.prompt(min(options.contexts))], options.output))
            for case in cases:
                if turn < 2 or runs[case][system][0]["seconds"] < options.again:
                    runs[case][system].append(run(setup, driver, *case, options.output))
    rows = [row(case, found) for case, found in runs.items()]
    show(options, rows)
    if options.json:
        names = ("model", "dtype", "device", "budget", "output")
        about = {
            "benchmark": "tokens_a_second",
            "date": date.today().isoformat(),
            "machine": machine(device),
            "versions": versions(),
        }
        print(json.dumps(about | {name: getattr(options, name) for name in names} | {"cases": rows}), flush=True)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="llama-3.1-8b", help=f"{', '.join(sorted(PRESETS))}, or a checkpoint")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--contexts", type=numbers, default=(2048, 8192, 32768), help="tokens of a prompt, with commas")
    parser.add_argument("--requests", type=numbers, default=(1, 8, 32), help="requests at once, with commas")
    parser.add_argument("--output", type=int, default=256, help="tokens that each request generates")
    parser.add_argument("--again", type=float, default=30.0, help="cases that take more seconds run once a method")
    parser.add_argument("--seconds", type=float, default=1e9, help="no second turn of the methods begins after so many")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def run(setup: Setup, driver: Driver, requests: int, context: int, output: int) -> Run:
    """One batch from its arrival to its last token: seconds in all, the median of steps in which all requests decode and nothing
    else happens (None where there are few: the first requests may end before the last prompt is computed), layers that were
    on the host at the end, and where the seconds went."""
    prompts = [setup.prompt(context) for _ in range(requests)]
    began = clock(setup.device)
    added = driver.add(prompts, output)
    steps = driver.run(added)
    seconds = clock(setup.device) - began
    alone = [step.seconds for step in steps if step.decodes == requests and not step.prompt_tokens]
    step = statistics.median(alone) if len(alone) >= min(STEPS, output - 1) else None
    away = len(driver.engine.parts.kv.offloaded)
    return {"seconds": seconds, "step_s": step, "offloaded_layers": away, "kinds": kinds_of(steps)}


def kinds_of(steps: Sequence[StepTime]) -> dict[str, dict[str, float]]:
    """Of steps that compute prompts, decode, or both: how many, the seconds of all, their median and the longest."""
    taken: dict[str, list[float]] = {"prompts": [], "mixed": [], "decode": []}
    for step in steps:
        taken["decode" if not step.prompt_tokens else "mixed" if step.decodes else "prompts"].append(step.seconds)
    return {
        kind: {"steps": len(one), "seconds": sum(one), "median_s": statistics.median(one), "longest_s": max(one)}
        for kind, one in taken.items()
        if one
    }


def row(case: Case, found: dict[str, list[Run]]) -> dict[str, Any]:
    best = {system: min(one["seconds"] for one in runs) for system, runs in found.items()}
    step = {system: min((one["step_s"] for one in runs if one["step_s"]), default=None) for system, runs in found.items()}
    return {
        "requests": case[0],
        "context": case[1],
        "speculative_over_full": best["full"] / best["speculative"],
        "step_full_over_speculative": step["full"] / step["speculative"] if step["full"] and step["speculative"] else None,
        "runs": found,
    }


def show(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    print(f"{options.model}, budget {options.budget}, {options.output} tokens of output; tokens/s count prompts' time")
    print("| context | requests | full, tokens/s | speculative | ratio | a decode step, full / speculative |")
    print("|---|---|---|---|---|---|")
    for one in rows:
        tokens = one["requests"] * options.output
        speeds = [tokens / min(run["seconds"] for run in one["runs"][system]) for system in ("full", "speculative")]
        marks = ["*" if any(run["offloaded_layers"] for run in one["runs"][system]) else "" for system in ("full", "speculative")]
        cells = [f"{speed:,.1f}{mark}" for speed, mark in zip(speeds, marks, strict=True)]
        step = one["step_full_over_speculative"]
        ratios = f"{one['speculative_over_full']:.3f} | {'-' if step is None else f'{step:.3f}'}"
        print(f"| {one['context']:,} | {one['requests']} | {cells[0]} | {cells[1]} | {ratios} |")
    if any(run["offloaded_layers"] for one in rows for runs in one["runs"].values() for run in runs):
        print("* layers were on the host")


if __name__ == "__main__":
    main()

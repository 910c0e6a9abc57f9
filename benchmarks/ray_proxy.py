"""What Ray Serve costs between a client and one replica: `specontext deploy` against `specontext serve`, both streaming.

    python benchmarks/ray_proxy.py                                  # nano; wants specontext[ray] and a quiet machine
    python benchmarks/ray_proxy.py --rounds 1 --num-prompts 16
    python benchmarks/ray_proxy.py --model DIR --load-format dummy --device cuda --concurrency 16 --output-len 256

Both stand side by side for the whole time; each round loads one and then the other, first one stream at a time and then many,
and the next round begins with the other one. Prompts are random and none is sent twice. A table of medians with 95 % intervals
over the rounds (bootstrap), then one line of JSON. Beside times stands the processor time for each chunk, by process: on a
machine whose cores the engine does not need that is all there is to lose, and on a small one it is taken from the engine. Linux
only.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from specontext.evaluation.traffic.http import Address
from specontext.evaluation.traffic.measure import Target, measure
from specontext.evaluation.traffic.report import summarise
from specontext.evaluation.traffic.workload import Workload
from specontext.models.tokenizer_files import load_tokenizer

COMMAND = [sys.executable, "-m", "specontext.cli"]
ROLES = {"replica": "ServeReplica:specontext:Replica", "ingress": "ServeReplica:specontext:Ingress", "proxy": "ProxyActor"}
TICKS = os.sysconf("SC_CLK_TCK")
RESAMPLES = 2000


@dataclass(frozen=True)
class Side:
    """One of the two ways to serve."""

    name: str
    url: str
    pid: int

    def seconds(self) -> Counter[str]:
        """Processor time so far, by the role of processes."""
        found: Counter[str] = Counter()
        for pid in family(self.pid):
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            except OSError:  # it has ended
                continue
            role = next((role for role, mark in ROLES.items() if mark in words), "rest")
            found[role if self.name == "ray" else "server"] += (int(fields[11]) + int(fields[12])) / TICKS
        return found


def family(pid: int) -> list[int]:
    """A process and all that came from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(entry.parent.name))
    found, seen = [pid], 0
    while seen < len(found):
        found += children.get(found[seen], [])
        seen += 1
    return found


def main(words: Sequence[str] | None = None) -> None:
    options, engine = parse(words)
    tokenizer = load_tokenizer(options.model)
    with started("serve", options, engine) as serve, started("ray", options, engine) as ray:
        warm = [load(side, options, tokenizer, seed, options.concurrency) for seed, side in enumerate((serve, ray))]
        print(f"warm: {[round(one['output_throughput']) for one in warm]} tokens/s", file=sys.stderr, flush=True)
        rounds = []
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
            rounds.append(one_round(number, serve, ray, options, tokenizer))
    report = {"benchmark": "ray_proxy", "model": options.model, "engine": engine, "machine": machine(), "versions": versions()}
    report |= {"workload": {name: getattr(options, name) for name in ("num_prompts", "input_len", "output_len", "concurrency")}}
    report |= {"medians": {name: interval([one[name] for one in rounds]) for name in rounds[0]}, "rounds": rounds}
    show(report["medians"])
    print(json.dumps(report), flush=True)


def parse(words: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the others, which are the engine's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--num-prompts", type=int, default=32, help="of the loads of many streams")
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=16)
    return parser.parse_known_args(words)


def one_round(number: int, serve: Side, ray: Side, options: argparse.Namespace, tokenizer: Any) -> dict[str, float]:
    """Both sides once, with one stream at a time and with many."""
    found: dict[str, float] = {"load_average": os.getloadavg()[0]}
    for streams in (1, options.concurrency):
        for side in (serve, ray) if number % 2 else (ray, serve):
            before, began = side.seconds(), time.perf_counter()
            run = load(side, options, tokenizer, 2 * (number + 1) + (side is ray), streams)
            spent, elapsed = side.seconds() - before, time.perf_counter() - began
            name = f"{side.name}_{streams}"
            found[f"{name}_tokens_s"] = run["output_throughput"]
            found[f"{name}_ttft_ms"], found[f"{name}_itl_ms"] = run["median_ttft_ms"], run["median_itl_ms"]
            for role in (*ROLES, "rest") if side is ray else ("server",):  # some spend less than a tick
                found[f"{name}_cpu_ms_a_chunk_{role}"] = 1000 * spent[role] / run["total_output_tokens"]
            found[f"{name}_cpu_ms_a_chunk"] = 1000 * spent.total() / run["total_output_tokens"]
            found[f"{name}_cores"] = spent.total() / elapsed
        pair = [found[f"{name}_{streams}_tokens_s"] for name in ("serve", "ray")]
        found[f"overhead_{streams}"] = pair[0] / pair[1] - 1
    began, idle = time.perf_counter(), ray.seconds()
    time.sleep(2.0)
    found["ray_idle_cores"] = (ray.seconds() - idle).total() / (time.perf_counter() - began)
    return found


def load(side: Side, options: argparse.Namespace, tokenizer: Any, seed: int, streams: int) -> dict[str, Any]:
    prompts = options.num_prompts if streams > 1 else max(1, options.num_prompts // 8)
    work = Workload(prompts, options.input_len, options.output_len, max_concurrency=streams, seed=100 * seed + streams)
    texts = work.prompts(tokenizer)
    run = asyncio.run(measure(Target(Address.parse(side.url), options.model), work, texts))
    if errors := [record.error for record in run.records if record.error]:
        raise SystemExit(f"{len(errors)} requests to {side.name} failed: {errors[0]}")
    return summarise(run)


@contextmanager
def started(name: str, options: argparse.Namespace, engine: Sequence[str]) -> Iterator[Side]:
    """One side, ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [options.model, "--port", port, "--disable-log-requests", "--log-interval", "0", *engine]
    words += ["--max-num-seqs", str(options.concurrency)]
    verb = ["serve"] if name == "serve" else ["deploy", "--address", "local"]
    process = subprocess.Popen([*COMMAND, *verb, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        if not process.stdout.readline().startswith("ready: "):
            raise SystemExit(f"it did not start: try `specontext {' '.join((*verb, *words))}`")
        yield Side(name, f"http://127.0.0.1:{port}", process.pid)
    finally:
        process.terminate()
        process.wait()


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the bounds between which 95 % of resampled medians lie."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return statistics.median(values), medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]


def machine() -> dict[str, Any]:
    names = {
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    }
    return {"cpu": sorted(names), "cores": len(os.sched_getaffinity(0)), "kernel": platform.release()}


def versions() -> dict[str, str]:
    names = ("ray", "torch", "transformers", "fastapi", "uvicorn")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def show(medians: dict[str, tuple[float, float, float]]) -> None:
    table = Table(box=None)
    for name in ("", "median", "from", "to"):
        table.add_column(name, justify="right" if name else "left")
    for name, values in medians.items():
        table.add_row(name, *(f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}" for value in values))
    Console(file=sys.stdout, soft_wrap=True, highlight=False).print(table)


if __name__ == "__main__":
    main()

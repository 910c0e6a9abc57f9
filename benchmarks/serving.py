"""What serving costs: the server against the offline engine, many requests against one, and how soon it is ready.

    python benchmarks/serving.py                  # nano; wants a quiet machine, and says how quiet it was
    python benchmarks/serving.py --rounds 1 --num-prompts 16 --output-len 32

Every round starts the offline benchmark and a server as users do, one after the other, and sends the server random prompts: for
whole answers, for streams, and a few one at a time; none twice, since the server knows prompts again. A table, then one line of
JSON. Beside wall-clock times stands the processor time for each token, which other programs disturb less. Server and client share
the machine's cores. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

COMMAND = [sys.executable, "-m", "specontext.cli"]
TARGETS = {"concurrency_gain": 6.0, "overhead_whole": 0.15, "overhead_streamed": 0.30, "ready_s": 15.0}
ONE = 4  # requests that are sent one at a time


def main(words: Sequence[str] | None = None) -> None:
    options = parse(words)
    rounds = []
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
        rounds.append(one_round(options))
    report = {"benchmark": "serving", "model": options.model, "cores": len(os.sched_getaffinity(0)), "targets": TARGETS}
    report |= {"workload": {name: getattr(options, name) for name in ("num_prompts", "input_len", "output_len", "concurrency")}}
    report |= {"median": medians(rounds), "rounds": rounds}
    show(rounds, report["median"])
    print(json.dumps(report), flush=True)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--engine", default="", help="options of the engine, as one text: '--budget 64 --device cpu'")
    return parser.parse_args(words)


def one_round(options: argparse.Namespace) -> dict[str, float]:
    """Everything once; throughputs in output tokens a second."""
    load = os.getloadavg()[0]
    sizes = ["--input-len", str(options.input_len), "--output-len", str(options.output_len)]
    many = ["--num-prompts", str(options.num_prompts), *sizes]
    seats = ["--max-num-seqs", str(options.concurrency), *options.engine.split()]
    offline = last_json([*COMMAND, "bench", "throughput", options.model, *many, *seats])
    with server([options.model, *seats]) as (url, pid, ready):
        bench = [*COMMAND, "bench", "serve", "--base-url", url]
        atonce = [*many, "--max-concurrency", str(options.concurrency)]
        # A first load, so that all that is made once has been made.
        last_json([*bench, *atonce, "--no-stream", "--seed", "1"])
        whole, whole_cpu = timed(pid, [*bench, *atonce, "--no-stream", "--seed", "2"])
        streamed, streamed_cpu = timed(pid, [*bench, *atonce, "--stream", "--seed", "3"])
        one, _ = timed(pid, [*bench, *sizes, "--num-prompts", str(ONE), "--max-concurrency", "1", "--no-stream", "--seed", "4"])
    speeds = {name: run["output_throughput"] for name, run in (("offline", offline), ("whole", whole), ("streamed", streamed))}
    return {
        "load_average": load,
        "ready_s": ready,
        **speeds,
        "one": one["output_throughput"],
        "concurrency_gain": speeds["whole"] / one["output_throughput"],
        "overhead_whole": speeds["offline"] / speeds["whole"] - 1,
        "overhead_streamed": speeds["offline"] / speeds["streamed"] - 1,
        "offline_cpu_ms_a_token": 1000 * offline["cpu_seconds"] / (options.num_prompts * options.output_len),
        "whole_cpu_ms_a_token": 1000 * whole_cpu / whole["total_output_tokens"],
        "streamed_cpu_ms_a_token": 1000 * streamed_cpu / streamed["total_output_tokens"],
        "ttft_ms_streamed": streamed["median_ttft_ms"],
        "itl_ms_streamed": streamed["median_itl_ms"],
    }


@contextmanager
def server(words: Sequence[str]) -> Iterator[tuple[str, int, float]]:
    """A server process: its address, its id, and the seconds until it was ready."""
    began = time.perf_counter()
    command = [*COMMAND, "serve", *words, "--port", "0", "--disable-log-requests", "--log-interval", "0"]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("ready: "):
                said.seek(0)
                raise SystemExit(f"`specontext serve {' '.join(words)}` did not start: {said.read()[-2000:]}")
            yield line.rsplit(" at ", 1)[1].strip(), process.pid, time.perf_counter() - began
        finally:
            process.terminate()
            process.wait()


def timed(pid: int, command: Sequence[str]) -> tuple[dict[str, Any], float]:
    """What a load test found, and the seconds of processor time that the server took for it, warm-up included."""
    before = process_seconds(pid)
    found = last_json(command)
    return found, process_seconds(pid) - before


def last_json(command: Sequence[str]) -> dict[str, Any]:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def process_seconds(pid: int) -> float:
    """Processor time of a process of Linux."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def show(rounds: Sequence[dict[str, float]], median: dict[str, float]) -> None:
    table = Table(box=None)
    for name in ("", *(f"round {number + 1}" for number in range(len(rounds))), "median", "target"):
        table.add_column(name, justify="right" if name else "left")
    for name in rounds[0]:
        bound = TARGETS.get(name)
        target = "" if bound is None else f"{'>=' if name == 'concurrency_gain' else '<='} {bound:g}"
        table.add_row(name, *(shown(one[name]) for one in (*rounds, median)), target)
    Console(file=sys.stdout, soft_wrap=True, highlight=False).print(table)


def shown(value: float) -> str:
    return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"


if __name__ == "__main__":
    main()

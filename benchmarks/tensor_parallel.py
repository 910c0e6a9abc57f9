"""One model on 1, 2 and 4 GPUs: decode steps, prompts, loads from the host, and the sums that ranks pay for it.

Usage: python benchmarks/tensor_parallel.py [--device cpu --model nano] [--ranks 1,2,4] [--only sums,resident,host,large]
                                            [--minutes 8] [--out results.jsonl] [--json]

Weights are random, in the exact shape of public models (nano: the bundled checkpoint). Engines are those that `LLM` starts,
warmed up; what is timed is `LLMEngine.step` of requests that decode, method speculative. Every part is a process of its own with
a time limit, so one that fails or hangs costs its own numbers only; what does not fit into --minutes is listed as skipped.

Parts that need fewer cards than there are run side by side, each on its own. Parts:
  sums      the floor of communication: the sums of all layers and the gathered logits of a step, in one captured graph
  resident  KV on the devices, for each number of ranks
  large     --large (llama-3.1-70b) on the most ranks, KV on the devices
  host      the KV of all layers in host memory

Prompts are random tokens and the head is random, so the overlap of selections is not that of real texts; it is reported, and
floors count the loads that there were. The floor of a step is that of its bytes (a rank's weights, head, keys, chosen rows,
loads) over the bandwidths that the part measured on its own device, and the sums. Rows are appended to --out as they come; prints
a table and the targets, then with --json one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import specontext  # noqa: F401  # isort: skip  # before torch: it says how torch's threads wait
import torch
from measure import GIB, machine, versions
from rich.console import Console
from rich.table import Table
from tensor_parallel_parts import PARTS, run_part

from specontext.memory.presets import PRESETS

MARK = "RESULT "  # before a row, among what libraries print
CASES = {"cuda": ((1, 32768), (16, 8192), (1, 131072 - 256)), "cpu": ((1, 512), (4, 256))}
LARGE_CASES = {"cuda": ((1, 32768), (16, 8192)), "cpu": ((1, 256),)}
LIMITS = {"sums": 90, "resident": 200, "host": 200, "large": 240}  # seconds of a part


@dataclass(frozen=True)
class Part:
    """What one process measures."""

    kind: str
    model: str
    ranks: int
    cases: tuple[tuple[int, int], ...]
    device: str
    budget: int
    steps: int
    host_memory: int | None
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.kind} of {self.model} on {self.ranks}"


def parts_of(arguments: argparse.Namespace) -> list[Part]:
    """All that is asked for, in the order in which it is begun as cards are free."""
    cases = tuple(tuple(map(int, case.split("x"))) for case in arguments.cases.split(",")) if arguments.cases else None
    dtype = "bfloat16" if arguments.device == "cuda" else "float32"
    host = int(arguments.host_memory * GIB) if arguments.host_memory else None
    counts = sorted(map(int, arguments.ranks.split(",")))

    def part(kind: str, model: str, ranks: int, wanted: Sequence[tuple[int, int]]) -> Part:
        own = tuple(wanted)
        return Part(kind, model, ranks, own, arguments.device, arguments.budget, arguments.steps, host, dtype)

    own, large = cases or CASES[arguments.device], LARGE_CASES[arguments.device]
    several, wanted = [count for count in counts if count > 1], arguments.only.split(",")
    few = [part(kind, arguments.model, count, own) for kind, count in (("resident", 1), ("resident", 2)) if count in counts]
    few += [part("host", arguments.model, 1, own[:2])] if 1 in counts else []
    found = few + [part("sums", arguments.model, count, own) for count in reversed(several)]
    found += [part("resident", arguments.model, count, own) for count in several if count > 2]
    if several and "large" in wanted:
        found += [part(kind, arguments.large, max(several), large) for kind in ("sums", "large")]
    found += [part("host", arguments.model, count, own[:2]) for count in reversed(several)]
    return [one for one in found if one.kind in wanted]


def measured(part: Part, seconds: float, cards: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a part, in a process of its own on some cards; one with the reason where it failed."""
    command = [sys.executable, __file__, "--part", json.dumps(asdict(part))]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ",".join(cards)} if part.device == "cuda" else {})
    began = time.monotonic()
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment)
            try:
                code: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # its ranks end when it does
                    process.wait()
        lines = log.read_text(errors="replace").splitlines()
    rows = [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)]
    if code != 0:
        why = f"took more than {seconds:.0f} s" if code is None else f"ended with {code}"
        rows.append({"part": part.name, "failed": why, "log": [line for line in lines if not line.startswith(MARK)][-12:]})
    return [row | {"part_s": round(time.monotonic() - began, 1)} for row in rows]


def all_measured(parts: Sequence[Part], cards: Sequence[str], seconds: float) -> Iterator[tuple[Part, list[dict[str, Any]]]]:
    """The rows of all parts as they end; one after the other where a part needs all cards."""
    ends, waiting, free = time.monotonic() + seconds, list(parts), list(cards)
    running: dict[Future[list[dict[str, Any]]], tuple[Part, list[str]]] = {}
    with ThreadPoolExecutor(max(1, len(cards))) as pool:
        while waiting or running:
            while waiting and (_cards(waiting[0], cards) <= len(free) or not running):
                part, left = waiting.pop(0), ends - time.monotonic()
                if part.ranks > len(cards):
                    yield part, [{"part": part.name, "failed": f"skipped: there are {len(cards)} cards"}]
                elif left < 20:
                    yield part, [{"part": part.name, "failed": "skipped: no time"}]
                else:
                    own, free = free[: _cards(part, cards)], free[_cards(part, cards) :]
                    running[pool.submit(measured, part, min(LIMITS[part.kind], left), own)] = part, own
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                part, own = running.pop(future)
                free += own
                yield part, future.result()


def rows_of_others(file: Path | None, ranks: Sequence[int]) -> list[dict[str, Any]]:
    """What earlier runs appended to a file of other numbers of ranks than these, to compare with."""
    found = [json.loads(line) for line in file.read_text().splitlines()] if file is not None and file.exists() else []
    return [row for row in found if "ranks" in row and row["ranks"] not in ranks]


def _cards(part: Part, cards: Sequence[str]) -> int:
    """How many cards a part needs; on a CPU all, so that nothing runs beside it."""
    return part.ranks if part.device == "cuda" else len(cards)


def cards_of(device: str, most: int) -> list[str]:
    """Names of the cards; on a CPU as many as a part has ranks."""
    if device == "cpu":
        return ["cpu"] * most
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="decode steps")
    for heading in ("model", "ranks", "KV", "requests x tokens", "step ms", "floor ms", "sums ms", "x floor", "x one rank"):
        table.add_column(heading, justify="right")
    for heading in ("overlap", "loads MB", "GB/s of all", "prompts tok/s"):
        table.add_column(heading, justify="right")
    for row in (row for row in rows if "step_ms" in row):
        one = step_of(rows, row["model"], 1, row["kv"], row["requests"], row["context"])
        table.add_row(
            row["model"],
            str(row["ranks"]),
            row["kv"],
            f"{row['requests']} x {row['context']}",
            f"{row['step_ms']:.2f}",
            f"{row['floor_ms']:.2f}",
            "-" if (sums := sums_of(rows, row)) is None else f"{sums:.2f}",
            f"{row['step_ms'] / (row['floor_ms'] + (sums or 0)):.2f}",
            "-" if one is None else f"{one['step_ms'] / row['step_ms']:.2f}",
            "-" if row["overlap"] is None else f"{row['overlap']:.2f}",
            f"{row['loaded_bytes'] / 1e6:.1f}",
            f"{row['loaded_bytes'] / row['step_ms'] / 1e6:.1f}",
            f"{row['prompt_tokens_s']:.0f}",
        )
    return table


def step_of(
    rows: Sequence[dict[str, Any]], model: str, ranks: int, kv: str, requests: int, context: int
) -> dict[str, Any] | None:
    """The row of a case."""
    wanted = {"model": model, "ranks": ranks, "kv": kv, "requests": requests, "context": context}
    return next((row for row in rows if "step_ms" in row and wanted.items() <= row.items()), None)


def sums_of(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> float | None:
    """Milliseconds of the sums of a step."""
    wanted = {name: row[name] for name in ("model", "ranks", "requests")}
    return next((one["sums_ms"] for one in rows if "sums_ms" in one and wanted.items() <= one.items()), None)


def targets_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What was to be reached, and what was."""
    found = []
    for row in (row for row in rows if "step_ms" in row):
        model, ranks, kv, requests, context = (row[name] for name in ("model", "ranks", "kv", "requests", "context"))
        case = f"{model}, {ranks} ranks, {requests} x {context}"
        one = step_of(rows, model, 1, kv, requests, context)
        beside = step_of(rows, model, ranks, "resident", requests, context)
        if kv == "resident" and requests > 1 and one is not None and ranks in (2, 4):
            gain = one["step_ms"] / row["step_ms"]
            found.append(f"{case}: {gain:.2f} x one rank, to be {1.6 if ranks == 2 else 2.3} or more")
        if row["large"]:
            over = row["step_ms"] / (row["floor_ms"] + (sums_of(rows, row) or 0))
            found.append(f"{case}: {over:.2f} x its floor, to be 1.5 or less")
        if kv == "host" and beside is not None:
            if requests == 1:
                found.append(f"{case}: {row['step_ms'] / beside['step_ms']:.2f} x resident, to be 1.15 or less")
            else:
                bound = max(beside["step_ms"], row["loaded_bytes"] / ranks / 42e6 + 3)
                found.append(f"{case}: {row['step_ms']:.2f} ms, loads at 42 GB/s a rank + 3 ms are {bound:.2f} ms")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", default="llama-3.1-8b", help=f"nano, or one of {', '.join(PRESETS)}")
    parser.add_argument("--large", default="llama-3.1-70b", help="the model of the part of that name")
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--cases", help="requests x tokens, such as 1x32768,16x8192")
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=40, help="that are timed")
    parser.add_argument("--host-memory", type=float, help="GiB of all ranks' KV in host memory (default: what the cases need)")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--out", type=Path, help="a file to append rows to as they come; those of other ranks count")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.part:
        for row in run_part(json.loads(arguments.part)):
            print(MARK + json.dumps(row), flush=True)
        return
    if unknown := set(arguments.only.split(",")) - set(PARTS):
        parser.error(f"unknown part {sorted(unknown)[0]}: choose among {', '.join(PARTS)}")
    console, parts = Console(width=200), parts_of(arguments)
    rows = rows_of_others(arguments.out, [part.ranks for part in parts])
    cards = cards_of(arguments.device, max((part.ranks for part in parts), default=1))
    for part, found in all_measured(parts, cards, 60 * arguments.minutes):
        rows += found
        for row in found:
            console.print(json.dumps(row) if "failed" in row else f"{part.name}: {row}", soft_wrap=True, highlight=False)
            if arguments.out is not None:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    console.print(table_of(rows))
    for line in targets_of(rows):
        console.print(line, highlight=False)
    if arguments.json:
        name = machine(torch.device(arguments.device))
        run = {"benchmark": "tensor_parallel", "date": date.today().isoformat(), "machine": name, "versions": versions()}
        print(json.dumps(run | {"rows": rows, "targets": targets_of(rows)}))


if __name__ == "__main__":
    main()

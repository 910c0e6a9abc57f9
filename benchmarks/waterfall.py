"""One decode step on a GPU as a waterfall: which kernels run when, in which stream, and what waits for what.

Usage: python benchmarks/waterfall.py [--model llama-3.1-8b] [--context 131056] [--system ours] [--plot F.png] ...

The step is that of the engine's loop in the paper's tables (`specontext bench paper`): captured, compiled, all KV of ours in host
memory unless `--resident`, its selection replayed at a stated overlap. First steps are timed as they are: the loop, the captured
graph on the GPU, and the host while it launches that. Then one is recorded by PyTorch's profiler. Prints the time of each kind of
work, then with --json one JSON line, which has the kernels that take most.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import specontext  # noqa: F401  # isort: skip  # before torch: it says how torch's threads wait
import torch
from measure import machine, versions
from rich.console import Console
from rich.table import Table

from specontext.evaluation.paper.loop import FULL, OURS, Loop, looping, mean_step
from specontext.evaluation.paper.shapes import random_model, word_tokenizer

STEPS, WARM_UP = 25, 20
LISTED = 24  # kernels, in the JSON line

# Kind of work, its colour, and what its kernels' names contain; the first that fits.
KINDS = (
    ("loads from the host", "#d95f02", ("_copy_pieces", "_gather")),
    ("sparse attention", "#1b9e77", ("_attend", "_merge")),
    ("scores and top-k", "#7570b3", ("_chunk_logits", "_group_weights", "_count_digits", "_write_positions")),
    ("slot plan and rows", "#e7298a", ("_look_up", "_list", "_assign", "_rows")),
    ("new KV", "#e6ab02", ("_append",)),
    ("layers and head", "#9db4c0", ("triton_", "nvjet", "gemm", "gemv", "cutlass", "cublas", "splitK")),
    ("other", "#cccccc", ("",)),
)


@dataclass(frozen=True)
class Span:
    """A kernel of the step; microseconds from its start."""

    name: str
    kind: int
    start: float
    length: float


def record(run: Any) -> list[Span]:
    """Kernels of one call, by the profiler's trace."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = [
            e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
        ]
    # Before the step's first product of matrices lie the copies of its numbers, and the launch of the graph.
    first = min(event["ts"] for event in events if KINDS[kind_of(event["name"])][0] == "layers and head")
    return [Span(e["name"], kind_of(e["name"]), e["ts"] - first, e["dur"]) for e in events if e["ts"] >= first]


def kind_of(name: str) -> int:
    """Number of the kind of work that a kernel of this name does."""
    return next(i for i, (_, _, parts) in enumerate(KINDS) if any(part in name for part in parts))


def timed(loop: Loop, steps: int) -> dict[str, float]:
    """Microseconds of a step of the loop, of its captured graph on the GPU, and of the host to launch that; the means of some."""
    launches: list[tuple[float, torch.cuda.Event, torch.cuda.Event]] = []
    replay = torch.cuda.CUDAGraph.replay

    def watched(graph: torch.cuda.CUDAGraph) -> None:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        began = time.perf_counter()
        replay(graph)
        launches.append((time.perf_counter() - began, begin, end))
        end.record()

    plain = mean_step(loop, warm_up=WARM_UP, steps=steps)
    with patch.object(torch.cuda.CUDAGraph, "replay", watched):
        loop.seconds(steps)
    torch.cuda.synchronize()
    if not launches:
        raise SystemExit("no step was captured: nothing to show")
    return {
        "loop_us": plain * 1e6,
        "graph_us": sum(begin.elapsed_time(end) for _, begin, end in launches) / len(launches) * 1e3,
        "launch_us": sum(seconds for seconds, _, _ in launches) / len(launches) * 1e6,
    }


def plot(spans: list[Span], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # A captured graph runs on whichever streams the driver picks, so lanes are kinds of work.
    names = ("compute", "loads", "counting")
    lane_of = [1 if name == "loads from the host" else 2 if name == "other" else 0 for name, _, _ in KINDS]
    end = max(span.start + span.length for span in spans)
    figure, axes = plt.subplots(2, 1, figsize=(13, 5.6), constrained_layout=True)
    windows = ((0.0, end, "the whole step"), (0.0, end * 0.14, "its beginning: selection, plan, first loads and layers"))
    for ax, (low, high, words) in zip(axes, windows, strict=True):
        for kind, (_, colour, _) in enumerate(KINDS):
            bars = [(span.start, max(span.length, (high - low) / 3000)) for span in spans if span.kind == kind]
            bars = [bar for bar in bars if bar[0] < high]
            ax.broken_barh(bars, (lane_of[kind] - 0.38, 0.76), color=colour, linewidth=0)
        ax.set_xlim(low, high)
        ax.set_ylim(len(names) - 0.4, -0.6)
        ax.set_yticks(range(len(names)), names)
        ax.set_title(words, loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("microseconds")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for _, colour, _ in KINDS]
    figure.legend(
        handles, [name for name, _, _ in KINDS], loc="outside lower center", ncols=len(KINDS), frameon=False, fontsize=9
    )
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument(
        "--context", type=int, help="default: as many tokens as the model takes, up to 131,072, less those decoded"
    )
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--overlap", type=float, default=0.85)
    parser.add_argument("--system", choices=("ours", "full"), default="ours")
    parser.add_argument("--resident", action="store_true", help="all KV on the device instead; of full it is always")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a waterfall needs a GPU: a CPU has one stream, see decode.py --profile")
    device = torch.device("cuda")
    loaded = random_model(arguments.model, torch.bfloat16, device)
    loaded = replace(loaded, tokenizer=word_tokenizer(loaded.shape.vocab_size))
    way = FULL if arguments.system == "full" else OURS
    resident = arguments.resident or way is FULL
    room = 2 * STEPS + WARM_UP + 4
    if arguments.context is None:
        arguments.context = min(131072, loaded.shape.longest) - 2 * room
    options = {name: getattr(arguments, name) for name in ("requests", "context", "budget", "overlap")}
    away = 0 if resident else loaded.shape.layers
    with looping(loaded, way, **options, away=away, room=room) as loop:
        times = timed(loop, STEPS)
        spans = record(loop.step)
    where = "on the device" if resident else f"in host memory, {arguments.overlap:.0%} overlap"
    budget = "" if way is FULL else f", budget {arguments.budget:,}"
    title = f"{arguments.model}, {arguments.context:,} tokens, {way.name}{budget}, KV {where}: a decode step on {machine(device)}"
    busy: dict[str, float] = defaultdict(float)
    kernels: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        busy[KINDS[span.kind][0]] += span.length
        kernels[span.name].append(span.length)
    step = max(span.start + span.length for span in spans)
    table = Table(title=title)
    for column in ("work", "us", "share of the step"):
        table.add_column(column, justify="right")
    for name, microseconds in sorted(busy.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{microseconds:,.0f}", f"{microseconds / step:.1%}")
    Console().print(
        table,
        f"the step took {step:,.0f} us under the profiler, {len(spans)} kernels; streams overlap: shares add up to more than 1",
        f"without it the loop takes {times['loop_us']:,.0f} us a step, its captured graph {times['graph_us']:,.0f} on the GPU; "
        f"launching that takes the host {times['launch_us']:,.0f}",
        sep="\n",
    )
    if arguments.plot is not None:
        plot(spans, title, arguments.plot)
    if arguments.json:
        most = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:LISTED]
        listed = [{"kernel": name, "launches": len(each), "us": sum(each)} for name, each in most]
        report = {"benchmark": "waterfall", "date": date.today().isoformat(), "machine": machine(device), "versions": versions()}
        report |= vars(arguments) | {"plot": str(arguments.plot), **times, "step_us": step, "num_kernels": len(spans)}
        print(json.dumps(report | {"busy_us": dict(busy), "kernels": listed}))


if __name__ == "__main__":
    main()

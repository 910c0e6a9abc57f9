"""What the kernels of a draw take on a GPU, by the way of sampling and by how flat the distribution is.

    python benchmarks/token_choice.py                                      # 1 and 32 rows of 128,256 logits in bfloat16
    python benchmarks/token_choice.py --vocab-size 151936 --rows 1,64

Logits are normally distributed. Microseconds of each kernel by the profiler, of ten draws one behind the other; beside them
what a draw takes the host, and what it takes until its token is there. Tokens are those of the reference, else the run ends. A
table, then one line of JSON. In an engine's loop a draw stands behind the step, and the host is ahead:
`benchmarks/sampling.py` times it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from datetime import date
from typing import Any

import specontext  # noqa: F401  # isort: skip  # before torch: it says how torch's threads wait
import torch
from measure import machine, versions
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from specontext.kernels.dispatch import reference_of
from specontext.kernels.token_choice import Draw, draw_tokens
from specontext.kernels.top_k import best_tokens

TIMES = 10
WAYS: dict[str, tuple[float, int]] = {
    "temperature 0.6": (1.0, 0),
    "top-p 0.95": (0.95, 0),
    "top-k 20, top-p 0.95": (0.95, 20),
    "top-k 50": (1.0, 50),
}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=128256)
    parser.add_argument("--rows", default="1,32", help="with commas")
    parser.add_argument("--spreads", default="4,1", help="standard deviations of the logits, with commas")
    options = parser.parse_args(words)
    if not torch.cuda.is_available():
        parser.error("needs a GPU: on a CPU tokens are drawn by PyTorch's operations, see sampling.py")
    device = torch.device("cuda")
    rows = []
    for count in map(int, options.rows.split(",")):
        for spread in map(float, options.spreads.split(",")):
            generator = torch.Generator(device=device).manual_seed(0)
            logits = (torch.randn(count, options.vocab_size, device=device, generator=generator) * spread).bfloat16()
            rows += [{"rows": count, "spread": spread, "sampling": way} | timed(logits, *WAYS[way]) for way in WAYS]
    show(rows)
    report = {"benchmark": "token_choice", "date": date.today().isoformat(), "machine": machine(device), "versions": versions()}
    print(json.dumps(report | {"vocab_size": options.vocab_size, "rows": rows}), flush=True)


def timed(logits: Tensor, top_p: float, top_k: int) -> dict[str, Any]:
    """Microseconds: of each kernel, of the host, of a draw until its tokens are there."""
    best = best_tokens(logits)[0]
    each = [[Draw(row, 0.6, 0.0, top_p, top_k, row, 0, number) for row in range(len(logits))] for number in range(TIMES)]
    for draws in each[:2]:
        tokens, expected = best.clone(), best.clone()
        draw_tokens(logits, tokens, draws)
        reference_of(draw_tokens)(logits, expected, draws)
        if not torch.equal(tokens, expected):
            sys.exit(f"tokens differ from the reference's with top_p {top_p} and top_k {top_k}")
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        for draws in each:
            draw_tokens(logits, tokens, draws)
        torch.cuda.synchronize()
    kernels = {
        one.key: one.self_device_time_total / TIMES
        for one in profiled.key_averages()
        if one.device_type.name == "CUDA" and not one.key.startswith("Mem")
    }
    begin = time.perf_counter()
    for draws in each:
        draw_tokens(logits, tokens, draws)
    host = time.perf_counter() - begin
    torch.cuda.synchronize()
    whole = time.perf_counter() - begin
    return {"kernels_us": kernels, "host_us": host / TIMES * 1e6, "draw_us": whole / TIMES * 1e6}


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(box=None)
    for name in ("rows", "spread", "sampling", "kernels, us", "sum", "host, us", "a draw, us"):
        table.add_column(name, justify="left" if name in ("sampling", "kernels, us") else "right", no_wrap=True)
    for row in rows:
        kernels = ", ".join(f"{name} {us:.1f}" for name, us in row["kernels_us"].items())
        numbers = (sum(row["kernels_us"].values()), row["host_us"], row["draw_us"])
        table.add_row(str(row["rows"]), f"{row['spread']:g}", row["sampling"], kernels, *(f"{number:.1f}" for number in numbers))
    Console(file=sys.stdout, width=130, soft_wrap=True, highlight=False).print(table)


if __name__ == "__main__":
    main()

"""What a GPU reads from pinned host memory in place: rows of one KV head, and whole tokens, from small and large pools.

Usage: python benchmarks/host_reads.py [--gib 1 16] [--json]

A row is K and V of one token of one KV head (512 bytes at D = 128 in bfloat16); a token is the rows of 8 KV heads that are
neighbours in a page. Both move the same bytes; rows need eight times as many places. The pool is the engine's own host memory.
Prints GB/s beside the copy engine's, then with --json one JSON line.
"""

from __future__ import annotations

import argparse
import json
from datetime import date

import specontext  # noqa: F401  # isort: skip  # before torch: it says how torch's threads wait
import torch
from measure import copy_engine_bandwidth, host_memory, machine, versions
from rich.console import Console
from rich.table import Table
from torch import Tensor

from specontext.kernels.triton import rows as kernels

ROWS, HEADS, WIDTH = 77824, 8, 128  # what 32 layers miss at a budget of 2048 and 85 % overlap
ROW_BYTES = 2 * WIDTH * 2


def gigabytes_a_second(pool: Tensor, index: list[Tensor], target: Tensor) -> float:
    """Median over some sets of rows that are gathered in turn."""
    place = torch.arange(ROWS, device=target.device)
    times = []
    for turn in range(3 * len(index)):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        kernels.gather_rows(pool, index[turn % len(index)], target, place)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return ROWS * ROW_BYTES / sorted(times)[len(times) // 2] / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=int, nargs="+", default=[1, 16], help="sizes of the pool")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("it takes a GPU to read host memory from one")
    device = torch.device("cuda")
    target = torch.empty((ROWS, 2, WIDTH), dtype=torch.bfloat16, device=device)
    generator = torch.Generator(device).manual_seed(0)
    found = []
    for gib in arguments.gib:
        with host_memory(gib << 30, pinned=True) as memory:
            pool = memory.view(torch.bfloat16).view(-1, 2, WIDTH)
            tokens = len(pool) // HEADS
            single = [torch.randint(len(pool), (ROWS,), device=device, generator=generator) for _ in range(6)]
            firsts = [torch.randint(tokens, (ROWS // HEADS, 1), device=device, generator=generator) for _ in range(6)]
            whole = [(first * HEADS + torch.arange(HEADS, device=device)).flatten() for first in firsts]
            found.append(
                {
                    "pool_gib": gib,
                    "copy_engine_gb_s": copy_engine_bandwidth(memory, device) / 1e9,
                    "rows_gb_s": gigabytes_a_second(pool, single, target),
                    "tokens_gb_s": gigabytes_a_second(pool, whole, target),
                }
            )
    table = Table(title=f"reads of pinned host memory by {machine(device)}, GB/s")
    for column in ("pool", "copy engine", f"rows of {ROW_BYTES} B", f"tokens of {HEADS * ROW_BYTES} B"):
        table.add_column(column, justify="right")
    for row in found:
        table.add_row(f"{row['pool_gib']} GiB", *(f"{row[k]:.1f}" for k in ("copy_engine_gb_s", "rows_gb_s", "tokens_gb_s")))
    Console().print(table)
    if arguments.json:
        report = {"benchmark": "host_reads", "date": date.today().isoformat(), "machine": machine(device), "versions": versions()}
        print(json.dumps(report | {"pools": found}))


if __name__ == "__main__":
    main()

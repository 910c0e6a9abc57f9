"""Time of every operation of the decode step and of prefill, in the shapes of public models, against what memory allows.

Usage: python benchmarks/kernels.py [--device cuda] [--model llama-3.1-8b] [--context 131072] [--budget 2048] [--json]
       python benchmarks/kernels.py --only top_k,gather --quick
       python benchmarks/kernels.py --only paged,sparse,paged_tiles --context 10240 --requests 32 --kv-cache-dtype fp8
       python benchmarks/kernels.py --only gather,dense_read,write_back,chunk,append,sparse,paged --kv-cache-dtype fp8
       python benchmarks/kernels.py --only scores,top_k,head --bands 3 --key-heads 1 --key-dim 1024 --query-rank 1024

Operations (names for --only):
  scores     paged retrieval scores of all keys of the head, with the maximum of each group
  top_k      top-k of these scores; top_k_64k: of 4 rows x 64K with k = 2048; each with torch.topk beside it
  slot_plan  set difference and slot choice, in the steady state of a sequence of selections with the stated overlap
  gather     the missing rows of all layers, from the host pool into slots; on CUDA the pool is pinned and as large as stated.
             Pieces of neighbouring layers as the engine has them, and with heads that read elsewhere in some layers
  pieces     the same in pieces of 1, 2, 4 and 8 rows by 8 to 64 programs, from anywhere in the pool; tiles: by tiles of programs
  dense_read one layer's rows out of these pieces, as dense attention streams them; write_back, chunk: new rows to the host
  rows       numbers of the arena rows that a selection stands for, all layers at once
  append     new rows of one layer: of a resident one, and of an offloaded one to both tiers
  sparse     decode attention over the budget's rows, one call a layer
  paged      decode attention over the whole context in pages; paged_tiles, sparse_tiles: by other numbers of splits, and of KV in
             8 bits by other tiles
  prefill    causal attention of a chunk at the end of the context
  head       forward pass of the retrieval head for one token of each request

Every operation is checked against float64 or the PyTorch reference before it is timed; a wrong result ends the run. All data is
random. Calls rotate among inputs that together exceed the caches, except where the engine finds them there as well: scores just
written, slot tables. On CUDA calls are captured into graphs, on a CPU they are timed one by one; samples of all operations are
interleaved, and medians reported.

The floor is the bytes that an operation must move over a bandwidth that this run measured: reading device memory, or the copy
engine's for rows that cross the bus; for prefill it is the operations over the rate of a large matrix product. Prints a table,
then with --json one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from typing import Any

import specontext  # noqa: F401  # isort: skip  # before torch: it says how torch's threads wait

import torch
from kernel_attention import paged, paged_tiles, prefill, sparse, sparse_tiles
from kernel_case import RECENT, SINK, Case
from kernel_checks import ROUNDED, Operation, WrongResult
from kernel_choice import head, scores, slot_plan, top_k, top_k_64k
from kernel_moves import append, rows
from kernel_pieces import chunk, dense_read, gather, pieces, tiles, write_back
from measure import (
    GIB,
    Timer,
    copy_bandwidth,
    copy_engine_bandwidth,
    interleaved,
    machine,
    multiply_rate,
    read_bandwidth,
    versions,
)
from rich.console import Console
from rich.table import Table

from specontext.config import KV_CACHE_DTYPES
from specontext.kernels.quantised_rows import FORMATS
from specontext.model_shape import ModelShape
from specontext.retrieval.selector import Budget

# transformers looks for Hugging Face's package of this file's name. What it finds must not import transformers in turn, hence
# the imports inside functions, and must be too old for it.
__version__ = "0"

OPERATIONS: dict[str, Callable[[Case], list[Operation]]] = {
    "scores": scores,
    "top_k": top_k,
    "top_k_64k": top_k_64k,
    "slot_plan": slot_plan,
    "gather": gather,
    "pieces": pieces,
    "tiles": tiles,
    "dense_read": dense_read,
    "write_back": write_back,
    "chunk": chunk,
    "rows": rows,
    "append": append,
    "sparse": sparse,
    "sparse_tiles": sparse_tiles,
    "paged": paged,
    "paged_tiles": paged_tiles,
    "prefill": prefill,
    "head": head,
}


# The run --------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure(case: Case, names: Sequence[str], rounds: int, *, keep_going: bool = False) -> dict[str, Any]:
    """Check and time operations.

    Args:
        keep_going: an operation that fails is left out and listed, and the others are timed all the same.

    Returns:
        What the report says of speeds: bandwidths, the rate of a matrix product, `operations`, and errors of those that `failed`.
    """
    failed: dict[str, str] = {}
    with case.stack:  # until here the host pool stays pinned
        operations = []
        for name in names:
            try:
                operations += OPERATIONS[name](case)
            except Exception as error:
                if not keep_going:
                    raise
                failed[name] = f"{type(error).__name__}: {error}"
        rates = {
            "memory": read_bandwidth(case.device),
            "copy": copy_bandwidth(case.device),
            "arithmetic": multiply_rate(case.shape.dtype, case.device),
        }
        if any(operation.over == "bus" for operation in operations):
            rates["bus"] = copy_engine_bandwidth(case.host, case.device)
        timers = [Timer(operation.calls, case.device) for operation in operations]
        seconds = interleaved(timers, rounds)
    measured = zip(operations, timers, seconds, strict=True)
    return {
        "bandwidth_gb_s": rates["memory"] / 1e9,
        "copy_gb_s": rates["copy"] / 1e9,
        "h2d_gb_s": rates["bus"] / 1e9 if "bus" in rates else None,
        "matmul_tflop_s": rates["arithmetic"] / 1e12,
        "operations": [describe(operation, timer, s, rates[operation.over]) for operation, timer, s in measured],
        "failed": failed,
    }


def describe(operation: Operation, timer: Timer, seconds: float, rate: float) -> dict[str, Any]:
    """An operation's line of the report; `rate` is that of what its floor is made of, a second."""
    amount = max(1, operation.bytes or operation.flops or 0)
    note = operation.note if timer.why is None else f"{operation.note} not captured: {timer.why}".strip()
    return {
        "name": operation.name,
        "shape": operation.shape,
        "us": 1e6 * seconds,
        "bytes": operation.bytes,
        "gb_s": None if operation.bytes is None else operation.bytes / seconds / 1e9,
        "tflop_s": None if operation.flops is None else operation.flops / seconds / 1e12,
        "floor_us": 1e6 * amount / rate,
        "floor_ratio": seconds * rate / amount,
        "share_of_floor": amount / rate / seconds,
        "floor_of": operation.over,
        "error": operation.error,
        "timed": timer.how,
        "note": note,
    }


def show(report: dict[str, Any]) -> None:
    title = f"{report['model']} on {report['machine']}: {report['context']:,} tokens, budget {report['budget']:,}"
    table = Table(title=f"{title}, {report['requests']} request(s), {report['dtype']}")
    for column, justify in (("operation", "left"), ("shape", "left"), ("us", "right"), ("MB", "right"), ("GB/s", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for column in ("floor us", "x floor", "error"):
        table.add_column(column, justify="right")
    table.add_column("timed")
    for line in report["operations"]:
        arithmetic = line["bytes"] is None
        table.add_row(
            line["name"],
            "\n".join(part for part in (line["shape"], line["note"]) if part),
            f"{line['us']:,.1f}",
            "" if arithmetic else f"{line['bytes'] / 1e6:,.2f}",
            f"{line['tflop_s']:,.2f} TFLOP/s" if arithmetic else f"{line['gb_s']:,.1f}",
            f"{line['floor_us']:,.1f}",
            f"{line['floor_ratio']:,.2f}",
            f"{line['error']:.1g}",
            line["timed"],
        )
    console = Console()
    console.print(table)
    bus = "" if report["h2d_gb_s"] is None else f", host to device {report['h2d_gb_s']:,.1f} (copy engine)"
    console.print(
        f"GB/s here: reading {report['bandwidth_gb_s']:,.1f}, copying {report['copy_gb_s']:,.1f} (read and written){bus}; "
        f"matrix product {report['matmul_tflop_s']:,.2f} TFLOP/s"
    )
    for line in report["operations"]:
        if line["floor_of"] == "bus" and line["name"] == "gather":
            console.print(f"gather reaches {line['share_of_floor']:.0%} of the copy engine's bandwidth")


def parse(values: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", help="llama-3.1-8b (default on CUDA), qwen3-0.6b (default on a CPU) or llama-3.2-1b")
    parser.add_argument("--dtype", choices=sorted(str(dtype).removeprefix("torch.") for dtype in ROUNDED), default="bfloat16")
    parser.add_argument("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto", help="of rows of KV, with their scales")
    parser.add_argument("--context", type=int, help="default: 131072 on CUDA, 32768 on a CPU")
    parser.add_argument("--budget", type=int, help="default: 2048 on CUDA, 1024 on a CPU")
    parser.add_argument("--slots", type=int, help="device slots of a KV head; default: the budget and a quarter")
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--overlap", type=float, default=0.85)
    parser.add_argument("--bands", type=int, default=1, help="groups of the head for each KV head, one for each band of layers")
    parser.add_argument("--key-heads", type=int, help="keys of the head for each token; default: one for each group")
    parser.add_argument("--key-dim", type=int, help="their width; default: that of the model's heads")
    parser.add_argument("--query-rank", type=int, help="of the head's query projection; default: one matrix")
    parser.add_argument("--chunk", type=int, help="tokens of a prefill chunk; default: 1024 on CUDA, 256 on a CPU")
    parser.add_argument("--pool-gib", type=float, help="host pool; default: 16 on CUDA, what the context needs on a CPU")
    parser.add_argument("--rounds", type=int, help="samples of each operation; default: 25 on CUDA, 7 on a CPU")
    parser.add_argument("--only", help=f"comma-separated: {', '.join(OPERATIONS)}")
    parser.add_argument("--keep-going", action="store_true", help="time the others when an operation fails")
    parser.add_argument("--quick", action="store_true", help="defaults of 4,096 tokens, budget 512 and a pool of 1 GiB")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(values)
    _set_defaults(arguments)
    _check(parser, arguments)
    return arguments


def _set_defaults(arguments: argparse.Namespace) -> None:
    cuda, quick = arguments.device.startswith("cuda"), arguments.quick
    defaults: dict[str, Any] = {
        "model": "llama-3.1-8b" if cuda else "qwen3-0.6b",
        "context": 4096 if quick else 131072 if cuda else 32768,
        "budget": 512 if quick else 2048 if cuda else 1024,
        "chunk": 1024 if cuda else 256,
        "pool_gib": (1 if quick else 16) if cuda else None,
        "rounds": 25 if cuda else 5 if quick else 7,
        "only": ",".join(OPERATIONS),
    }
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.slots is None:
        arguments.slots = arguments.budget + arguments.budget // 4


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    least = 20 if arguments.device.startswith("cuda") else 5
    unknown = set(arguments.only.split(",")) - set(OPERATIONS)
    if unknown:
        parser.error(f"--only: no operation {', '.join(sorted(unknown))}; there are {', '.join(OPERATIONS)}")
    if arguments.rounds < least:
        parser.error(f"--rounds must be at least {least}: medians of fewer say little")
    if arguments.budget <= SINK + RECENT or arguments.slots < arguments.budget or arguments.context < arguments.budget:
        parser.error(f"--budget must exceed {SINK + RECENT}, and neither slots nor context may be fewer than the budget")
    if not 0 < arguments.chunk < arguments.context:
        parser.error("--chunk must be shorter than the context")
    if not 0 <= arguments.overlap <= 1:
        parser.error("--overlap is a share, from 0 to 1")


def case_of(arguments: argparse.Namespace, device: torch.device) -> Case:
    from specontext.evaluation.paper.shapes import config_of

    return Case(
        shape=replace(
            ModelShape.from_config(config_of(arguments.model), getattr(torch, arguments.dtype)),
            kv_dtype=FORMATS.get(arguments.kv_cache_dtype),
        ),
        context=arguments.context,
        budget=Budget(arguments.budget, SINK, RECENT),
        slots=arguments.slots,
        requests=arguments.requests,
        overlap=arguments.overlap,
        chunk=arguments.chunk,
        device=device,
        pool_bytes=None if arguments.pool_gib is None else round(arguments.pool_gib * GIB),
        bands=arguments.bands,
        key_heads=arguments.key_heads,
        key_dim=arguments.key_dim,
        query_rank=arguments.query_rank,
    )


def make_report(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    settings = ("model", "dtype", "device", "context", "budget", "slots", "requests", "overlap", "chunk", "pool_gib", "rounds")
    settings += ("kv_cache_dtype", "bands", "key_heads", "key_dim", "query_rank")
    return {
        "benchmark": "kernels",
        "date": date.today().isoformat(),
        "machine": machine(device),
        "versions": versions(),
        **{name: getattr(arguments, name) for name in settings},
        **measure(case_of(arguments, device), arguments.only.split(","), arguments.rounds, keep_going=arguments.keep_going),
    }


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    try:
        report = make_report(arguments, device)
    except (WrongResult, MemoryError, ValueError) as error:
        sys.exit(f"stopped: {error}")
    show(report)
    if arguments.json:
        print(json.dumps(report))
    if report["failed"]:
        sys.exit("\n".join(f"failed: {name}: {why}" for name, why in report["failed"].items()))


if __name__ == "__main__":
    main()

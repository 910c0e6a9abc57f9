"""Time of one decode step: the Hugging Face model, our own full attention, and SpeContext, interleaved in one run.

Usage: python benchmarks/decode.py [--device cpu] [--model qwen3-0.6b] [--context 32768] [--budget 1024]
                                   [--quantization fp8|int4] [--json]

Random weights in the exact shape of a public model; the KV of the context is filled with random numbers, so no prefill is
needed. Every step goes through the engine's own runner: head, scoring and top-k over all keys, planning, loads, model,
attention, statistics. Random keys have no neighbourhoods, so the selection that is then used is replayed from a sequence in
which every step keeps a stated share of the tokens of the step before (`--overlap`); the head's own selection is computed in
every step all the same.

Systems:
  hf         the same weights with SDPA and Hugging Face's DynamicCache; on a GPU also `hf_no_cudnn`, without cuDNN's attention,
             which plans anew for each new length, and ratios are to the faster one
  full       our engine, method full, all layers on the device
  resident   our engine, method speculative, all layers on the device
  offloaded  the same with the KV of all layers in host memory and hot slots
  short      `offloaded` at a context of 64 tokens: what everything but the context costs
  full_4k    `full` at a context of 4,096 tokens

--profile prints besides what the parts of a step of `resident`, `offloaded` and `short` take (on a CPU).

The floor is the bytes that a step of `offloaded` must move (weights once, the head's keys once, the selected rows once, the
missing rows twice) over the bandwidth that this run measured. Prints a table, then with --json one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any

import specontext  # noqa: F401  # isort: skip  # before torch: it says how torch's threads wait
import torch
from measure import clock, machine, read_bandwidth, versions
from rich.console import Console
from rich.table import Table
from step_parts import seconds_by_part
from torch import Tensor
from transformers import DynamicCache

from specontext.config import KV_CACHE_DTYPES, QUANTIZATIONS, SpeContextConfig
from specontext.core import Batch
from specontext.distill.new_head import HeadShape, new_head
from specontext.engine.parts import Parts
from specontext.engine.runner import ModelRunner
from specontext.evaluation.paper.hugging_face import SDPA, cudnn_allowed, kernel_choices, random_kv
from specontext.evaluation.paper.replay import Replay, overlapping, with_own_method
from specontext.evaluation.paper.shapes import DTYPES, random_model
from specontext.evaluation.paper.states import parts_for
from specontext.models.attention import ATTENTION_NAME
from specontext.models.checking import cache_name
from specontext.models.loading import LoadedModel
from specontext.retrieval.selector import Budget, LaneTokens

SHORT_CONTEXT = 64


@dataclass
class System:
    """Something whose steps are timed."""

    name: str
    step: Callable[[], Any]
    before: Callable[[], None] = lambda: None


def decode_batch(requests: int, context: int, device: torch.device) -> Batch:
    """One token of each request, at the last position of its context."""
    seats = torch.arange(requests, device=device)
    lengths = torch.full_like(seats, context)
    return Batch(
        token_ids=seats + 7,
        positions=lengths - 1,
        seats=seats,
        lengths=lengths,
        seeds=seats,
        num_decodes=requests,
        prefills=(),
        last_tokens=seats,
        span=context,
    )


def hugging_face(loaded: LoadedModel, requests: int, context: int, device: torch.device) -> list[System]:
    shape, model = loaded.shape, loaded.model
    cache = DynamicCache(config=model.config)
    for layer in range(shape.layers):
        cache.update(*random_kv(shape, requests, context - 1, device), layer)
    ids = torch.full((requests, 1), 7, device=device)

    def step(cudnn: bool) -> Tensor:
        with torch.inference_mode(), cudnn_allowed(cudnn):
            return model(input_ids=ids, use_cache=True, **{cache_name(model): cache}).logits

    names = {True: "hf", False: "hf_no_cudnn"}
    return [
        System(names[cudnn], partial(step, cudnn), lambda: model.set_attn_implementation("sdpa"))
        for cudnn in kernel_choices(SDPA, device)
    ]


def ours(name: str, loaded: LoadedModel, parts: Parts, requests: int, context: int, device: torch.device) -> System:
    layers = parts.head.config.feature_layers if parts.head is not None else ()
    runner = ModelRunner(loaded, parts, feature_layers=layers, measure_recall=False)
    batch = decode_batch(requests, context, device)
    return System(name, lambda: runner.run(batch), lambda: loaded.model.set_attn_implementation(ATTENTION_NAME))


def interleaved(systems: list[System], steps: int, device: torch.device) -> dict[str, float]:
    """Median seconds of a step of each system; the systems take turns, after two steps each to warm up."""
    times: dict[str, list[float]] = {system.name: [] for system in systems}
    for round_ in range(steps + 2):
        for system in systems:
            system.before()
            began = clock(device)
            system.step()
            seconds = clock(device) - began
            if round_ >= 2:
                times[system.name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def retrieval_seconds(parts: Parts, batch: Batch, steps: int = 9) -> float:
    """Median seconds of choosing alone: the head, the scores of all keys, top-k; on a GPU as part of a captured graph."""
    lane, device = LaneTokens.part(batch, slice(0, batch.num_decodes), batch.span), parts.kv.device
    choose: Callable[[], Any] = torch.inference_mode()(lambda: parts.selector.select(lane))
    if device.type == "cuda":
        for _ in range(2):
            choose()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            choose()
        choose = graph.replay
    times = []
    for _ in range(steps):
        began = clock(device)
        choose()
        times.append(clock(device) - began)
    return statistics.median(times)


def profiled(systems: list[System], steps: int) -> dict[str, dict[str, float]]:
    """Seconds of the parts of a step, for every system that selects."""
    found = {}
    for system in systems:
        if system.name != "full" and not system.name.startswith("hf"):
            system.before()
            found[system.name] = seconds_by_part(system.step, steps)
    return found


def floor_bytes(loaded: LoadedModel, parts: Parts, requests: int, context: int, overlap: float = 1.0) -> int:
    """Bytes that a step must move at least: of the resident system, or with an overlap below 1 of the offloaded one."""
    shape, head = loaded.shape, parts.head
    assert head is not None and parts.method.budget is not None
    embedding = loaded.model.get_input_embeddings().weight
    tied = loaded.model.get_output_embeddings().weight is embedding
    weights = loaded.weight_bytes
    weights -= 0 if tied else embedding.numel() * embedding.element_size()  # only a few rows of a table of its own are read
    weights += sum(p.numel() * p.element_size() for p in head.parameters())
    keys = requests * context * head.config.key_count * head.config.head_dim * shape.dtype.itemsize
    rows = requests * shape.layers * shape.kv_heads * parts.method.budget
    missing = rows * (1 - overlap)
    return int(weights + keys + (rows + 2 * missing) * parts.kv.layout.layers[0].row_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="qwen3-0.6b")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="of the linear layers, on a GPU; default: none")
    parser.add_argument("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto", help="of our systems; not of hf")
    parser.add_argument("--host-kv-dtype", choices=KV_CACHE_DTYPES, default="auto", help="of what is on the host alone")
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--slots", type=int, help="device slots of a KV head; default: the budget and a quarter")
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--overlap", type=float, default=0.85)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--offload", type=int, help="layers of `offloaded` on the host, the last ones; default: all")
    parser.add_argument("--programs", type=int, help="that load from the host beside the layers, on a GPU; default: the kernel's")
    parser.add_argument("--systems", default="hf,full,resident,offloaded,short")
    parser.add_argument("--profile", action="store_true", help="what the parts of a step take (on a CPU)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.steps < 5:
        parser.error("--steps must be at least 5: medians of fewer say little")
    device = torch.device(arguments.device)
    if arguments.profile and device.type != "cpu":
        parser.error("--profile times calls on the host: only a CPU's calls return when their work is done")
    if arguments.quantization and device.type != "cuda":
        parser.error("--quantization needs a GPU: on a CPU weights are written out in the model's number format")
    speed = read_bandwidth(device)  # while there is room
    loaded = random_model(arguments.model, DTYPES[arguments.dtype], device, quantization=arguments.quantization)
    requests, context, budget, kind = arguments.requests, arguments.context, arguments.budget, arguments.kv_cache_dtype
    slots = arguments.slots or budget + budget // 4

    def speculative(offload: int, tokens: int) -> Parts:
        head = new_head(HeadShape(), loaded.shape, trained_length=context, source="benchmark", seed=0)
        head = head.to(device=device, dtype=loaded.shape.dtype).requires_grad_(False)
        config = SpeContextConfig(budget=budget, slots=slots, offload_layers=offload)
        host = {"host_kv_dtype": arguments.host_kv_dtype} if offload else {}
        return parts_for(loaded, head, config, requests, tokens, device, kv_cache_dtype=kind, **host)

    def replayed(parts: Parts, tokens: int) -> Parts:
        limits = Budget(budget, parts.method.sink, parts.method.recent)
        selections = overlapping(limits, tokens, requests, parts.selector.groups, arguments.overlap, 16)
        return with_own_method(parts, Replay(parts.selector, selections, device))

    wanted = arguments.systems.split(",")
    systems: list[System] = []
    offloaded: Parts | None = None
    if "hf" in wanted:
        systems += hugging_face(loaded, requests, context, device)
    if "full" in wanted:
        dense = SpeContextConfig(method="full", offload_layers=0)
        full = parts_for(loaded, None, dense, requests, context, device, kv_cache_dtype=kind)
        systems.append(ours("full", loaded, full, requests, context, device))
    if "resident" in wanted:
        systems.append(ours("resident", loaded, replayed(speculative(0, context), context), requests, context, device))
    if "offloaded" in wanted:
        offloaded = speculative(-1 if arguments.offload is None else arguments.offload, context)
        offloaded.kv.transfers.programs = arguments.programs
        systems.append(ours("offloaded", loaded, replayed(offloaded, context), requests, context, device))
    if "full_4k" in wanted:
        dense = SpeContextConfig(method="full", offload_layers=0)
        full = parts_for(loaded, None, dense, requests, 4096, device, kv_cache_dtype=kind)
        systems.append(ours("full_4k", loaded, full, requests, 4096, device))
    if "short" in wanted:
        systems.append(ours("short", loaded, speculative(-1, SHORT_CONTEXT), requests, SHORT_CONTEXT, device))
    seconds = interleaved(systems, arguments.steps, device)
    report = make_report(arguments, seconds, speed, loaded, offloaded)
    if offloaded is not None and report["step_s"]:
        retrieval = retrieval_seconds(offloaded, decode_batch(requests, context, device))
        report |= {"retrieval_s": retrieval, "retrieval_share": retrieval / report["step_s"]}
    show(seconds, report)
    if arguments.profile:
        report["parts_s"] = parts = profiled(systems, arguments.steps)
        show_parts(parts)
    if arguments.json:
        print(json.dumps(report))


def make_report(
    arguments: argparse.Namespace, seconds: dict[str, float], speed: float, loaded: LoadedModel, offloaded: Parts | None
) -> dict[str, Any]:
    step = seconds.get("offloaded")
    theirs = min((value for name, value in seconds.items() if name.startswith("hf")), default=None)

    def over(other: float | None) -> float | None:
        return other / step if step is not None and other is not None else None

    moved = floor_bytes(loaded, offloaded, arguments.requests, arguments.context, arguments.overlap) if offloaded else None
    at_home = floor_bytes(loaded, offloaded, arguments.requests, arguments.context) / speed if offloaded else None
    resident = seconds.get("resident")
    return {
        "benchmark": "decode",
        "date": date.today().isoformat(),
        "machine": machine(torch.device(arguments.device)),
        "versions": versions(),
        "model": arguments.model,
        "dtype": arguments.dtype,
        "quantization": arguments.quantization,
        "weight_bytes": loaded.weight_bytes,
        "kv_cache_dtype": arguments.kv_cache_dtype,
        "host_kv_dtype": arguments.host_kv_dtype,
        "device": arguments.device,
        "context": arguments.context,
        "budget": arguments.budget,
        "requests": arguments.requests,
        "programs": arguments.programs,
        "offloaded_layers": len(offloaded.kv.offloaded) if offloaded is not None else None,
        "step_s": step,
        "tokens_per_s": None if step is None else arguments.requests / step,
        "resident_step_s": resident,
        "short_step_s": seconds.get("short"),
        "hf_step_s": theirs,
        "hf_step_s_by_default": seconds.get("hf"),
        "full_4k_step_s": seconds.get("full_4k"),
        "full_step_s": seconds.get("full"),
        "speedup_vs_hf": over(theirs),
        "speedup_vs_full": over(seconds.get("full")),
        "resident_floor_s": at_home,
        "resident_floor_ratio": resident / at_home if resident and at_home else None,
        "resident_over_full_4k": resident / seconds["full_4k"] if resident and "full_4k" in seconds else None,
        "offloaded_over_resident": step / resident if step and resident else None,
        "step_over_short": None if step is None or "short" not in seconds else step / seconds["short"],
        "bandwidth_gb_s": speed / 1e9,
        "bytes_moved": moved,
        "achieved_gb_s": None if step is None or moved is None else moved / step / 1e9,
        "floor_s": None if moved is None else moved / speed,
        "floor_ratio": None if step is None or moved is None else step * speed / moved,
        "selection": f"computed over all keys in every step; the one used is replayed at {arguments.overlap:.0%} overlap",
        "steps": arguments.steps,
    }


def show(seconds: dict[str, float], report: dict[str, Any]) -> None:
    title = f"{report['model']}, {report['context']:,} tokens, budget {report['budget']:,}, {report['requests']} request(s)"
    table = Table(title=title)
    for column in ("system", "ms a step", "against offloaded"):
        table.add_column(column, justify="right")
    for name, value in seconds.items():
        ratio = value / seconds["offloaded"] if "offloaded" in seconds else float("nan")
        table.add_row(name, f"{1000 * value:.1f}", f"{ratio:.2f}x")
    console = Console()
    console.print(table)
    if report["floor_s"] is not None:
        console.print(
            f"floor {1000 * report['floor_s']:.1f} ms: {report['bytes_moved'] / 1e9:.2f} GB at {report['bandwidth_gb_s']:.1f} "
            f"GB/s; the step took {report['floor_ratio']:.2f} times that ({report['achieved_gb_s']:.1f} GB/s)"
        )


def show_parts(parts: dict[str, dict[str, float]]) -> None:
    table = Table(title="ms of a step")
    for column in ("part", *parts):
        table.add_column(column, justify="right")
    for name in next(iter(parts.values()), {}):
        table.add_row(name, *(f"{1000 * seconds[name]:.1f}" for seconds in parts.values()))
    Console().print(table)


if __name__ == "__main__":
    main()

"""What a user gets end to end: first tokens, prompts, mixed traffic and the loop around the step, beside Hugging Face.

Usage: python benchmarks/end_to_end.py [--device cpu] [--model qwen3-0.6b] [--only ttft,mixed] [--quick] [--json]

Engines are those that `LLM` starts, and what is timed is `LLMEngine.step`. A model is a public one's shape with random weights
(llama-3.1-8b, qwen3-0.6b ...) or a checkpoint (nano). Hugging Face is the same weights in the same process with SDPA: `generate`
up to its first token, that is one forward pass with the logits of the last token only. It takes turns with each of our systems;
medians. Prompts are random, none comes twice.

Systems:
  full         every token is read
  speculative  KV on the device
  host         speculative with the KV of all layers on the host

Parts:
  ttft     seconds to the first token by length: ttft_over_hf; on a CPU also ttft_thread_over_hf, of the processor time of the
           calling thread, which other programs disturb less. known_over_first: a second question on the same prompt
  prefill  tokens a second of many prompts at once, against Hugging Face one by one: prefill_over_hf
  loop     a step of requests that decode, through the engine, against the model's step alone (on a GPU a captured graph), run as
           often without the engine: loop_over_step
  mixed    steps in which requests decode and a prompt is computed, against the prompt alone and the decode steps alone:
           mixed_over_parts; mixed_over_bound allows 1.2 decode steps
  latency  p50 and p99 of the time between two tokens of a stream while long prompts come: itl_s
  first    all steps of a fresh engine, from the moment at which a server would be ready, against the median of their kind (decode
           steps by number of requests, chunks, mixed ones): worst_step_after_ready_over_median

Each case is repeated until --rounds or --seconds are reached. Prints a table, then with --json one JSON line.
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
from end_to_end_parts import Report, Sizes, first_steps, first_tokens, many_prompts, serving
from engine_runs import SYSTEMS, Setup, load
from measure import machine, versions
from rich.console import Console
from rich.table import Table

from specontext.config import EngineConfig
from specontext.errors import SpeContextError
from specontext.evaluation.paper.shapes import DTYPES
from specontext.memory.presets import PRESETS

SERVING = ("loop", "mixed", "latency")
PARTS = ("ttft", "prefill", *SERVING, "first")
RATIOS = ("ttft_over_hf", "prefill_over_hf", "mixed_over_parts", "loop_over_step", "worst_step_after_ready_over_median")
SIZES = {
    "cuda": Sizes(
        lengths=(128, 1024, 8192, 32768, 131072 - 1024),
        prompts=32,
        prompt=8192,
        requests=32,
        context=8192,
        mixed=8,
        streams=16,
        arriving=16384,
        arrivals=2,
        chunks=6,
        sizes=(1, 2, 8),
        crossing=4096 - 6,
        steps=16,
        rounds=5,
        seconds=8.0,
    ),
    "cpu": Sizes(
        lengths=(1024, 4096),
        prompts=4,
        prompt=512,
        requests=8,
        context=256,
        mixed=8,
        streams=8,
        arriving=1024,
        arrivals=1,
        chunks=1,
        sizes=(1, 2),
        crossing=256,
        steps=6,
        rounds=3,
        seconds=15.0,
    ),
}
QUICK = Sizes(
    lengths=(32, 64),
    prompts=2,
    prompt=32,
    requests=2,
    context=24,
    mixed=2,
    streams=2,
    arriving=64,
    arrivals=1,
    chunks=2,
    sizes=(1, 2),
    crossing=24,
    steps=2,
    rounds=1,
    seconds=1.0,
)


def main(words: Sequence[str] | None = None) -> None:
    options = parse(words)
    device, sizes = torch.device(options.device), options.sizes
    try:
        loaded, dummy = load(options.model, options.dtype, device)
    except SpeContextError as error:
        raise SystemExit(str(error)) from error
    generator = torch.Generator().manual_seed(0)
    setup = Setup(loaded, dummy, options.budget, options.chunk, options.mixed_chunk, generator)
    serve = [part for part in SERVING if part in options.only]
    runs: list[tuple[str, bool, Callable[[], Report]]] = [
        ("ttft", "ttft" in options.only, lambda: first_tokens(setup, sizes)),
        ("prefill", "prefill" in options.only, lambda: many_prompts(setup, sizes)),
        (", ".join(serve), bool(serve), lambda: serving(setup, sizes, serve)),
        ("first", "first" in options.only, lambda: first_steps(setup, sizes)),
    ]
    report: Report = dict.fromkeys(RATIOS)
    for name, wanted, run in runs:
        if wanted:
            print(f"measuring {name}", file=sys.stderr, flush=True)
            report |= run()
    show(options, sizes, report)
    if options.json:
        print(json.dumps(about(options, sizes) | report), flush=True)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", help=f"{', '.join(sorted(PRESETS))}, or a checkpoint; by default one that fits the device")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--budget", type=int, help="default: 2048 on a GPU, 256 on a CPU")
    parser.add_argument("--chunk", type=int, help="max_num_batched_tokens of the engines; default: theirs")
    parser.add_argument("--mixed-chunk", type=int, help="their max_num_mixed_tokens; default: theirs")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them")
    parser.add_argument("--lengths", help="lengths of ttft, with commas between them")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, help="no further round of a case begins after so many")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and nano: whether it works, not how fast it is")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(words)
    options.only = options.only.split(",")
    if unknown := [part for part in options.only if part not in PARTS]:
        parser.error(f"unknown part '{unknown[0]}': choose among {', '.join(PARTS)}")
    gpu = options.device == "cuda"
    if gpu and not torch.cuda.is_available():
        parser.error("no GPU is visible: give --device cpu")
    options.model = options.model or ("nano" if options.quick else "llama-3.1-8b" if gpu else "qwen3-0.6b")
    options.budget = options.budget or (32 if options.quick else 2048 if gpu else 256)
    if options.quick:
        options.chunk, options.mixed_chunk = options.chunk or 16, options.mixed_chunk or 16
    named = {"max_num_batched_tokens": options.chunk, "max_num_mixed_tokens": options.mixed_chunk}
    try:
        tokens = EngineConfig(options.model, **named).step_tokens(options.device)
    except SpeContextError as error:
        parser.error(str(error))
    options.chunk, options.mixed_chunk = tokens.alone, tokens.mixed
    options.sizes = QUICK if options.quick else SIZES[options.device]
    try:
        lengths = tuple(int(length) for length in options.lengths.split(",")) if options.lengths else options.sizes.lengths
    except ValueError:
        parser.error(f"--lengths takes whole numbers with commas between them, got '{options.lengths}'")
    rounds = options.sizes.rounds if options.rounds is None else options.rounds
    seconds = options.sizes.seconds if options.seconds is None else options.seconds
    if min(*lengths, rounds) < 1:
        parser.error("lengths and rounds are at least 1")
    if options.mixed_chunk <= options.sizes.mixed:
        parser.error(f"--mixed-chunk must leave room for a prompt beside {options.sizes.mixed} requests that decode")
    options.sizes = replace(options.sizes, lengths=lengths, rounds=rounds, seconds=seconds)
    return options


def about(options: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    names = ("model", "dtype", "device", "budget", "chunk", "mixed_chunk")
    return {
        "benchmark": "end_to_end",
        "date": date.today().isoformat(),
        "machine": machine(torch.device(options.device)),
        "versions": versions(),
        **{name: getattr(options, name) for name in names},
        "sizes": vars(sizes),
    }


def show(options: argparse.Namespace, sizes: Sizes, report: Report) -> None:
    """A table of a row for each thing that was measured, of a column for each system."""
    chunks = f"chunks of {options.chunk}, beside decode tokens {options.mixed_chunk}"
    table = Table(title=f"{options.model}, {options.dtype}, {machine(torch.device(options.device))}, {chunks}")
    for column in ("", *SYSTEMS):
        table.add_column(column, justify="right" if column else "left")

    def row(name: str, values: dict[str, Any], form: Callable[[Any], str]) -> None:
        table.add_row(name, *(form(values[system]) if system in values else "" for system in SYSTEMS))

    for length, ratios in (report["ttft_over_hf"] or {}).items():
        of_length = {field: report[field][length] for field in ("ttft_s", "ttft_hf_s", "known_over_first")}
        row(f"first token, {int(length):,} tokens", of_length["ttft_s"], seconds)
        row("  Hugging Face in the same rounds", of_length["ttft_hf_s"], seconds)
        row("  over Hugging Face", ratios, ratio)
        if options.device == "cpu":
            row("  the same in processor time of a thread", report["ttft_thread_over_hf"][length], ratio)
        row("  a second question, over the first", of_length["known_over_first"], ratio)
    title = f"{sizes.prompts} prompts of {sizes.prompt:,} tokens, tokens/s"
    for field, name, form in (
        ("prefill_tokens_per_s", title, "{:,.0f}".format),
        ("prefill_hf_tokens_per_s", "  Hugging Face, one by one", "{:,.0f}".format),
        ("prefill_over_hf", "  over Hugging Face", ratio),
        ("loop_step_s", f"step of {sizes.requests} requests at {sizes.context:,}, the engine's", seconds),
        ("captured_step_s", "  the model's alone", seconds),
        ("loop_over_step", "  ratio", ratio),
        ("mixed_step_s", f"step of {sizes.mixed} requests and a chunk", seconds),
        ("chunk_step_s", "  a chunk alone", seconds),
        ("decode_step_s", "  the requests alone", seconds),
        ("mixed_over_parts", "  over both", ratio),
    ):
        if report.get(field):
            row(name, report[field], form)
    for field, name in (("p50", f"between tokens of {sizes.streams} streams, p50"), ("p99", "  p99"), ("decode_only", "  alone")):
        if "itl_s" in report:
            row(name, {system: values[field] for system, values in report["itl_s"].items()}, seconds)
    if report["worst_step_after_ready_over_median"]:
        row("worst step of a fresh engine, over the median", report["worst_step_after_ready_over_median"], ratio)
        for kind in next(iter(report["steps_by_kind"].values())):
            of_kind = {system: kinds[kind] for system, kinds in report["steps_by_kind"].items() if kind in kinds}
            row(f"  {kind}, worst / median", of_kind, lambda one: f"{seconds(one['worst_s'])} / {seconds(one['median_s'])}")
    Console(width=None if sys.stdout.isatty() else 130).print(table)


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def ratio(value: float) -> str:
    return f"{value:.2f} x"


if __name__ == "__main__":
    main()

"""Requests that arrive at random at a real server: full attention and ours, the same arrivals, over HTTP as users send them.

    python benchmarks/arrivals.py                                          # nano, on a quiet machine
    python benchmarks/arrivals.py --model llama-3.1-8b --input-len 8192 --output-len 1024 --rates 1,2 --num-prompts 24 \\
        --device cuda                                                      # what follows is the server's

A name of a public model's shape stands for random weights in that shape, with a random retrieval head and one word a token; what
such a head chooses means nothing, what it costs does. Each system has a server of its own, started with `specontext serve`, one
after the other; `specontext bench serve` sends Poisson arrivals at each rate after a few warm ones, with the same seed and so
with the same prompts and gaps for both. A table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from measure import machine, versions
from rich.console import Console
from rich.table import Table
from serving import COMMAND, last_json, server

from specontext.evaluation.paper.shapes import config_of, word_tokenizer
from specontext.locations import OWN_HEAD
from specontext.memory.presets import PRESETS
from specontext.model_shape import ModelShape
from specontext.retrieval.checkpoint import save_head
from specontext.retrieval.random_head import random_head

SHOWN = {
    "output_throughput": "tokens/s",
    "median_ttft_ms": "first token, ms",
    "p99_ttft_ms": "p99",
    "median_tpot_ms": "a token, ms",
    "p99_tpot_ms": "p99 ",
    "duration": "all, s",
}


def main(words: Sequence[str] | None = None) -> None:
    options, engine = parse(words)
    rows = []
    with served(options.model) as (model, others):
        for system in options.systems.split(","):
            asked = [model, "--method", system, *others, *engine]
            with server(asked) as (url, _, ready):
                print(f"{system}: ready after {ready:.0f} s", file=sys.stderr, flush=True)
                rows += [{"system": system, "ready_s": ready} | run for run in loads(url, options)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = {"benchmark": "arrivals", "date": date.today().isoformat(), "machine": machine(device), "versions": versions()}
    show(rows)
    print(json.dumps(report | vars(options) | {"engine": engine, "rows": rows}), flush=True)


def parse(words: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the others, which are the server's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--systems", default="full,speculative", help="methods, with commas")
    parser.add_argument("--rates", default="2,8", help="requests a second, with commas; inf sends all at once")
    parser.add_argument("--num-prompts", type=int, default=24, help="of each rate")
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--num-warmups", type=int, default=4, help="that go before those of each rate")
    return parser.parse_known_args(words)


@contextmanager
def served(model: str) -> Iterator[tuple[str, list[str]]]:
    """What the server is to load, and with which options: a checkpoint as it is, a shape as one without weights."""
    if model not in PRESETS:
        yield model, []
        return
    with tempfile.TemporaryDirectory(prefix="specontext-arrivals-") as name:
        config = config_of(model)
        config.save_pretrained(name)
        word_tokenizer(config.vocab_size).save_pretrained(name)
        save_head(random_head(ModelShape.from_config(config, torch.bfloat16)), Path(name, OWN_HEAD), torch.bfloat16)
        yield name, ["--load-format", "dummy", "--served-model-name", model]


def loads(url: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What a server does at each rate."""
    for number, rate in enumerate(options.rates.split(",")):
        sizes = ["--input-len", str(options.input_len), "--output-len", str(options.output_len)]
        many = ["--num-prompts", str(options.num_prompts), "--num-warmups", str(options.num_warmups), "--seed", str(number)]
        yield {"rate": float(rate)} | last_json(
            [*COMMAND, "bench", "serve", "--base-url", url, "--request-rate", rate, *sizes, *many]
        )


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(box=None)
    for name in ("system", "a second", "done", *SHOWN.values()):
        table.add_column(name, justify="left" if name == "system" else "right", no_wrap=True)
    for row in rows:
        numbers = (f"{row[name]:,.1f}" if row[name] is not None else "" for name in SHOWN)
        table.add_row(row["system"], f"{row['rate']:g}", str(row["completed"]), *numbers)
    Console(file=sys.stdout, soft_wrap=True, highlight=False).print(table)


if __name__ == "__main__":
    main()

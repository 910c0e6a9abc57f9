"""What choosing tokens costs a decode step, from token to token: greedy, and as models recommend that they are sampled.

    python benchmarks/sampling.py                                                          # a CPU, a tiny shape
    python benchmarks/sampling.py --device cuda --model llama-3.1-8b --requests 1,32 --context 8192

The engine's own loop (`evaluation/paper/loop.py`), captured and compiled on a GPU, with our method. Each way of sampling is timed
as it is, and once more with PyTorch's operations instead of our kernels, which sort; on a CPU the two are the same. Weights are
random, and the output layer's are scaled so that logits spread as `--spread` says: little leaves nearly all tokens as candidates.
A table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import date
from typing import Any
from unittest.mock import patch

import specontext  # noqa: F401  # isort: skip  # before torch: it says how torch's threads wait
import torch
from measure import machine, versions
from rich.console import Console
from rich.table import Table

from specontext.engine import sampler
from specontext.evaluation.paper.loop import OURS, looping, mean_step
from specontext.evaluation.paper.shapes import DTYPES, TINY, random_model, word_tokenizer
from specontext.kernels.dispatch import reference_of
from specontext.models.loading import LoadedModel

WARM_UP = 6
EVERYTHING = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}  # is a candidate
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {"temperature": 1.0},
    "0.6, top-p 0.95": {"temperature": 0.6, "top_p": 0.95},  # R1-Distill's
    "0.6, top-k 20, top-p 0.95": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},  # Qwen3's
    "1, min-p 0.05": {"temperature": 1.0, "min_p": 0.05},
}


def main(words: Sequence[str] | None = None) -> None:
    options = parse(words)
    device = torch.device(options.device)
    loaded = model_of(options, device)
    rows = [row for word in options.requests.split(",") for row in measured(loaded, options, int(word))]
    for row in rows:
        greedy = next(one for one in rows if one["requests"] == row["requests"])
        row |= {"over_greedy": row["step_s"] / greedy["step_s"], "pytorch_over_greedy": row["pytorch_s"] / greedy["step_s"]}
    show(rows)
    report = {"benchmark": "sampling", "date": date.today().isoformat(), "machine": machine(device), "versions": versions()}
    print(json.dumps(report | vars(options) | {"rows": rows}), flush=True)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="qwen3-0.6b", help="a public model's shape; on a CPU tiny, but for its vocabulary")
    parser.add_argument("--requests", default="1,4", help="with commas")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--budget", type=int, default=None, help="default: 2048, on a CPU 64")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--spread", type=float, default=4.0, help="standard deviation of the logits")
    options = parser.parse_args(words)
    options.budget = options.budget or (2048 if options.device.startswith("cuda") else 64)
    return options


def model_of(options: argparse.Namespace, device: torch.device) -> LoadedModel:
    tiny = device.type == "cpu"
    changes: dict[str, Any] = {name: value for name, value in TINY.items() if name != "vocab_size"} if tiny else {}
    loaded = random_model(options.model, DTYPES["float32" if tiny else "bfloat16"], device, **changes)
    weight = loaded.model.get_output_embeddings().weight  # [V, hidden]; what it multiplies was normalised
    with torch.no_grad():
        weight.mul_(options.spread / (weight.float().std().item() * weight.shape[1] ** 0.5))
    return replace(loaded, tokenizer=word_tokenizer(loaded.shape.vocab_size))


def measured(loaded: LoadedModel, options: argparse.Namespace, requests: int) -> list[dict[str, Any]]:
    """Seconds of a step of the engine's loop by the way of sampling: one engine, whose requests change their ways."""
    rows = []
    shape = {"requests": requests, "context": options.context, "budget": options.budget}
    room = 2 * len(WAYS) * (WARM_UP + options.steps + 1) + 2
    with looping(loaded, OURS, **shape, away=0, overlap=0.85, room=room) as loop:
        for name, sampling in WAYS.items():
            loop.sample_as(**EVERYTHING | sampling)
            ours = mean_step(loop, warm_up=WARM_UP, steps=options.steps)
            with by_pytorch():
                theirs = mean_step(loop, warm_up=WARM_UP, steps=options.steps)
            rows.append({"requests": requests, "sampling": name, "step_s": ours, "pytorch_s": theirs})
            print(f"{requests} requests, {name}: {1e3 * ours:.3f} ms, by PyTorch {1e3 * theirs:.3f}", file=sys.stderr, flush=True)
    return rows


@contextmanager
def by_pytorch() -> Iterator[None]:
    """Tokens are chosen by the references."""
    with ExitStack() as stack:
        for name in ("best_tokens", "draw_tokens"):
            stack.enter_context(patch.object(sampler, name, reference_of(getattr(sampler, name))))
        yield


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(box=None)
    for name in ("requests", "sampling", "step, ms", "x greedy", "by PyTorch, ms", "x greedy "):
        table.add_column(name, justify="left" if name == "sampling" else "right", no_wrap=True)
    for row in rows:
        numbers = (1e3 * row["step_s"], row["over_greedy"], 1e3 * row["pytorch_s"], row["pytorch_over_greedy"])
        table.add_row(str(row["requests"]), row["sampling"], *(f"{number:.3f}" for number in numbers))
    Console(file=sys.stdout, width=100, soft_wrap=True, highlight=False).print(table)


if __name__ == "__main__":
    main()

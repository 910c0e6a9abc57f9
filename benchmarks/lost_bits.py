"""What fewer bits lose: next-token distributions of an engine with them beside those of the same engine without.

Usage: python benchmarks/lost_bits.py MODEL --with kv_cache_dtype=int8 --with quantization=int4 [--text FILE] [--lengths 2048]
       [--limit 4] [--compare 128] [--budgets 256,512] [--methods full,speculative] [--set offload_layers=-1] [--json FILE]

Windows of text are computed up to their last tokens, which are forced and decoded one by one, with each method and budget; every
engine sees the same. An engine with fewer bits (`--with`, settings of EngineConfig joined by commas) is compared with the one
without (`--set` counts for both) at the same method and budget, over all compared positions:

  ratio     perplexity of the text over that of the engine without
  +-        half of the ratio's 95 % interval, over windows
  KL        KL(without || with) in nats
  agree     share of positions with the same most likely token
  recall    with --measure-recall: share of the true attention that the selection covers, without and with

Of formats that there are not yet, `--with simulate=NAME` (several joined by +) rounds as they would; see simulated_bits.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import specontext  # noqa: F401  # isort: skip  # before torch: it says how torch's threads wait
import torch
from measure import machine, versions
from simulated_bits import simulated
from torch import Tensor

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.distill.fidelity import measures
from specontext.evaluation.windows import Text, Window

Choice = tuple[str, int | None]  # method and budget
Rows = list[list[Tensor]]  # of a window its logits [V] at the compared positions


def main() -> None:
    arguments = parse()
    choices: list[Choice] = [
        (method, budget)
        for method in arguments.methods.split(",")
        for budget in ([None] if method == "full" else [int(number) for number in arguments.budgets.split(",")])
    ]
    shared = settings_of(arguments.set) | {"measure_recall": arguments.measure_recall}
    results: list[dict[str, Any]] = []
    for length in map(int, arguments.lengths.split(",")):
        llm = open_engine(arguments, choices, length, shared)
        windows = windows_of(llm, arguments, length)
        without = {choice: decoded(llm, windows, choice) for choice in choices}
        del llm
        for name in arguments.with_:
            gc.collect()
            settings = settings_of(name)
            names = settings.pop("simulate", "").split("+")
            llm = open_engine(arguments, choices, length, shared | settings)
            for choice in choices:
                began = time.perf_counter()
                with simulated(names):
                    rows, recall = decoded(llm, windows, choice)
                found = compared(windows, without[choice][0], rows)
                results.append(
                    {"length": length, "windows": len(windows), "method": choice[0], "budget": choice[1], "with": name, **found}
                    | ({"recall_without": without[choice][1], "recall": recall} if arguments.measure_recall else {})
                )
                show(results[-1], time.perf_counter() - began)
            del llm
    about = {
        "command": "python " + " ".join(sys.argv),
        "date": date.today().isoformat(),
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--with", dest="with_", action="append", required=True, metavar="SETTING=VALUE,...")
    parser.add_argument("--set", default="", metavar="SETTING=VALUE,...")
    parser.add_argument("--text", action="append", help="a text, JSONL file or directory, or 'tasks'; repeatable")
    parser.add_argument("--lengths", default="2048")
    parser.add_argument("--limit", type=int, default=4, help="windows of each text and length")
    parser.add_argument("--compare", type=int, default=128, help="last tokens of a window that are compared at")
    parser.add_argument("--methods", default="full,speculative")
    parser.add_argument("--budgets", default="256,512")
    parser.add_argument("--measure-recall", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def settings_of(words: str) -> dict[str, Any]:
    """Settings of 'name=value,name=value'; whole numbers and booleans are such."""
    pairs = (pair.split("=", 1) for pair in words.split(",") if pair)
    return {
        name: json.loads(value) if value.lstrip("-").isdigit() or value in ("true", "false") else value for name, value in pairs
    }


def open_engine(arguments: argparse.Namespace, choices: list[Choice], length: int, settings: dict[str, Any]) -> LLM:
    budgets = [budget for _, budget in choices if budget is not None]
    methods = list(dict.fromkeys(method for method, _ in choices))
    settings = {"max_model_len": length + 16, "max_num_seqs": 8, "offload_layers": 0} | settings
    layers = settings.pop("offload_layers")
    config = SpeContextConfig(methods[-1], budget=max(budgets, default=None), offload_layers=layers)
    return LLM(arguments.model, config=config, methods=methods, **settings)


def windows_of(llm: LLM, arguments: argparse.Namespace, length: int) -> list[Window]:
    texts = [Text(spec, llm.tokenizer, seed=0, vocab_size=llm.shape.vocab_size) for spec in arguments.text or ["tasks"]]
    compared = min(arguments.compare, length // 2)
    return [window for text in texts for window in text.windows(length, arguments.limit, compared)]


def decoded(llm: LLM, windows: list[Window], choice: Choice) -> tuple[Rows, float | None]:
    """Logits at the compared positions of all windows, in 16 bits, and mean recall."""
    method, budget = choice
    rows: Rows = [[] for _ in windows]
    seen = [-1] * len(windows)  # the first logits are the prompt's

    def see(window: int, logits: Tensor) -> None:
        position = seen[window]
        seen[window] += 1
        if position >= 0 and windows[window].wanted[position]:
            rows[window].append(logits.to(llm.shape.dtype, copy=True))

    generations = []
    for number, window in enumerate(windows):
        forced = window.token_ids[len(window.prompt) :]
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=len(forced), method=method, budget=budget)
        see_one = partial(see, number)
        generations.append(llm.engine.add_request(f"w{number}", window.prompt, params, forced=forced, on_logits=see_one))
    while not all(generation.finished for generation in generations):
        llm.engine.step()
    recalls = [generation.stats.as_dict().get("attention_recall") for generation in generations if generation.stats is not None]
    known = [recall for recall in recalls if recall is not None]
    return rows, sum(known) / len(known) if known else None


def compared(windows: list[Window], without: Rows, rows: Rows) -> dict[str, float]:
    """The table's numbers of one engine and choice."""
    each = []
    for window, before, after in zip(windows, without, rows, strict=True):
        last = window.token_ids[-len(window.wanted) :]
        targets = torch.tensor([token for token, wanted in zip(last, window.wanted, strict=True) if wanted])
        full, logits = torch.stack(before).float(), torch.stack(after).float()
        of_full, of_logits = measures(full, full, targets), measures(full, logits, targets)
        same, divergence, entropy = of_logits.T
        each.append(torch.stack((same.mean(), divergence.mean(), (entropy - of_full[:, 2]).mean(), of_full[:, 2].mean())))
    numbers = torch.stack(each)
    same, divergence, more, entropy = numbers.mean(0).tolist()
    spread = 1.96 * float(numbers[:, 2].std()) / math.sqrt(len(numbers)) if len(numbers) > 1 else math.nan
    ratio = math.exp(more)
    return {"perplexity": math.exp(entropy), "ratio": ratio, "interval": ratio * spread, "kl": divergence, "agreement": same}


def show(result: dict[str, Any], seconds: float) -> None:
    budget = "all" if result["budget"] is None else result["budget"]
    recall = f"  recall {result['recall_without']:.4f} {result['recall']:.4f}" if result.get("recall") is not None else ""
    print(
        f"{result['with']:<28} {result['length']:>6} {result['method']:<12} {budget:>5}  perplexity {result['perplexity']:8.3f}  "
        f"ratio {result['ratio']:.4f} +-{result['interval']:.4f}  KL {result['kl']:.5f}  agree {result['agreement']:.4f}{recall}"
        f"  ({seconds:.0f} s)",
        flush=True,
    )


if __name__ == "__main__":
    main()

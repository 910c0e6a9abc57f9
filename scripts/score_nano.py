"""Score `nano` on fresh problems with every method, through the engine.

Usage: python scripts/score_nano.py OUT.json [--model nano] [--problems 25] [--length 4096] [--budgets 256,512] [--seed 1000]

Retrieval and tracking are scored at `--length`; the long-reasoning task at lengths whose outputs have some 700 and 1,400
tokens. Prints a table and writes every number, with the command and the versions, to OUT.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from datetime import date
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from specontext import LLM, SpeContextConfig
from specontext.evaluation.solve import solve, summarize
from specontext.evaluation.token_counter import token_counter
from specontext.tasks import TASKS, sample_problems

PROGRAM_LENGTHS = (1024, 2048)


def settings(methods: list[str], budgets: list[int]) -> list[tuple[str, int | None]]:
    """Methods with each budget; `full` has none."""
    return [(m, b) for m in methods for b in ([None] if m == "full" else budgets)]


def score(arguments: argparse.Namespace) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    count_tokens = token_counter(arguments.model)
    for method, budget in settings(arguments.methods.split(","), [int(b) for b in arguments.budgets.split(",")]):
        config = SpeContextConfig(method=method, budget=budget, offload_layers=0 if method == "full" else -1)
        llm = LLM(arguments.model, config=config, measure_recall=arguments.measure_recall)
        for task in arguments.tasks.split(","):
            for length in PROGRAM_LENGTHS if task == "program" else (arguments.length,):
                problems = sample_problems(
                    task, length=length, seed=arguments.seed, n=arguments.problems, count_tokens=count_tokens
                )
                began = time.perf_counter()
                summary = summarize(solve(llm, problems))
                row: dict[str, object] = {
                    "task": task,
                    "length": length,
                    "method": method,
                    "budget": budget,
                    "n": summary.problems,
                }
                row |= {"exact_match": summary.exact_match, "correct_steps": summary.correct_steps}
                row |= {"output_tokens": summary.completion_tokens, **summary.stats}
                rows.append(row | {"seconds": round(time.perf_counter() - began, 2)})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def show(rows: list[dict[str, object]]) -> None:
    table = Table(title="nano")
    columns = ("task", "length", "method", "budget", "n", "exact_match", "correct_steps", "tokens_read_per_step", "overlap")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v := row[c], float) else "" if v is None else str(v) for c in columns))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--methods", default="full,speculative,streaming,random")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--budgets", default="256,512")
    parser.add_argument("--problems", type=int, default=25)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--measure-recall", action="store_true")
    arguments = parser.parse_args()
    rows = score(arguments)
    show(rows)
    report = {
        "command": f"python scripts/score_nano.py {' '.join(sys.argv[1:])}",
        "date": date.today().isoformat(),
        "machine": f"{torch.get_num_threads()} CPU threads, {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

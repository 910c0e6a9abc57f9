"""Print the tables of README.md and docs/nano.md from the raw scores, so that no number is typed by hand.

Usage: python scripts/nano_tables.py [benchmarks/results/nano-scores.json ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from specontext.cli.terminal import human_bytes

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
NEEDLES = ("niah_single", "niah_multikey", "niah_multiquery", "niah_multivalue")
ORDER = ("full", "speculative", "oracle", "streaming", "random")
Row = dict[str, Any]


def read(paths: list[Path]) -> dict[tuple[str, int | None], list[Row]]:
    """Rows by method and budget."""
    columns: dict[tuple[str, int | None], list[Row]] = {}
    for path in paths:
        for row in json.loads(path.read_text())["rows"]:
            columns.setdefault((row["method"], row["budget"]), []).append(row)
    return dict(sorted(columns.items(), key=lambda column: (ORDER.index(column[0][0]), -(column[0][1] or 0))))


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def of_task(rows: list[Row], *tasks: str, length: int | None = None) -> list[Row]:
    return [row for row in rows if row["task"] in tasks and length in (None, row["length"])]


def mean(rows: list[Row], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def per_method(columns: dict[tuple[str, int | None], list[Row]]) -> str:
    """The README's table: a row for each method and budget."""
    lines = [
        "| method | budget | retrieval | tracking | long reasoning, right steps | entries read a step | moved a step "
        "| choosing read | dense attention would read |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (method, budget), rows in columns.items():
        needles, tracking = of_task(rows, *NEEDLES), of_task(rows, "variable_tracking")
        programs = of_task(rows, "program")
        shortest = [row for row in programs if row["length"] == min(r["length"] for r in programs)]
        sizes = [human_bytes(mean(needles, f"{name}_per_step")) for name in ("bytes_loaded", "selection_bytes", "bytes_full")]
        cells = [method, "all" if budget is None else f"{budget:,}", percent(mean(needles, "exact_match"))]
        cells += [percent(mean(tracking, "exact_match")), percent(mean(shortest, "correct_steps"))]
        cells += [f"{mean(needles, 'tokens_read_per_step'):,.0f}", *sizes]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def per_task(columns: dict[tuple[str, int | None], list[Row]]) -> str:
    """The table of docs/nano.md: a row for each task and length."""
    names = [method if budget is None else f"{method} {budget:,}" for method, budget in columns]
    lines = [f"| task | length | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    first = next(iter(columns.values()))
    for task, length in ((row["task"], row["length"]) for row in first):
        cells = []
        for rows in columns.values():
            found = of_task(rows, task, length=length)
            text = percent(mean(found, "exact_match")) if found else ""
            if found and found[0]["correct_steps"] is not None:
                text += f" ({percent(mean(found, 'correct_steps'))} of steps)"
            cells.append(text)
        lines.append(f"| `{task}` | {length:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    paths = [Path(argument) for argument in sys.argv[1:]] or [RESULTS / "nano-scores.json", RESULTS / "nano-scores-256.json"]
    columns = read(paths)
    print(per_method(columns), end="\n\n")
    print(per_task(columns))


if __name__ == "__main__":
    main()

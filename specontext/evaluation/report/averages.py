"""Means over the tasks of a suite, every task with the same weight.

Intervals: tasks are independent of each other, so the half-widths of their intervals add in quadrature, each side for itself.
Means of other sets of tasks cannot be compared. So a mean is made of all tasks that any method has at a length, or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from specontext.evaluation.report.results import MEASURED, PAIRED, Row, unique

# A number and the bounds of its interval.
SCORE = ("score", "ci_low", "ci_high")
DIFFERENCE = ("difference", "ci_low", "ci_high")
FURTHER = (
    ("scores.kl_divergence", "scores.kl_low", "scores.kl_high"),
    ("scores.perplexity_ratio", "scores.ratio_low", "scores.ratio_high"),
)
PREFIX = "differences."
Triple = tuple[str, str, str]

Cell = tuple[str, float | None, float | None]  # method, budget, length


def mean_over_tasks(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Means of one suite's rows.

    Returns:
        a row for each cell that has all tasks of its length, with `task` None and the number of `tasks`; and, without
        numbers but with the tasks that are `missing`, one for each cell that has not.
    """
    wanted: dict[float | None, list[str]] = {}
    cells: dict[Cell, dict[str, Row]] = {}
    for row in rows:
        if row["score"] is not None:
            wanted.setdefault(row["length"], [])
            if row["task"] not in wanted[row["length"]]:
                wanted[row["length"]].append(row["task"])
        found = cells.setdefault((row["method"], row["budget"], row["length"]), {})
        if row["score"] is not None:
            found[row["task"]] = row
    whole, partial = [], []
    for (method, budget, length), found in cells.items():
        tasks = wanted.get(length, [])
        cell: Row = {"method": method, "budget": budget, "length": length, "task": None, "tasks": len(tasks)}
        missing = [task for task in tasks if task not in found]
        if missing or not tasks:
            partial.append(cell | {"missing": missing})
        else:
            some = [found[task] for task in tasks]
            triples = [SCORE, *(triple for triple in FURTHER if all(triple[0] in row for row in some))]
            whole.append(cell | _means(some, triples, MEASURED))
    return whole, partial


def mean_pairs(pairs: Sequence[Row]) -> list[Row]:
    """Mean differences of one suite over all tasks of a length; pairs that lack a task are left out."""
    wanted: dict[float | None, set[str]] = {}
    cells: dict[tuple[Any, ...], dict[str, Row]] = {}
    for pair in pairs:
        if pair["difference"] is not None:
            wanted.setdefault(pair["length"], set()).add(pair["task"])
            cells.setdefault((pair["method"], pair["other"], pair["budget"], pair["length"]), {})[pair["task"]] = pair
    made = []
    for (method, other, budget, length), found in cells.items():
        if set(found) == wanted[length]:
            cell: Row = {"method": method, "other": other, "budget": budget, "length": length, "task": None, "tasks": len(found)}
            made.append(cell | _means(list(found.values()), [DIFFERENCE, *further_differences(found.values())], PAIRED))
    return made


def further_differences(pairs: Iterable[Row]) -> list[Triple]:
    """The keys of what pairs compare beside their score."""
    means = unique(key for pair in pairs for key in pair if key.startswith(PREFIX) and key.endswith(".mean"))
    return [(mean, f"{mean.removesuffix('mean')}low", f"{mean.removesuffix('mean')}high") for mean in means]


def seen_from(method: str, pairs: Sequence[Row]) -> list[Row]:
    """The pairs of a method, as the method minus the other one whichever way round they were recorded; each comparison once."""
    turned = []
    for pair in pairs:
        if pair["method"] == method:
            turned.append(pair)
        elif pair["other"] == method:
            other_way = pair | {"method": method, "other": pair["method"]}
            for mean, low, high in (DIFFERENCE, *further_differences([pair])):
                bounds = {low: _negative(pair[high]), high: _negative(pair[low])}
                other_way |= {mean: _negative(pair[mean])} | bounds
            turned.append(other_way)
    once = {(pair.get("suite"), pair["task"], pair["other"], pair["budget"], pair["length"]): pair for pair in reversed(turned)}
    return list(once.values())[::-1]


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def _means(rows: Sequence[Row], triples: Sequence[Triple], names: Sequence[str]) -> Row:
    """Means where all rows have a value; of the bounds of intervals what the module's text says."""
    made: Row = {"n": sum(row["n"] or 0 for row in rows) or None, "least_n": min((row["n"] or 0 for row in rows), default=0)}
    for name in unique([*names, *(name for triple in triples for name in triple)]):
        values: list[Any] = [row.get(name) for row in rows]
        made[name] = None if None in values else sum(values) / len(values)
    for centre, low, high in triples:
        for name, sign in ((low, -1), (high, 1)):
            if made[name] is not None:
                squares = sum((row[name] - row[centre]) ** 2 for row in rows)
                made[name] = made[centre] + sign * math.sqrt(squares) / len(rows)
    return made

"""The tables of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from specontext.evaluation.report.numbers import DASH, anything, duration, interval, percent, points, size, whole
from specontext.evaluation.report.parts import Table, without_empty
from specontext.evaluation.report.pictures import pareto_front
from specontext.evaluation.report.results import Row, extra_columns, ordered, unique
from specontext.evaluation.report.statements import verdict_of
from specontext.retrieval.registry import FULL

Shown = Callable[[Row], str]

COLUMNS: dict[str, Shown] = {
    "score": lambda row: percent(row["score"]),
    "95 % interval": lambda row: interval(row["ci_low"], row["ci_high"]),
    "n": lambda row: whole(row["n"]),
    "tokens read": lambda row: whole(row["tokens_read"]),
    "selection bytes / step": lambda row: size(row["selection_bytes"]),
    "selection time / step": lambda row: duration(row["selection_seconds"]),
    "bytes loaded / step": lambda row: size(row["bytes_loaded"]),
    "overlap": lambda row: percent(row["overlap"]),
    "attention recall": lambda row: percent(row["attention_recall"]),
    "output tokens": lambda row: f"{row['output_tokens']:,.1f}" if row["output_tokens"] is not None else DASH,
    "time to answer": lambda row: duration(row["answer_seconds"]),
    "wall time / problem": lambda row: duration(row["seconds"]),
}
PLACE: dict[str, Shown] = {
    "method": lambda row: row["method"],
    "length": lambda row: whole(row["length"]),
    "budget": lambda row: whole(row["budget"]),
}


def sorted_rows(rows: Sequence[Row], methods: Sequence[str]) -> list[Row]:
    """By length, then method in the report's order, then budget."""
    rank = {method: number for number, method in enumerate(methods)}
    return sorted(rows, key=lambda row: (row["length"] or 0, rank[row["method"]], row["budget"] or 0))


def measured_table(title: str, rows: Sequence[Row], methods: Sequence[str], *, front: bool = False) -> Table:
    """Everything that was measured, also columns that only these rows have.

    Args:
        front: mark the cells of the Pareto front of each length.
    """
    rows = sorted_rows(rows, methods)
    shown = (
        PLACE
        | COLUMNS
        | {name.removeprefix("scores."): _extra(name) for name in extra_columns(rows) if name not in ("tasks", "least_n")}
    )
    if front:
        best = [id(cell) for length in ordered(row["length"] for row in rows) for cell in _front(rows, length)]
        shown |= {"on the front": lambda row: "yes" if id(row) in best else DASH}
    body = [[show(row) for show in shown.values()] for row in rows]
    columns, body = without_empty(list(shown), body, keep=1, empty=DASH)
    emphasis = tuple((number, "reference") for number, row in enumerate(rows) if row["method"] == FULL)
    names = sum(name in columns for name in PLACE)
    return Table(title, tuple(columns), tuple(map(tuple, body)), names, emphasis)


def _front(rows: Sequence[Row], length: float | None) -> list[Row]:
    return pareto_front([row for row in rows if row["length"] == length])


def _extra(name: str) -> Shown:
    return lambda row: anything(row.get(name))


def score_table(title: str, rows: Sequence[Row], methods: Sequence[str]) -> Table:
    """Scores at a glance: a row for each method, budget and length, a column for each task."""
    tasks = unique(row["task"] for row in rows)
    cells: dict[tuple[Any, ...], Row] = {}
    scores: dict[tuple[Any, ...], str] = {}
    for row in sorted_rows(rows, methods):
        key = (row["method"], row["length"], row["budget"])
        cells.setdefault(key, row)
        scores[(*key, row["task"])] = percent(row["score"])
    body = [
        [*(show(cell) for show in PLACE.values()), *(scores.get((*key, task), "not run") for task in tasks)]
        for key, cell in cells.items()
    ]
    columns, body = without_empty([*PLACE, *tasks], body, keep=1, empty=DASH)
    emphasis = tuple((number, "reference") for number, cell in enumerate(cells.values()) if cell["method"] == FULL)
    names = sum(name in columns for name in PLACE)
    return Table(title, tuple(columns), tuple(map(tuple, body)), names, emphasis)


def pair_table(title: str, pairs: Sequence[Row]) -> Table:
    """Paired differences; those whose interval does not hold zero stand out."""
    words = {"below": "worse", "above": "better", "around": "no difference shown", None: DASH}
    shown: dict[str, Shown] = {
        "task": lambda pair: pair["task"] or "mean over tasks",
        "comparison": lambda pair: f"{pair['method']} − {pair['other']}",
        "length": lambda pair: whole(pair["length"]),
        "budget": lambda pair: whole(pair["budget"]),
        "difference in points": lambda pair: points(pair["difference"]),
        "95 % interval": lambda pair: interval(pair["ci_low"], pair["ci_high"], points),
        "n": lambda pair: whole(pair["n"]),
        "verdict": lambda pair: words[verdict_of(pair)],
    }
    body = [[show(pair) for show in shown.values()] for pair in pairs]
    columns, body = without_empty(list(shown), body, keep=2, empty=DASH)
    kinds = {"below": "worse", "above": "better"}
    emphasis = tuple((number, kinds[v]) for number, pair in enumerate(pairs) if (v := verdict_of(pair)) in kinds)
    return Table(title, tuple(columns), tuple(map(tuple, body)), 2, emphasis)


def record_table(title: str, records: Sequence[Any]) -> Table:
    """Records of any shape, such as what was skipped: a column for every key; texts alone are one column."""
    rows = [record if isinstance(record, dict) else {"what": record} for record in records]
    columns = unique(name for row in rows for name in row)
    body = tuple(tuple(anything(row.get(name)) for name in columns) for row in rows)
    return Table(title, tuple(name.replace("_", " ") for name in columns), body, len(columns))

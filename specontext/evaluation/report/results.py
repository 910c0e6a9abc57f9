"""The rows of an evaluation as a report reads them: checked, complete in their keys, without numbers that are none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from specontext.errors import SpeContextError
from specontext.retrieval.registry import DEFAULT, FULL, bound_of, needs_head

Row = dict[str, Any]

NAMED = ("suite", "task", "method")
CELL = ("budget", "length", "n")
MEASURED = (
    "score",
    "ci_low",
    "ci_high",
    "tokens_read",
    "selection_bytes",
    "selection_seconds",
    "bytes_loaded",
    "overlap",
    "attention_recall",
    "output_tokens",
    "answer_seconds",
    "seconds",
)
PAIRED = ("difference", "ci_low", "ci_high")


class ReportError(SpeContextError, ValueError):
    """A report that cannot be written; the message says what is wrong with what it is made from."""


@dataclass(frozen=True)
class Results:
    """What a report is made from.

    Attributes:
        rows: one for each (suite, task, method, budget, length), with every key of NAMED, CELL and MEASURED and possibly more.
        pairs: paired differences, method minus other.
        selections: what the heads read for one prompt, see `specontext.evaluation.selections`.
    """

    meta: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    pairs: list[Row] = field(default_factory=list)
    selections: dict[str, Any] | None = None

    @property
    def suites(self) -> list[str]:
        return unique(row["suite"] for row in self.rows)

    @property
    def methods(self) -> list[str]:
        """Full attention first, then the others as they come."""
        found = unique(row["method"] for row in self.rows)
        return sorted(found, key=lambda method: method != FULL)

    @property
    def main(self) -> str | None:
        """The method that the report is about: SpeContext's own, or else the first that could stand for full attention."""
        candidates = [method for method in self.methods if method != FULL]
        usable = [method for method in candidates if bound_of(method) is None]
        own = [method for method in usable if needs_head(method)]
        return DEFAULT if DEFAULT in candidates else next(iter(own or usable or candidates), None)

    def of(self, suite: str) -> list[Row]:
        return [row for row in self.rows if row["suite"] == suite]

    def pairs_of(self, suite: str) -> list[Row]:
        return [pair for pair in self.pairs if pair["suite"] == suite]


def read_results(raw: Any, selections: Any = None) -> Results:
    """Check the content of `results.json`.

    Raises:
        ReportError: it is none.
    """
    if not isinstance(raw, Mapping) or not isinstance(raw.get("rows"), list):
        raise ReportError('results.json holds no evaluation: it must be an object with a list "rows"')
    if not isinstance(raw.get("meta") or {}, Mapping) or not isinstance(raw.get("pairs") or [], list):
        raise ReportError('results.json is damaged: "meta" must be an object and "pairs" a list')
    rows = [_row(row, f"row {number}", (*NAMED,), (*CELL, *MEASURED)) for number, row in enumerate(raw["rows"], 1)]
    pairs = [
        _row(pair, f"pair {number}", (*NAMED, "other"), (*CELL, *PAIRED)) for number, pair in enumerate(raw.get("pairs") or [], 1)
    ]
    return Results(dict(raw.get("meta") or {}), rows, pairs, selections)


def _row(raw: Any, which: str, names: tuple[str, ...], numbers: tuple[str, ...]) -> Row:
    if not isinstance(raw, Mapping):
        raise ReportError(f"results.json, {which} is no object")
    row: Row = dict.fromkeys((*names, *numbers)) | flat(raw)
    for name in names:
        if not isinstance(row[name], str):
            raise ReportError(f'results.json, {which} has no "{name}": it must be a text')
    for name in numbers:
        if row[name] is not None and (isinstance(row[name], bool) or not isinstance(row[name], int | float)):
            raise ReportError(f'results.json, {which}: "{name}" must be a number or null, got {row[name]!r}')
    return row


def flat(raw: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested objects as keys with dots; NaN and infinities are None."""
    made: dict[str, Any] = {}
    for name, value in raw.items():
        if isinstance(value, Mapping):
            made |= flat(value, f"{path}{name}.")
        else:
            broken = isinstance(value, float) and not math.isfinite(value)
            made[f"{path}{name}"] = None if broken else value
    return made


def unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def ordered(values: Iterable[float | None]) -> list[Any]:
    """Distinct numbers ascending, None first."""
    return sorted(set(values), key=lambda value: (value is not None, value or 0))


def extra_columns(rows: Iterable[Row]) -> list[str]:
    """Keys that only some suites' rows have, in the order in which they come."""
    known = {*NAMED, *CELL, *MEASURED}
    return unique(name for row in rows for name in row if name not in known)

"""Tables of the suite `fidelity`: every number is relative to full attention, so there are no differences to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

COLUMNS = ("length", "method", "budget", "n", "agreement", "95 %", "KL", "95 %", "perplexity", "ratio", "95 %", "recall", "read")


def fidelity_tables(rows: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """A table for each text."""
    for text in dict.fromkeys(row["task"] for row in rows):
        made = Table(
            title=escape(f"fidelity: {text}"), box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, title_justify="left"
        )
        for column in COLUMNS:
            made.add_column(column, justify="left" if column == "method" else "right", no_wrap=column == "method")
        for row in rows:
            if row["task"] == text:
                made.add_row(*_cells(row))
        yield made


def _cells(row: dict[str, Any]) -> Iterator[str]:
    scores = row["scores"]
    yield f"{row['length']:,}"
    yield escape(row["method"])
    yield "–" if row["budget"] is None else f"{row['budget']:,}"
    yield str(row["n"])
    yield f"{100 * row['score']:.1f}"
    yield _between(row["ci_low"], row["ci_high"], "{:.0f}", 100)
    yield f"{scores['kl_divergence']:.2g}"
    yield _between(scores["kl_low"], scores["kl_high"], "{:.1g}")
    yield f"{scores['perplexity']:.4g}"
    yield f"{scores['perplexity_ratio']:.4g}"
    yield _between(scores["ratio_low"], scores["ratio_high"], "{:.2g}")
    yield f"{100 * row['attention_recall']:.1f}"
    yield f"{row['tokens_read']:,.0f}"


def _between(low: float | None, high: float | None, form: str, scale: float = 1) -> str:
    return "–" if low is None or high is None else f"{form.format(scale * low)}–{form.format(scale * high)}"

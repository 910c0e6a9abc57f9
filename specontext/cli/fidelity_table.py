"""Tables of the suite `fidelity`: every number is relative to full attention, so there are no differences to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

COLUMNS = ("length", "method", "budget", "read", "n", "KL", "95 %", "perplexity ×", "95 %", "agreement", "recall")


def fidelity_tables(rows: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """A table for each text; its last column is the KL of the head's method, if it ran, minus the row's, and what that shows."""
    from specontext.evaluation.report.averages import seen_from
    from specontext.evaluation.report.fidelity import KL, verdict
    from specontext.evaluation.report.numbers import small
    from specontext.evaluation.report.results import read_results

    results = read_results({"rows": list(rows), "pairs": list(pairs)})
    mine = [] if results.main is None else seen_from(results.main, results.pairs)
    found = {(pair["task"], pair["length"], pair["other"], pair["budget"]): pair for pair in mine}
    for text in dict.fromkeys(row["task"] for row in rows):
        made = Table(
            title=escape(f"fidelity: {text}"), box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, title_justify="left"
        )
        for column in (*COLUMNS, *(() if results.main is None else (f"KL of {results.main} minus",))):
            made.add_column(column, justify="left" if column == "method" else "right", no_wrap=column == "method")
        for row in rows:
            if row["task"] == text:
                pair = found.get((text, row["length"], row["method"], row["budget"]), {})
                said = "–" if verdict(pair) is None else f"{small(pair[f'{KL}.mean'], sign=True)} {verdict(pair)}"
                made.add_row(*_cells(row), *(() if results.main is None else (said,)))
        yield made


def _cells(row: dict[str, Any]) -> Iterator[str]:
    scores = row["scores"]
    yield f"{row['length']:,}"
    yield escape(row["method"])
    yield "–" if row["budget"] is None else f"{row['budget']:,}"
    yield f"{row['tokens_read']:,.0f}"
    yield str(row["n"])
    yield f"{scores['kl_divergence']:.2g}"
    yield _between(scores["kl_low"], scores["kl_high"], "{:.2g}")
    yield f"{scores['perplexity_ratio']:.4g}"
    yield _between(scores["ratio_low"], scores["ratio_high"], "{:.3g}")
    yield f"{100 * row['score']:.1f}"
    yield "–" if row["attention_recall"] is None else f"{100 * row['attention_recall']:.1f}"


def _between(low: float | None, high: float | None, form: str) -> str:
    return "–" if low is None or high is None else f"{form.format(low)}–{form.format(high)}"

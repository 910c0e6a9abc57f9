"""The chapter on the suite `continuation`: where what methods write parts from full attention's, and how good it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from specontext.evaluation.report.numbers import DASH, interval, percent, points, small, whole
from specontext.evaluation.report.parts import Fold, Part, Table, without_empty
from specontext.evaluation.report.results import Results, Row, ordered, unique
from specontext.evaluation.report.statements import Statement
from specontext.retrieval.registry import FULL

SUITE = "continuation"
EXPLAINED = (
    "Greedy continuations part at the first token that is chosen differently, and what follows differs for good; so where they "
    "part and how alike they are say little by themselves. Whether a method writes worse is seen in what full attention thinks "
    "of it (log-probability) and in how much it repeats itself, beside full attention's own continuations of the same prompts."
)


def continuation_chapter(results: Results) -> Iterator[Part]:
    """A table for each text and length; nothing where the suite was not run."""
    rows = results.of(SUITE)
    if not rows:
        return
    yield Statement(EXPLAINED, title=SUITE)
    texts = unique(row["task"] for row in rows)
    for text in texts:
        tables = tuple(continuation_tables([row for row in rows if row["task"] == text], results))
        yield from (Fold(f"{SUITE} of {text}", tables),) if len(texts) > 1 else tables


def continuation_tables(rows: Sequence[Row], results: Results) -> Iterator[Table]:
    """One for each length of each text."""
    pairs, rank = results.pairs_of(SUITE), {method: number for number, method in enumerate(results.methods)}
    for text in unique(row["task"] for row in rows):
        for length in ordered(row["length"] for row in rows if row["task"] == text):
            some = [row for row in rows if (row["task"], row["length"]) == (text, length)]
            some.sort(key=lambda row: (row["budget"] or 0, rank[row["method"]]))
            here = [pair for pair in pairs if (pair["task"], pair["length"], pair["other"]) == (text, length, FULL)]
            yield _table(f"{SUITE}: {text}, prompt and continuation {whole(length)} tokens", some, here)


def _table(title: str, rows: Sequence[Row], pairs: Sequence[Row]) -> Table:
    found = {(pair["method"], pair["budget"]): pair for pair in pairs}

    def beside_full(name: str, form: Callable[[float], str]) -> Callable[[Row], str]:
        def show(row: Row) -> str:
            pair, key = found.get((row["method"], row["budget"]), {}), f"differences.{name}"
            mean = pair.get(f"{key}.mean")
            return DASH if mean is None else f"{form(mean)} {interval(pair[f'{key}.low'], pair[f'{key}.high'], form)}"

        return show

    shown: dict[str, Callable[[Row], str]] = {
        "budget": lambda row: whole(row["budget"]),
        "method": lambda row: row["method"],
        "parts after": lambda row: whole(row.get("parting.median")),
        "10 to 90 %": lambda row: interval(row.get("parting.low"), row.get("parting.high"), whole),
        "never parts": lambda row: percent(row.get("parting.never")),
        "alike": lambda row: percent(row["score"]),
        "95 %": lambda row: interval(row["ci_low"], row["ci_high"]),
        "common 4-grams": lambda row: percent(row.get("scores.common_ngrams")),
        "repeated 4-grams": lambda row: percent(row.get("scores.repetition")),
        "minus full's": beside_full("repetition", points),
        "distinct 2-grams": lambda row: percent(row.get("scores.distinct_2")),
        "log-probability": lambda row: small(row.get("scores.log_probability"), digits=3),
        "minus full's ": beside_full("log_probability", _signed),
        "tokens written": lambda row: whole(row.get("scores.tokens_written")),
        "rows read": lambda row: whole(row["tokens_read"]),
        "n": lambda row: whole(row["n"]),
    }
    body = [[show(row) for show in shown.values()] for row in rows]
    columns, body = without_empty(list(shown), body, keep=2, empty=DASH)
    emphasis = [(number, "reference") for number, row in enumerate(rows) if row["method"] == FULL]
    return Table(title, tuple(columns), tuple(map(tuple, body)), 2, tuple(emphasis))


def _signed(value: float) -> str:
    return small(value, digits=2, sign=True)

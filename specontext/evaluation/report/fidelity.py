"""The chapter on the suite `fidelity`: what methods lose against full attention, text by text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from specontext.evaluation.report.averages import mean_over_tasks, mean_pairs, seen_from
from specontext.evaluation.report.numbers import DASH, interval, percent, points, small, whole
from specontext.evaluation.report.parts import Fold, Part, Table, without_empty
from specontext.evaluation.report.results import Results, Row, ordered, unique
from specontext.evaluation.report.statements import Statement
from specontext.retrieval.registry import FULL, bound_of

SUITE = "fidelity"
KL, ENTROPY = "differences.kl_divergence", "differences.cross_entropy"
VERDICTS = {"less": "loses less", "more": "loses more", "same": "no difference shown"}


def fidelity_chapter(results: Results) -> Iterator[Part]:
    """Statement, means over texts and a table for each text and length; nothing where the suite was not run."""
    rows, main = results.of(SUITE), results.main
    if not rows:
        return
    pairs = [] if main is None else seen_from(main, results.pairs_of(SUITE))
    if main is not None:
        yield from _verdicts(main, pairs)
    texts = unique(row["task"] for row in rows)
    lengths = ordered(row["length"] for row in rows)
    if len(texts) > 1:
        means, averages = mean_over_tasks(rows)[0], [] if main is None else seen_from(main, mean_pairs(results.pairs_of(SUITE)))
        for length in lengths:
            where = f"mean over {len(texts)} texts, {whole(length)} tokens"
            yield _table(where, [mean for mean in means if mean["length"] == length], averages, results.methods, main)
    for text in texts:
        tables = [
            _table(f"{text}, {whole(length)} tokens", some, pairs, results.methods, main)
            for length in lengths
            if (some := [row for row in rows if (row["task"], row["length"]) == (text, length)])
        ]
        yield Fold(f"{SUITE}, {text}: what is lost", tuple(tables)) if len(texts) > 1 else tables[0]
        if len(texts) == 1:
            yield from tables[1:]


def verdict(pair: Row) -> str | None:
    """Whether the KL of the pair's method is "less" or "more" than the other's, or the "same" as far as is shown."""
    low, high = pair.get(f"{KL}.low"), pair.get(f"{KL}.high")
    if low is None or high is None:
        return None
    return "less" if high < 0 else "more" if low > 0 else "same"


def _verdicts(main: str, pairs: Sequence[Row]) -> Iterator[Statement]:
    """Against each other method, in how many cells it loses less; cells in which it loses more are named."""
    items, losing = [], []
    for other in unique(pair["other"] for pair in pairs if pair["other"] != FULL):
        mine = [pair for pair in pairs if pair["other"] == other and verdict(pair) is not None]
        if not mine:
            continue
        counts = [f"{words} in {number}" for kind, words in VERDICTS.items() if (number := _count(mine, kind))]
        items.append(f"{other}: {', '.join(counts)} of {len(mine)}")
        losing += [pair for pair in mine if verdict(pair) == "more" and bound_of(other) != "upper"]
    if items:
        said = f"{main} beside each other method, by KL divergence from full attention on the same windows and at equal budgets:"
        yield Statement(said, "answer", tuple(items), SUITE)
    if losing:
        where = tuple(f"than {pair['other']}: {_place(pair)}: {_kl_difference(pair)}" for pair in losing)
        said = f"{main} loses more, the whole 95\u00a0% interval of the difference in KL above zero:"
        yield Statement(said, "worse", where, SUITE)


def _count(pairs: Sequence[Row], kind: str) -> int:
    return sum(verdict(pair) == kind for pair in pairs)


def _place(pair: Row) -> str:
    return f"{pair['task']}, {whole(pair['length'])} tokens, budget {whole(pair['budget'])}"


def _kl_difference(pair: Row) -> str:
    return f"{small(pair[f'{KL}.mean'], sign=True)} {interval(pair[f'{KL}.low'], pair[f'{KL}.high'], _signed)}"


def _signed(value: float) -> str:
    return small(value, sign=True)


def _table(title: str, rows: Sequence[Row], pairs: Sequence[Row], methods: Sequence[str], main: str | None) -> Table:
    """By budget, then method; differences are those of the main method to the row's."""
    rank = {method: number for number, method in enumerate(methods)}
    rows = sorted(rows, key=lambda row: (row["budget"] or 0, rank[row["method"]]))
    found = {(pair["task"], pair["length"], pair["budget"], pair["other"]): pair for pair in pairs}

    def pair_of(row: Row) -> Row:
        return found.get((row["task"], row["length"], row["budget"], row["method"]), {})

    def spread(row: Row, low: str, high: str, shown: Callable[[float], str]) -> str:
        return interval(row.get(low), row.get(high), shown)

    shown: dict[str, Callable[[Row], str]] = {
        "budget": lambda row: whole(row["budget"]),
        "method": lambda row: row["method"],
        "rows read": lambda row: whole(row["tokens_read"]),
        "of context": lambda row: percent(row["tokens_read"] / row["length"]) if row["tokens_read"] and row["length"] else DASH,
        "KL (nats)": lambda row: small(row.get("scores.kl_divergence")),
        "95 %": lambda row: spread(row, "scores.kl_low", "scores.kl_high", small),
        "perplexity × full": lambda row: small(row.get("scores.perplexity_ratio"), digits=4),
        "95 % ": lambda row: spread(row, "scores.ratio_low", "scores.ratio_high", _four),
        "agreement": lambda row: percent(row["score"]),
        "95 %  ": lambda row: spread(row, "ci_low", "ci_high", percent),
        "recall": lambda row: percent(row["attention_recall"]),
        f"KL of {main} minus this": lambda row: _signed(value) if (value := pair_of(row).get(f"{KL}.mean")) is not None else DASH,
        "95 %   ": lambda row: spread(pair_of(row), f"{KL}.low", f"{KL}.high", _signed),
        "log perplexity, minus this": lambda row: spread(pair_of(row), f"{ENTROPY}.low", f"{ENTROPY}.high", _signed),
        "agreement, minus this": lambda row: spread(pair_of(row), "ci_low", "ci_high", points),
        f"{main} beside it": lambda row: VERDICTS.get(verdict(pair_of(row)) or "", DASH) if row["method"] != FULL else DASH,
        "windows": lambda row: whole(row["n"]),
    }
    body = [[show(row) for show in shown.values()] for row in rows]
    columns, body = without_empty(list(shown), body, keep=2, empty=DASH)
    kinds = {"less": "better", "more": "worse"}
    emphasis = [
        (number, "reference") if row["method"] == FULL else (number, kinds[said])
        for number, row in enumerate(rows)
        if row["method"] == FULL or (said := verdict(pair_of(row)) or "") in kinds
    ]
    return Table(title, tuple(columns), tuple(map(tuple, body)), 2, tuple(emphasis))


def _four(value: float) -> str:
    return small(value, digits=4)

"""What the numbers say, in sentences: nothing that their intervals do not support, and nothing left out that speaks against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from specontext.evaluation.report.averages import mean_over_tasks, mean_pairs, seen_from
from specontext.evaluation.report.numbers import interval, listed, percent, points, whole
from specontext.evaluation.report.results import Results, Row, ordered, unique
from specontext.retrieval.registry import FULL, bound_of

SHARE = 8  # the headline's budget is the one nearest to 1/8 of the context
RELATIVE = ("fidelity", "continuation")  # suites in which full attention has 100 % by definition
LEVEL = "95\u00a0% interval"


@dataclass(frozen=True)
class Statement:
    """Sentences for a reader.

    Attributes:
        kind: "answer", "worse" (what speaks against the method), "good" or "plain".
        title: what the sentences are about, such as a suite.
        items: a list below the text.
    """

    text: str
    kind: str = "plain"
    items: tuple[str, ...] = ()
    title: str = ""


def opening(results: Results) -> list[Statement]:
    """What was compared, and for every suite what the answer is."""
    said = [_compared(results)]
    for suite in results.suites:
        said += _answer(results, suite)
        said += _worse(results, suite)
    return said


def _compared(results: Results) -> Statement:
    model = results.meta.get("model") or "The model"
    budgets = [budget for budget in ordered(row["budget"] for row in results.rows) if budget is not None]
    others = [method for method in results.methods if method != FULL]
    parts = []
    for suite in results.suites:
        rows = results.of(suite)
        tasks = unique(row["task"] for row in rows)
        lengths = [length for length in ordered(row["length"] for row in rows) if length is not None]
        counts = [int(n) for n in ordered(row["n"] for row in rows) if n is not None]
        words = f"{_count(len(tasks), 'task')} of the suite “{suite}”"
        if lengths:
            words += f" with contexts of {_range(lengths)} tokens"
        if counts:
            words += f" ({_range(counts)} {'problem' if counts[-1] == 1 else 'problems'} of each)"
        parts.append(words)
    text = f"{model} was given {listed(parts)}."
    if FULL in results.methods:
        text += " With full attention it may look back at everything that it has read for every token that it writes."
    if others:
        reads = f"{_range(budgets)} stored tokens" if budgets else "a part of the stored tokens"
        text += (
            f" With {listed(others)} it reads only {reads} for each attention head and step; the methods differ in which ones."
        )
    return Statement(text + " The question is how much accuracy that costs.")


def _answer(results: Results, suite: str) -> list[Statement]:
    main = results.main
    means, _ = mean_over_tasks(results.of(suite))
    cell = headline(means, main)
    if main is None or cell is None:
        return [Statement(_only(means) or "No method has a score on all tasks.", "answer", title=suite)]
    said = f"{_place(cell, means)}, {main} scores {_score(cell)}{_on_average(cell)}."
    pairs = [pair for pair in seen_from(main, mean_pairs(results.pairs_of(suite))) if _same(pair, cell)]
    full = _full_at(means, cell["length"])
    if full is not None:
        said += _against_full(full, cell, next((pair for pair in pairs if pair["other"] == FULL), None))
    others = _verdicts(pairs)
    if others:
        said += " With the same budget:"
    elif not pairs:
        said += " No paired comparison is recorded for this cell, so nothing is said here about which method is better."
    return [Statement(said, "answer", others, suite)]


def headline(means: Sequence[Row], main: str | None) -> Row | None:
    """The main method's cell that the first sentences speak of: the longest context, the budget nearest to 1/8 of it."""
    cells = [mean for mean in means if mean["method"] == main and mean["score"] is not None]
    if not cells:
        return None
    longest = ordered(cell["length"] for cell in cells)[-1]
    cells = [cell for cell in cells if cell["length"] == longest]
    context = _context(longest, means)
    if context is None:
        return max(cells, key=lambda cell: cell["budget"] or 0)
    return min(cells, key=lambda cell: abs(math.log(SHARE * (cell["budget"] or context) / context)))


def _only(means: Sequence[Row]) -> str | None:
    scored = [mean for mean in means if mean["score"] is not None]
    if not scored:
        return None
    last = scored[-1]
    return f"{last['method']} scores {_score(last)}{_on_average(last)}; no other method was run to compare it with."


def _place(cell: Row, means: Sequence[Row]) -> str:
    context, read = _context(cell["length"], means), cell["tokens_read"] or cell["budget"]
    if read is None:
        return f"At {whole(cell['length'])} tokens" if cell["length"] else "On these data"
    where = f"With {whole(read)}"
    if context:
        about = "about " if cell["length"] is None else ""
        return f"{where} of {about}{whole(context)} tokens read ({percent(min(1.0, read / context))} of the context)"
    return f"{where} tokens read"


def _context(length: float | None, means: Sequence[Row]) -> float | None:
    """Tokens in context: the asked length, or what full attention read."""
    if length is not None:
        return length
    full = _full_at(means, length)
    return full["tokens_read"] if full is not None else None


def _full_at(means: Sequence[Row], length: float | None) -> Row | None:
    found = (mean for mean in means if mean["method"] == FULL and mean["length"] == length and mean["score"] is not None)
    return next(found, None)


def _score(cell: Row) -> str:
    shown = interval(cell["ci_low"], cell["ci_high"])
    return percent(cell["score"]) + ("" if cell["ci_low"] is None or cell["ci_high"] is None else f" ({LEVEL} {shown})")


def _on_average(cell: Row) -> str:
    return f" on average over {cell['tasks']} tasks" if cell["tasks"] > 1 else ""


def _against_full(full: Row, cell: Row, pair: Row | None) -> str:
    reference = full["score"]
    said = f" Full attention scores {percent(reference)}"
    if reference > 0:
        said += f": {cell['method']} keeps {percent(cell['score'] / reference)} of that"
        if pair is not None and None not in (pair["ci_low"], pair["ci_high"]):
            low, high = (1 + pair[end] / reference for end in ("ci_low", "ci_high"))
            said += f" ({LEVEL} {interval(low, high)})"
    said += "."
    if reference <= 0:
        return said + " It solves none of these problems itself, so they cannot tell what reading less costs."
    if pair is None or None in (pair["ci_low"], pair["ci_high"]):
        return said + " The two were not compared problem by problem, so whether they differ is not known."
    low, high = pair["ci_low"], pair["ci_high"]
    if high < 0:
        return said + f" It loses accuracy: the paired difference is {difference(pair)}."
    if low > 0:
        return said + f" It scores higher than full attention: the paired difference is {difference(pair)}."
    if low == high == 0:
        return said + f" The two scored the same on every one of the {whole(pair['n'])} problems; {_unseen(pair)}."
    return said + (
        f" A difference between the two is not shown: it is {difference(pair)}, so a loss of up to {points(-low).lstrip('+')} "
        "points is not ruled out."
    )


def _unseen(pair: Row) -> str:
    """What equal scores on all problems leave open, by the rule of three."""
    n = pair.get("least_n") or pair["n"]
    if not n:
        return "how many problems there were is not recorded"
    return f"with {whole(n)} of a task, differences on up to {percent(min(1.0, 3 / n))} of its problems could still go unseen"


def difference(pair: Row) -> str:
    """`−1.2 points [−2.0, −0.4]`."""
    return f"{points(pair['difference'])} points {interval(pair['ci_low'], pair['ci_high'], points)}"


def _verdicts(pairs: Sequence[Row]) -> tuple[str, ...]:
    """What the paired intervals say of the main method beside each other one."""
    words = {"above": "better than {}", "around": "no difference shown to {}", "below": "worse than {}"}
    said = []
    for verdict, text in words.items():
        for pair in pairs:
            if pair["other"] != FULL and verdict_of(pair) == verdict:
                said.append(f"{text.format(pair['other'])}: {difference(pair)}")
    return tuple(said)


def verdict_of(pair: Row) -> str | None:
    """Where the interval of a difference lies: "below" zero, "above" it or "around" it; None where there is no interval."""
    if pair["ci_low"] is None or pair["ci_high"] is None:
        return None
    return "below" if pair["ci_high"] < 0 else "above" if pair["ci_low"] > 0 else "around"


def _same(pair: Row, cell: Row) -> bool:
    return bool(pair["budget"] == cell["budget"] and pair["length"] == cell["length"])


def _worse(results: Results, suite: str) -> list[Statement]:
    """Every comparison of the main method whose whole interval lies below zero; that there is none is said, too."""
    main = results.main
    if main is None:
        return []
    mine = [pair for pair in seen_from(main, results.pairs_of(suite)) if verdict_of(pair) is not None]
    if suite in RELATIVE:
        mine = [pair for pair in mine if pair["other"] != FULL]
    if not mine:
        return []
    several = len(unique(pair["task"] for pair in mine)) > 1
    means = [pair for pair in seen_from(main, mean_pairs(mine)) if verdict_of(pair) is not None] if several else []
    losing = [pair for pair in (*means, *mine) if verdict_of(pair) == "below"]
    compared = f"{_count(len(mine), 'comparison')} of {main} with another method on one task"
    if several:
        compared += f", and {_count(len(means), 'comparison')} of means over tasks"
    if not losing:
        said = f"In none of {compared}, does the {LEVEL} of the difference lie below zero."
        return [Statement(said if several else said.replace(",", ""), "good", title=suite)]
    chance = 0.025 * len(mine)
    said = f"{main} is worse, its whole {LEVEL} of the difference below zero, in {len(losing)} of {compared}"
    said += f" (by chance alone some {chance:.0f} of those on one task would be):" if chance >= 1.5 else ":"
    return [Statement(said, "worse", tuple(_losing(pair) for pair in sorted(losing, key=_weight)), suite)]


def _weight(pair: Row) -> tuple[bool, bool, float]:
    """Means come first, then real methods before the bounds, and the greatest losses first."""
    return pair["task"] is not None, bound_of(pair["other"]) is not None, pair["difference"]


def _losing(pair: Row) -> str:
    where = [pair["task"] or f"mean over {pair['tasks']} tasks"]
    if pair["length"] is not None:
        where.append(f"{whole(pair['length'])} tokens")
    if pair["budget"] is not None:
        where.append(f"budget {whole(pair['budget'])}")
    bound = " (an upper bound, no method to use)" if bound_of(pair["other"]) == "upper" else ""
    return f"than {pair['other']}{bound}, {', '.join(where)}: {difference(pair)}"


def _range(values: Sequence[float]) -> str:
    return whole(values[0]) if len(values) == 1 else f"{whole(values[0])} to {whole(values[-1])}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")

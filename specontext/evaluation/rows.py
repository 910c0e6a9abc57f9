"""Rows of `results.json`: means over the problems of a cell with their intervals, and paired differences between methods."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from specontext.evaluation.bootstrap import mean_interval
from specontext.evaluation.continuation.rows import PAIRED as CONTINUATION_PAIRED
from specontext.evaluation.continuation.rows import SUITE as CONTINUATION
from specontext.evaluation.continuation.rows import continuation_columns
from specontext.evaluation.fidelity.rows import PAIRED as FIDELITY_PAIRED
from specontext.evaluation.fidelity.rows import SUITE as FIDELITY
from specontext.evaluation.fidelity.rows import fidelity_columns
from specontext.evaluation.samples import Sample
from specontext.evaluation.suites.documents import PAIRED as DOCUMENTS_PAIRED
from specontext.evaluation.suites.documents import SUITE as DOCUMENTS
from specontext.evaluation.suites.documents import document_columns
from specontext.retrieval.registry import FULL

# What rows of suites say beside what all do.
COLUMNS: dict[str, Callable[..., dict[str, Any]]] = {FIDELITY: fidelity_columns, CONTINUATION: continuation_columns}
BESIDE_FULL: dict[str, Callable[..., dict[str, Any]]] = {DOCUMENTS: document_columns}  # told full attention's samples, too
# Scores of suites, beside `score`, in which methods are compared problem by problem.
PAIRED: dict[str, tuple[str, ...]] = {FIDELITY: FIDELITY_PAIRED, CONTINUATION: CONTINUATION_PAIRED, DOCUMENTS: DOCUMENTS_PAIRED}

Row = dict[str, Any]
Cell = tuple[str, str, int | None]  # suite, task, length


def cell_rows(samples: Iterable[Sample], *, methods: Sequence[str], seed: int) -> tuple[list[Row], list[Row]]:
    """Rows and pairs of one (suite, task, length).

    Args:
        methods: in the order in which they are reported.
        seed: of the resamples.
    """
    found: dict[tuple[str, int | None], list[Sample]] = defaultdict(list)
    for sample in samples:
        found[sample.method, sample.budget].append(sample)
    order = sorted(found, key=lambda choice: (methods.index(choice[0]), choice[1] or 0))
    rows = [_row(found[choice], found.get((FULL, None), ()), seed) for choice in order]
    pairs = []
    for method, budget in order:
        for other in methods[methods.index(method) + 1 :]:
            if method != FULL and (other, budget) in found:
                pairs.append(_pair(found[method, budget], found[other, budget], budget, seed))
        if method != FULL and (FULL, None) in found:
            pairs.append(_pair(found[method, budget], found[FULL, None], budget, seed))
    return rows, [pair for pair in pairs if pair["n"]]


def _row(samples: Sequence[Sample], full: Sequence[Sample], seed: int) -> Row:
    first, scores = samples[0], [sample.score for sample in samples]
    low, high = mean_interval(scores, seed=seed)
    others = list(dict.fromkeys(name for sample in samples for name in sample.scores if name != "score"))

    def stat(name: str) -> float | None:
        return _mean([sample.stats.get(name) for sample in samples])

    row = {
        "suite": first.suite,
        "task": first.task,
        "method": first.method,
        "budget": first.budget,
        "length": first.length,
        "n": len(samples),
        "score": _mean(scores),
        "ci_low": low,
        "ci_high": high,
        "tokens_read": stat("tokens_read_per_step"),
        "selection_bytes": stat("selection_bytes_per_step"),
        "bytes_loaded": stat("bytes_loaded_per_step"),
        "overlap": stat("overlap"),
        "attention_recall": stat("attention_recall"),
        "output_tokens": _mean([sample.output_tokens for sample in samples]),
        "seconds": _mean([sample.seconds for sample in samples]),
        "selection_seconds": stat("selection_s_per_step"),
        "answer_seconds": _mean([_answer_seconds(sample) for sample in samples]),
        "scores": {name: _mean([sample.scores.get(name) for sample in samples]) for name in others},
    }
    if first.suite in COLUMNS:
        row |= COLUMNS[first.suite](samples, seed=seed)
    if first.suite in BESIDE_FULL:
        row |= BESIDE_FULL[first.suite](samples, full, seed=seed)
    return row


def _pair(samples: Sequence[Sample], others: Sequence[Sample], budget: int | None, seed: int) -> Row:
    """The difference on the problems that both have answered."""
    theirs = {sample.key: sample for sample in others}
    both = [(sample, theirs[sample.key]) for sample in samples if sample.key in theirs]
    differences = [mine.score - other.score for mine, other in both]
    low, high = mean_interval(differences, seed=seed)
    first = samples[0]
    pair = {
        "suite": first.suite,
        "task": first.task,
        "method": first.method,
        "other": others[0].method,
        "budget": budget,
        "length": first.length,
        "n": len(differences),
        "difference": _mean(differences),
        "ci_low": low,
        "ci_high": high,
    }
    further = {name: _difference(both, name, seed) for name in PAIRED.get(first.suite, ())}
    return pair | {"differences": further} if further else pair


def _difference(both: Sequence[tuple[Sample, Sample]], name: str, seed: int) -> dict[str, float | None]:
    """Mean and interval of the differences in one of the scores."""
    values = [mine.scores[name] - other.scores[name] for mine, other in both]
    low, high = mean_interval(values, seed=seed)
    return {"mean": _mean(values), "low": low, "high": high}


def _answer_seconds(sample: Sample) -> float | None:
    """From asking to the end of the answer, in the company of its batch."""
    first, each = sample.stats.get("ttft_s"), sample.stats.get("tpot_s")
    return None if first is None else first + (each or 0.0) * (sample.output_tokens - 1)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def by_cell(samples: Iterable[Sample]) -> dict[Cell, list[Sample]]:
    """The samples of each (suite, task, length)."""
    cells: dict[Cell, list[Sample]] = defaultdict(list)
    for sample in samples:
        cells[sample.suite, sample.task, sample.length].append(sample)
    return cells

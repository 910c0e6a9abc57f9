"""The numbers of a load test, named as vLLM's benchmark names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specontext.evaluation.traffic.measure import Record, Run

TIMES = {
    "ttft": "time to first token",
    "tpot": "time per output token after the first",
    "itl": "time between two pieces of a stream",
    "e2el": "time from sending to the end",
}


def summarise(run: Run) -> dict[str, Any]:
    """Throughputs of the requests that succeeded and, in ms, mean, median and 99th percentile of their times.

    What a run cannot tell is None: an answer in one piece has no first token.
    """
    good = [record for record in run.records if record.error is None]
    prompt_tokens = sum(record.prompt_tokens for record in good)
    completion_tokens = sum(record.completion_tokens for record in good)
    result: dict[str, Any] = {
        "completed": len(good),
        "failed": len(run.records) - len(good),
        "duration": run.seconds,
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": completion_tokens,
        "request_throughput": len(good) / run.seconds,
        "output_throughput": completion_tokens / run.seconds,
        "total_token_throughput": (prompt_tokens + completion_tokens) / run.seconds,
    }
    for name, values in _times(good).items():
        result |= statistics(name, values)
    return result


def statistics(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """`mean_NAME_ms`, `median_NAME_ms` and `p99_NAME_ms`."""
    ordered = sorted(seconds)
    values = (sum(ordered) / len(ordered), _quantile(ordered, 0.5), _quantile(ordered, 0.99)) if ordered else (None,) * 3
    return {
        f"{kind}_{name}_ms": None if value is None else value * 1000
        for kind, value in zip(("mean", "median", "p99"), values, strict=True)
    }


def _times(records: Sequence[Record]) -> dict[str, list[float]]:
    first = [record for record in records if record.first is not None]
    return {
        "ttft": [record.first for record in first if record.first is not None],
        "tpot": [
            (record.total - (record.first or 0.0)) / (record.completion_tokens - 1)
            for record in first
            if record.completion_tokens > 1
        ],
        "itl": [gap for record in records for gap in record.gaps],
        "e2el": [record.total for record in records],
    }


def _quantile(ordered: Sequence[float], share: float) -> float:
    """With linear interpolation between neighbours."""
    place = (len(ordered) - 1) * share
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

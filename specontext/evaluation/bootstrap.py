"""Confidence intervals of means by resampling problems (percentile bootstrap, Efron and Tibshirani 1993, chapter 13)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
CHUNK = 1_000_000  # numbers that are drawn at a time


def mean_interval(values: Sequence[float], *, seed: int) -> tuple[float | None, float | None]:
    """Bounds of the 95 % interval of the mean of `values`; None where fewer than two values say nothing about their spread.

    The same number of values and seed give the same resamples. For a paired difference pass the differences.
    """
    count = len(values)
    if count < 2:
        return None, None
    data, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    at_once = max(1, CHUNK // count)
    means = [
        data[rng.integers(0, count, size=(min(at_once, RESAMPLES - start), count))].mean(axis=1)
        for start in range(0, RESAMPLES, at_once)
    ]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(means), (tail, 1 - tail))
    return float(low), float(high)

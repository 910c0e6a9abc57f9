"""Confidence intervals of means by resampling problems (percentile bootstrap, Efron and Tibshirani 1993, chapter 13)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95
CHUNK = 1_000_000  # numbers that are drawn at a time
KEPT = 512  # values whose resamples are kept, for the many intervals of as many values


def mean_interval(values: Sequence[float], *, seed: int) -> tuple[float | None, float | None]:
    """Bounds of the 95 % interval of the mean of `values`; None where fewer than two values say nothing about their spread.

    The same number of values and seed give the same resamples. For a paired difference pass the differences.
    """
    count = len(values)
    if count < 2:
        return None, None
    data = np.asarray(values, dtype=np.float64)
    means = _counts(count, seed) @ data / count if count <= KEPT else _means(data, seed)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, (tail, 1 - tail)).clip(data.min(), data.max())  # beyond them is what rounding adds
    return float(low), float(high)


@lru_cache(maxsize=4)
def _counts(count: int, seed: int) -> NDArray[np.float64]:
    """How often each value is drawn in each resample, [RESAMPLES, count]."""
    drawn = np.random.default_rng(seed).integers(0, count, size=(RESAMPLES, count))
    places = drawn + count * np.arange(RESAMPLES)[:, None]
    return np.bincount(places.ravel(), minlength=RESAMPLES * count).reshape(RESAMPLES, count).astype(np.float64)


def _means(data: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    rng, count = np.random.default_rng(seed), len(data)
    at_once = max(1, CHUNK // count)
    means = [
        data[rng.integers(0, count, size=(min(at_once, RESAMPLES - start), count))].mean(axis=1)
        for start in range(0, RESAMPLES, at_once)
    ]
    return np.concatenate(means)

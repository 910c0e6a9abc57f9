"""What rows of the suite `continuation` say beside their score, which is the similarity to full attention's continuation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from specontext.evaluation.bootstrap import mean_interval
from specontext.evaluation.samples import Sample

SUITE = "continuation"
# Scores with intervals, in which methods are also compared prompt by prompt.
PAIRED = ("common_ngrams", "repetition", "distinct_2", "log_probability", "tokens_written")
QUANTILES = {"low": 0.1, "median": 0.5, "high": 0.9}


def continuation_columns(samples: Sequence[Sample], *, seed: int) -> dict[str, Any]:
    """`parting`: after how many tokens continuations differ from full attention's, 10 %, half and 90 % of them, and the share
    `never` of those that are the same to the end; `intervals` of the scores in PAIRED."""
    parted = [sample.scores["parted_after"] for sample in samples]
    quantiles = {name: float(np.quantile(parted, share)) for name, share in QUANTILES.items()}
    never = sum(sample.score == 1 for sample in samples) / len(samples)
    intervals = {}
    for name in PAIRED:
        low, high = mean_interval([sample.scores[name] for sample in samples], seed=seed)
        intervals[name] = {"low": low, "high": high}
    return {"parting": quantiles | {"never": never}, "intervals": intervals}

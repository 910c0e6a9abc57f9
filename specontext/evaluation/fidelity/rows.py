"""What rows of the fidelity suite say beside their score, which is the agreement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from specontext.evaluation.bootstrap import mean_interval
from specontext.evaluation.samples import Sample

SUITE = "fidelity"
PAIRED = ("kl_divergence", "cross_entropy")  # in which methods are compared window by window, beside their agreement


def fidelity_columns(samples: Sequence[Sample], *, seed: int) -> dict[str, Any]:
    """Columns of a row, means over windows.

    `kl_divergence` (nats) and `perplexity_ratio` (to full attention on the same windows) have 95 % intervals, which come from
    resampling windows. `attention_recall_by_layer` stands there where recall was measured.

    Args:
        samples: of one text, length, method and budget.
        seed: of the resamples.
    """
    divergences = [sample.scores["kl_divergence"] for sample in samples]
    excess = [sample.scores["cross_entropy"] - sample.scores["full_cross_entropy"] for sample in samples]
    kl_low, kl_high = mean_interval(divergences, seed=seed)
    low, high = mean_interval(excess, seed=seed)
    recalls = [layers for sample in samples if (layers := sample.stats.get("attention_recall_by_layer")) is not None]
    by_layer = {"attention_recall_by_layer": [_mean(layer) for layer in zip(*recalls, strict=True)]} if recalls else {}
    return {
        "scores": {
            "kl_divergence": _mean(divergences),
            "kl_low": kl_low,
            "kl_high": kl_high,
            "perplexity": math.exp(_mean([sample.scores["cross_entropy"] for sample in samples])),
            "perplexity_ratio": math.exp(_mean(excess)),
            "ratio_low": None if low is None else math.exp(low),
            "ratio_high": None if high is None else math.exp(high),
        },
    } | by_layer


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

"""How many replicas there should be, by what waits and how full their KV is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FULL = 0.8  # share of seats and of device KV at which replicas are well used


@dataclass(frozen=True)
class Use:
    """One replica: outputs that run and wait, seats in its batch, and the share of its device KV that is held."""

    running: float
    waiting: float
    seats: float
    kv: float


NAMES = ("running", "waiting", "seats", "kv")


def wanted_replicas(uses: Sequence[Use], waiting_elsewhere: float = 0.0) -> int:
    """Enough for seats and KV to be at most `FULL`, and for what waits to run at the rate at which requests run now."""
    if not uses:
        return 1
    running, waiting = sum(use.running for use in uses), sum(use.waiting for use in uses) + waiting_elsewhere
    seats = sum(use.seats for use in uses) / len(uses)
    by_seats = running / (FULL * seats)
    by_kv = sum(use.kv for use in uses) / FULL
    by_waiting = len(uses) * (running + waiting) / max(1.0, running) if waiting >= 1.0 else 0.0  # KV may bound what runs
    return max(1, math.ceil(max(by_seats, by_kv, by_waiting) - 1e-9))


def scale(context: Any) -> tuple[int, dict[str, Any]]:
    """Ray Serve's view of `wanted_replicas`; bounds and delays are its own business."""
    metrics = context.aggregated_metrics or {}
    found = [metrics.get(name, {}) for name in NAMES]
    uses = [Use(*(each[replica] for each in found)) for replica in found[0] if all(replica in each for each in found)]
    if not uses:  # nobody has reported yet
        return context.target_num_replicas, {}
    return wanted_replicas(uses, context.total_queued_requests or 0.0), {}

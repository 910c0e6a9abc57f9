"""How many requests should run, and with how many layers away: those with the most tokens a second that users' limits allow.

The plan asks for requests of equal length before an engine is built; admission for those that there are (`engine/admission.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from specontext.memory.planner import MemoryPlan
from specontext.memory.step_time import StepClock


@dataclass(frozen=True)
class ServiceLimits:
    """What users set; names as vLLM has them where it has them.

    Attributes:
        max_num_seqs: most requests at once.
        min_num_seqs: least requests at once, if so many fit, though fewer would make more tokens a second.
        max_tpot_ms: milliseconds from token to token of a request that no further request may make longer; None for no limit.
        max_wait_s: seconds that a request waits for the sake of tokens a second, while memory has room for it; None for no limit.
    """

    max_num_seqs: int
    min_num_seqs: int = 1
    max_tpot_ms: float | None = None
    max_wait_s: float | None = None

    def allow(self, requests: int, seconds: float) -> bool:
        """Whether so many requests may run at a step of so many seconds: fewer than the least may at any."""
        return requests <= self.min_num_seqs or self.quick_enough(seconds)

    def quick_enough(self, seconds: float) -> bool:
        """Whether a step of so many seconds keeps `max_tpot_ms`."""
        return self.max_tpot_ms is None or 1000 * seconds <= self.max_tpot_ms

    def not_kept(self, chosen: Operation) -> list[str]:
        """The limits that a choice does not keep, by name: nothing that fits would, or not without breaking another."""
        kept = {"min_num_seqs": chosen.requests >= self.min_num_seqs, "max_tpot_ms": self.quick_enough(chosen.step_s)}
        return [name for name, holds in kept.items() if not holds]


@dataclass(frozen=True)
class Operation:
    """Some requests of one length that run at the same time, as it is expected.

    Attributes:
        tokens_per_s: of all requests together.
    """

    requests: int
    length: int
    offloaded_layers: int
    step_s: float
    tokens_per_s: float
    step_limited_by: str

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def operation(plan: MemoryPlan, clock: StepClock, length: int) -> Operation | None:
    """The fastest way to run a plan's requests at a length, over all numbers of layers away that fit; None where none does."""
    ways = [
        (clock.decode([length] * plan.requests, offloaded), offloaded)
        for offloaded, reach in enumerate(plan.reach)
        if reach >= length
    ]
    if not ways:
        return None
    step, offloaded = min(ways, key=lambda way: way[0].seconds)  # the fewest layers of those that are equally fast
    limit = "host_bandwidth" if step.loads_limit else "bandwidth"
    return Operation(plan.requests, length, offloaded, step.seconds, plan.requests / step.seconds, limit)


def throughput_curve(
    plan_of: Callable[[int], MemoryPlan], clock: StepClock, length: int, requests: Iterable[int]
) -> list[Operation]:
    """Tokens a second against requests of a length, ascending, up to the most that fit."""
    found: list[Operation] = []
    for count in requests:
        one = operation(plan_of(count), clock, length)
        if one is None:
            break
        found.append(one)
    return found


def choose(curve: Sequence[Operation], limits: ServiceLimits) -> Operation | None:
    """The operation with the most tokens a second that the limits allow; the fewest requests where several have them.

    Where fewer than the least number fit, the most that do; None where nothing fits.
    """
    allowed = [one for one in curve if one.requests <= limits.max_num_seqs and limits.allow(one.requests, one.step_s)]
    enough = [one for one in allowed if one.requests >= limits.min_num_seqs] or allowed[-1:]
    return max(enough, key=lambda one: one.tokens_per_s, default=None)

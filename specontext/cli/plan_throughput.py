"""The part of a memory plan about tokens a second: what so many requests of a length make, and which choice makes the most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specontext.memory.facts import ModelFacts
    from specontext.memory.planner import MemoryPlan
    from specontext.memory.speed import Bandwidths
    from specontext.memory.step_time import MachineSpeed
    from specontext.memory.throughput import Operation, ServiceLimits

GIVEN = "given"  # where others name a machine
MOST_CHOSEN = 256  # requests that a choice is made among where nothing was said


@dataclass(frozen=True)
class Throughput:
    """Expected tokens a second.

    Attributes:
        curves: by length, of 1, 2, 3 ... requests, up to the most that fit and are allowed.
    """

    machine: MachineSpeed
    limits: ServiceLimits
    curves: Mapping[int, list[Operation]]

    def choice(self, length: int) -> Operation | None:
        """What has the most tokens a second at a length and is within the limits; None where nothing fits."""
        from specontext.memory.throughput import choose

        return choose(self.curves[length], self.limits)

    def as_dict(self) -> dict[str, Any]:
        """What `--json` has of it: choice and curve are those of the longest context that is asked for."""
        choices = {length: self.choice(length) for length in self.curves}
        longest = max(self.curves)
        chosen = choices[longest]
        return {
            "choice": None if chosen is None else chosen.as_dict(),
            "curve": [one.as_dict() for one in self.curves[longest]],
            "choices": [one.as_dict() for one in choices.values() if one is not None],
            "machine": {"name": self.machine.name, "bandwidth": self.machine.device, "host_bandwidth": self.machine.host},
            "limits": {
                "max_num_seqs": self.limits.max_num_seqs,
                "min_num_seqs": self.limits.min_num_seqs,
                "max_tpot_ms": self.limits.max_tpot_ms,
            },
            "limits_not_kept": [] if chosen is None else self.limits.not_kept(chosen),
        }


def throughput_of(
    plan_of: Callable[[int], MemoryPlan],
    facts: ModelFacts,
    machine: MachineSpeed,
    limits: ServiceLimits,
    *,
    lengths: Sequence[int],
    budget: int,
    overlap: float,
    ranks: int = 1,
) -> Throughput:
    """The curves of some lengths.

    Args:
        plan_of: the plan of so many requests; it is made once for each number.
        ranks: that share the model; plans and facts are of one of them.
    """
    from functools import lru_cache

    from specontext.memory.step_time import StepClock
    from specontext.memory.throughput import throughput_curve

    clock, plans = StepClock(facts, machine, budget, overlap, ranks=ranks), lru_cache(None)(plan_of)
    counts = range(1, limits.max_num_seqs + 1)
    return Throughput(machine, limits, {length: throughput_curve(plans, clock, length, counts) for length in sorted(lengths)})


def machine_of(speed: Bandwidths | None) -> MachineSpeed:
    """What a plan counts with: the given bandwidths, else this machine's as an engine has measured it, else an H100's."""
    from specontext.memory.probe import kept_speeds
    from specontext.memory.step_time import H100

    if speed is not None:
        return replace(H100, name=GIVEN, device=speed.device, host=speed.host)
    return next(iter(kept_speeds()), H100)

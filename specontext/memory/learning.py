"""Expected step times that learn from the steps of the engine that asks for them.

Constants of `step_time.py` are those of captured steps on known GPUs, and an overlap of 0.85. An engine may take eager steps,
choose in every layer, or run on another machine: what its steps take beyond their bytes, how fast its bus is, and how much of a
selection was there already, it shows itself. A median of some windows of undisturbed steps is taken over, and only where the
expectation is off by more than a few percent: what is decided by it does not follow noise. It decides who runs, and never what a
request reads.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from specontext.memory.step_time import StepClock, StepTime

PERIOD = 16  # steps from look to look; where requests come and go, longer stretches are rare
TRAFFIC = 16  # looks from one reading of what was loaded to the next: the host waits for the device then
WINDOWS = 5  # of which the median counts
DEADBAND = 0.05  # of a measured step, within which nothing is changed
LEAST_MISSED = 0.01  # share of a selection; the overlap is known no better


@dataclass(frozen=True)
class Seen:
    """What an engine is doing at a moment.

    Attributes:
        at: seconds.
        step: steps so far.
        requests: that decode, all in the engine's own way, by identity; none where others run beside them.
        lengths: tokens stored of each.
        away: layers on the host.
        moves: of layers so far, one that is under way counted.
    """

    at: float
    step: int
    requests: tuple[int, ...]
    lengths: tuple[int, ...]
    away: int
    moves: int


@dataclass(frozen=True)
class Traffic:
    """What was counted of all selections so far: entries, those of them that were on the device, overlaps and their number."""

    selected: float
    hits: float
    overlap: float
    overlap_steps: float


class LearnedClock:
    """A `StepClock` that follows the engine that it is asked by.

    Args:
        learns: nothing is learned where processes that share a model must decide alike.
        learns_bus: loads are learned, too; on a CPU both tiers are the same memory.

    Attributes:
        due: number of the step at which the engine is to be looked at next.
        step_s, expected_s: of the last window what a step took, and was expected to take before it was measured; None before one.
    """

    def __init__(self, clock: StepClock, *, learns: bool = True, learns_bus: bool = True) -> None:
        self.now, self.learns, self.learns_bus = clock, learns, learns_bus
        self.step_s: float | None = None
        self.expected_s: float | None = None
        self._fits: deque[tuple[float, float]] = deque(maxlen=WINDOWS)
        self._misses: deque[float] = deque(maxlen=WINDOWS)
        self.forget()

    def forget(self) -> None:
        """Steps are counted anew; what was learned stays."""
        self.due = PERIOD
        self._seen: Seen | None = None
        self._traffic: tuple[Traffic, Seen] | None = None
        self._looks = 0

    def decode(self, lengths: Sequence[int], offloaded: int) -> StepTime:
        """As of `StepClock`."""
        return self.now.decode(lengths, offloaded)

    def tokens_per_s(self, lengths: Sequence[int], offloaded: int) -> float:
        """As of `StepClock`."""
        return self.now.tokens_per_s(lengths, offloaded)

    def look(self, seen: Seen, traffic: Callable[[], Traffic]) -> None:
        """Learn from the steps since the last look, if nothing but decoding happened."""
        before, self._seen, self.due = self._seen, seen, seen.step + PERIOD
        if before is None or not _undisturbed(before, seen):
            return
        seconds = (seen.at - before.at) / (seen.step - before.step)
        lengths = [(a + b) // 2 for a, b in zip(before.lengths, seen.lengths, strict=True)]
        self.step_s, self.expected_s = seconds, self.now.decode(lengths, seen.away).seconds
        if not self.learns:
            return
        self._looks += 1
        if self._looks % TRAFFIC == 0 and self.now.budget is not None:
            self._learn_overlap(traffic(), seen)
        self.learn(lengths, seen.away, seconds)

    def learn(self, lengths: Sequence[int], away: int, seconds: float) -> None:
        """A step of such requests takes so long."""
        fitted = self.now.fitted(lengths, away, seconds)
        self._fits.append((fitted.extra_s, fitted.bus))
        if abs(self.now.decode(lengths, away).seconds - seconds) > DEADBAND * seconds:
            extra, bus = (statistics.median(values) for values in zip(*self._fits, strict=True))
            self.now = replace(self.now, extra_s=extra, bus=bus if self.learns_bus else 1.0)

    def _learn_overlap(self, traffic: Traffic, seen: Seen) -> None:
        before, self._traffic = self._traffic, (traffic, seen)
        if before is None or before[1].away != seen.away or before[1].moves != seen.moves:
            return
        old, layers = before[0], self.now.facts.shape.layers
        selected, steps = traffic.selected - old.selected, traffic.overlap_steps - old.overlap_steps
        if seen.away and selected > 0:  # what slots beyond the budget keep is not loaded either
            missed = (selected - (traffic.hits - old.hits)) / (selected * seen.away / layers)
        elif steps > 0:
            missed = 1 - (traffic.overlap - old.overlap) / steps
        else:
            return
        self.learn_overlap(1 - missed)

    def learn_overlap(self, overlap: float) -> None:
        """Such a share of what requests read was there already."""
        self._misses.append(min(1.0, max(0.0, 1 - overlap)))
        missed, known = statistics.median(self._misses), 1 - self.now.overlap
        if abs(missed - known) > max(LEAST_MISSED, 2 * DEADBAND * known):
            self.now = replace(self.now, overlap=1 - missed)


def _undisturbed(before: Seen, after: Seen) -> bool:
    """Whether between two looks the same requests decoded a token in each step, and no layer moved."""
    steps, grown = after.step - before.step, zip(before.lengths, after.lengths, strict=False)
    same = before.requests == after.requests and (before.away, before.moves) == (after.away, after.moves)
    return bool(after.requests) and same and steps > 0 and after.at > before.at and all(b - a == steps for a, b in grown)

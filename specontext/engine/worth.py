"""Whether one request more, or one fewer, makes more tokens a second: what admission asks before layers leave the device.

Only expected times decide, of the requests that there are. What a request reads does not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence

from specontext.engine.residency import Residency
from specontext.kv.seats import ParkedKV
from specontext.memory.learning import LearnedClock
from specontext.memory.throughput import ServiceLimits

GAIN = 1.05  # by which fewer requests must be faster before one that runs is made to wait


class Worth:
    """Expected tokens a second of requests of any lengths, with the fewest layers away that they need.

    A request joins where layers need not leave for it, or where they make more tokens a second than without it. One that runs is
    made to wait only where the others are faster by `GAIN`. Between the two nothing changes. The clock learns, and may change its
    mind: so admission has nobody who was made to wait for that reason come back before somebody has ended.
    """

    def __init__(self, residency: Residency, clock: LearnedClock, limits: ServiceLimits) -> None:
        self.residency, self.clock, self.limits = residency, clock, limits

    def tokens_per_s(self, lengths: Sequence[int], *, but: ParkedKV | None = None) -> float:
        """Of requests of these lengths, none where they do not fit."""
        away = self.residency.fewest_away(lengths, but=but)
        return 0.0 if away is None else self.clock.tokens_per_s(lengths, away)

    def too_slow(self, lengths: Sequence[int], *, but: ParkedKV | None = None) -> bool:
        """Whether steps of these requests take longer than users allow."""
        if self.limits.max_tpot_ms is None or len(lengths) <= self.limits.min_num_seqs:
            return False
        away = self.residency.fewest_away(lengths, but=but)
        return away is not None and not self.limits.allow(len(lengths), self.clock.decode(lengths, away).seconds)

    def joining_pays(self, running: Sequence[int], waiting: Sequence[int], *, but: ParkedKV | None = None) -> bool:
        """Whether the first of the waiting should join, perhaps because it pays with those behind it.

        Args:
            running, waiting: lengths; of the waiting as many as there are seats for, in order.
        """
        if len(running) < self.limits.min_num_seqs:
            return True
        here = self.residency.fewest_away(running, but=but)
        together = [*running, waiting[0]]
        there = self.residency.fewest_away(together, but=but)
        if here is None or there is None or there <= here:
            return True  # what does not fit is not decided here
        now = self.clock.tokens_per_s(running, here)
        for count in range(1, len(waiting) + 1):
            more = self.tokens_per_s([*running, *waiting[:count]], but=but)
            if more >= now:
                return True
            if not more:
                break
        return False

    def leaving_pays(self, running: Sequence[int]) -> bool:
        """Whether layers should leave for these requests, rather than the last of them wait.

        Args:
            running: lengths that they are about to have, in order of admission.
        """
        least = max(1, self.limits.min_num_seqs)
        now = GAIN * self.tokens_per_s(running)
        return all(self.tokens_per_s(running[:count]) < now for count in range(least, len(running)))

"""A step that is launched before the host has seen the tokens it takes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from specontext.core import Request
from specontext.engine.sampler import Drawn
from specontext.engine.scheduler import Schedule


@dataclass(frozen=True, eq=False)
class Launched:
    """A step that the device has been given.

    Attributes:
        logits: [requests, V], until the next step is launched.
        ready: (row of the logits, request) pairs of those that get a token.
        drawn: their tokens; None where the host has to know what they take before it can have theirs chosen.
        captured: whose steps were captured and have not been counted.
        counts: the counters before the step, for those who had ended by then.
    """

    schedule: Schedule
    logits: Tensor
    ready: Sequence[tuple[int, Request]]
    drawn: Drawn | None
    captured: Collection[Request]
    counts: Tensor

    @property
    def alive(self) -> list[tuple[int, Request]]:
        """Those that have not ended meanwhile."""
        return [(row, request) for row, request in self.ready if request.finish_reason is None]

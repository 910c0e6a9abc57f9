"""A step whose tokens the device chooses: the next one can be launched before the host has seen them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from specontext.core import Request
from specontext.engine.failures import Failures
from specontext.engine.sampler import Drawn, NextToken
from specontext.engine.scheduler import Schedule
from specontext.errors import LogitsError


@dataclass(frozen=True, eq=False)
class Launched:
    """A step that the device has been given.

    Attributes:
        ready: the requests that get a token, all of them unrestricted.
        drawn: their tokens, in this order; None where choosing them failed on the device, and the host is to do it.
        logits: [ready requests, V], from which the host is to choose.
        captured: whose steps were captured and have not been counted.
        counts: the counters before the step, for those who had ended by then.
    """

    schedule: Schedule
    ready: Sequence[Request]
    drawn: Drawn | None
    logits: Tensor | None = None
    captured: Collection[Request] = ()
    counts: Tensor | None = None

    @property
    def alive(self) -> list[tuple[int, Request]]:
        """(row, request) of those that have not ended meanwhile."""
        return [(row, request) for row, request in enumerate(self.ready) if request.finish_reason is None]

    def receive(self, failures: Failures) -> list[NextToken]:
        """Wait for the tokens of those that have not ended; the ones with broken logits are among the failures."""
        assert self.drawn is not None
        token_ids, broken = self.drawn.read()
        found = []
        for row, request in self.alive:
            request.unread -= 1
            if not broken[row]:
                found.append(NextToken(row, request, token_ids[row], None))
        if named := [request.request_id for row, request in self.alive if broken[row]]:
            failures.add(LogitsError(named), *named)
        return found

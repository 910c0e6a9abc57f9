"""A step whose tokens the device chooses: the next one can be launched before the host has seen them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from specontext.core import Request
from specontext.engine.failures import Failures
from specontext.engine.sampler import Drawn, NextToken
from specontext.engine.scheduler import Schedule
from specontext.errors import LogitsError


@dataclass(frozen=True, eq=False)
class Launched:
    """A step of unrestricted requests, all of which get a token.

    Attributes:
        ready: the requests, in the order of `drawn`.
        captured: whether each one's decode step was captured; None where that has been counted.
        counts: the counters before the step, for those who had ended by then.
    """

    schedule: Schedule
    ready: Sequence[Request]
    drawn: Drawn
    captured: Sequence[bool] | None = None
    counts: Tensor | None = None

    def receive(self, failures: Failures) -> list[NextToken]:
        """Wait for the tokens, of requests that have not ended meanwhile; those with broken logits are among the failures."""
        token_ids, broken = self.drawn.read()
        alive = [row for row, request in enumerate(self.ready) if request.finish_reason is None]
        if named := [self.ready[row].request_id for row in alive if broken[row]]:
            failures.add(LogitsError(named), *named)
        for row in alive:
            self.ready[row].captured_steps += self.captured is not None and self.captured[row]
        return [NextToken(row, self.ready[row], token_ids[row], None) for row in alive if not broken[row]]

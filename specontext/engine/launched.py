"""Steps that are launched before the host has seen the tokens that they take."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from specontext.core import Request
from specontext.engine.failures import NOBODYS
from specontext.engine.generation import Generation
from specontext.engine.parts import Parts
from specontext.engine.runner import ModelRunner
from specontext.engine.sampler import Drawn
from specontext.engine.scheduler import Schedule, Scheduler
from specontext.errors import DeviceMemoryError


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


class Launcher:
    """Has the device choose tokens, and launches the step that takes them.

    Args:
        generations: what is under way, by request id.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        parts: Parts,
        generations: Mapping[str, Generation],
        end_token_ids: frozenset[int],
    ) -> None:
        self._runner, self._scheduler, self._parts = runner, scheduler, parts
        self._generations, self._end_token_ids = generations, end_token_ids

    def draw(self, logits: Tensor, ready: Sequence[tuple[int, Request]]) -> Drawn | None:
        """Tokens that the device chooses for (row of the logits, request) pairs; None where the host is to wait for each."""
        if not ready or not all(self._follows(request) for _, request in ready):
            return None
        try:
            drawn = Drawn(logits, ready, self._end_token_ids)
        except NOBODYS:
            raise
        except Exception:  # choosing once more, and waiting for it, finds out whose trouble it is
            return None
        for _, request in ready:
            request.unread += 1
        return drawn

    def launch(self, before: Drawn) -> Launched | None:
        """Run the step after one whose tokens only the device knows; None where what comes next depends on them.

        The tokens of this step are chosen at once where the logits alone decide. What else there is (grammars, penalties ...)
        depends on the tokens before it, which the host will know while the device computes.
        """
        schedule = self._scheduler.schedule_ahead(before.ready, before.token_ids, self._follows)
        if schedule is None:
            return None
        meter, runner = self._parts.meter, self._runner
        counts = meter.counts.clone()
        captured = runner.captured_rows(schedule.batch) if runner.captures else ()
        try:
            logits = runner.run(schedule.batch)
        except DeviceMemoryError as error:  # it is tried again when its turn comes, and fails then
            if self._parts.kv.states is not None:  # which hold tokens of the step by now, and cannot hold them twice
                error.request_ids = tuple(request.request_id for request in schedule.requests)
                raise
            meter.counts.copy_(counts)
            return None
        ready = self._scheduler.advance(schedule)
        free = all(request.params.unrestricted for _, request in ready)
        drawn = self.draw(logits, ready) if free else None
        return Launched(schedule, logits, ready, drawn, [schedule.requests[row] for row in captured], counts)

    def _follows(self, request: Request) -> bool:
        return self._generations[request.request_id].follows_the_device

"""Who has a seat: requests come in when there is room, grow, and leave it for those that came before them.

Requests are admitted in order of arrival, on what they need now and a little more. When a tier is full, layers leave it
(`residency.py`); when that is not enough, the request that came last waits at the front of the queue, and its KV, head keys
and last feature wait on the host. Where the host has no room for them they are computed again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from specontext.core import Request
from specontext.engine.build import Parts
from specontext.engine.statistics import MeterState
from specontext.kv.seats import ParkedKV
from specontext.memory.tiers import Tier

WATERMARK = 64  # tokens that every running request must have room to grow by before another is admitted


@dataclass(frozen=True)
class Parked:
    """Everything of a request that waits: into any seat again."""

    kv: ParkedKV
    methods: list[object]
    meter: MeterState


class Admission:
    """Waiting and running requests and their seats.

    Attributes:
        waiting: in order; preempted requests at the front.
        running: in order of admission.
        preemptions: requests that had to wait again, so far.
    """

    def __init__(self, parts: Parts, *, seats: int, max_batched_tokens: int) -> None:
        self.parts, self.max_batched_tokens = parts, max_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = 0
        self._seats = list(range(seats - 1, -1, -1))
        self._parked: dict[str, Parked] = {}

    @property
    def stored(self) -> dict[int, int]:
        """Tokens stored, by seat."""
        return {request.seat: request.computed for request in self.running}

    def most(self, request: Request) -> int:
        """Tokens of a request at its longest."""
        return min(request.prompt_length + request.params.max_tokens, self.parts.max_tokens)

    def finish(self, request: Request) -> None:
        """Take a request out, running or waiting, and free what it holds."""
        if request.seat < 0:
            self.waiting.remove(request)
            parked = self._parked.pop(request.request_id, None)
            if parked is not None:
                self.parts.kv.discard(parked.kv)
            return
        self.running.remove(request)
        self._leave(request)

    # Room -------------------------------------------------------------------------------------------------------------

    def grow(self, request: Request, tokens: int, *, preempt: bool) -> bool:
        """Make room for some more tokens of a running request; False when there is none (it may have been preempted itself)."""
        length = request.computed + tokens
        if length <= request.room:
            return True

        def take() -> Tier | None:
            short = self.parts.kv.grow(request.seat, length)
            return short or (None if self.parts.methods.grow(request.seat, length) else Tier.DEVICE)

        while not self._take(take):
            if not preempt or not self.preempt(but=None) or request.seat < 0:
                return False
        self._note_room(request)
        return True

    def _note_room(self, request: Request) -> None:
        request.room = min(self.parts.kv.seats[request.seat].room, self.parts.methods.room(request.seat))

    def _take(self, take: Callable[[], Tier | None]) -> bool:
        """Try to take pages, with layers leaving the tier that is full as long as that helps.

        Args:
            take: returns the tier that has too few pages, None where it has taken them.
        """
        full: set[Tier] = set()
        while (short := take()) is not None:
            full.add(short)
            if len(full) > 1 or not self.parts.residency.make_room(self.stored, short):
                return False
        return True

    # In ---------------------------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Give seats to waiting requests, in order, as far as there is room."""
        while self.waiting and self._seats:
            request = self.waiting[0]
            parked = self._parked.get(request.request_id)
            held = parked.kv if parked is not None else None
            wanted = [*(self._soon(r) for r in self.running), self._soon(request)]
            self.parts.residency.settle(wanted, but=held)
            fits = self.parts.residency.fits_somehow(wanted, but=held)
            # Who computes the same pages now has a seat, and gets on or leaves it.
            awaited = parked is None and self.parts.prefix.awaited(request)
            if fits and not awaited and self._seat(request, parked):
                self.running.append(self.waiting.popleft())
            elif self.running or not self.drop_parked(but=request):
                return

    def _soon(self, request: Request) -> int:
        """Tokens that a request is to have room for before another may join."""
        return min(max(len(request.token_ids), request.computed) + WATERMARK, self.most(request))

    def _seat(self, request: Request, parked: Parked | None) -> bool:
        """Give a waiting request a seat, and back what it had before it was preempted, or what is known of its prompt."""
        parts, seat = self.parts, self._seats[-1]

        def take() -> Tier | None:
            chain = parts.prefix.find(request, self.max_batched_tokens) if parked is None else []
            known = max(request.computed, parts.prefix.tokens(chain))
            first = min(request.prefill_length, known + self.max_batched_tokens)
            with parts.prefix.using(chain):
                if not parts.methods.open(seat, max(known, first), request.choice):
                    return Tier.DEVICE
                if parked is not None:
                    short = parts.kv.unpark(seat, parked.kv)
                else:
                    short = parts.kv.open(seat, first, parts.methods.reader(request.choice))
                if short is not None:
                    parts.methods.close(seat)
                elif parked is None:
                    parts.prefix.fill(request, seat, chain)
                return short

        if not self._take(take):
            return False
        parts.meter.reset(seat)
        if parked is not None:
            parts.methods.restore(seat, request.computed, parked.methods)
            parts.meter.restore(seat, parked.meter)
            del self._parked[request.request_id]
        request.seat = self._seats.pop()
        self._note_room(request)
        request.admitted_at = request.admitted_at or time.perf_counter()
        parts.prefix.follow(request, request.seat)
        return True

    # Out --------------------------------------------------------------------------------------------------------------

    def preempt(self, *, but: Request | None) -> bool:
        """The request that came last leaves its seat and waits at the front; False when there is no other."""
        victim = next((r for r in reversed(self.running) if r is not but), None)
        if victim is None or len(self.running) == 1:
            return False
        self.put_back(victim)
        self.preemptions += 1
        victim.preemptions += 1
        return True

    def put_back(self, request: Request, *, dropping: bool = False) -> None:
        """A running request goes to the front of the queue, and what it has to the host, if there is room.

        Args:
            dropping: others that wait may lose what they have there.
        """
        seat = request.seat
        state = (self.parts.methods.save(seat, request.computed), self.parts.meter.save(seat))
        while (kv := self.parts.kv.park(seat, request.computed)) is None:
            if not dropping or not self.drop_parked(but=None):
                request.restart()
                break
        else:
            self._parked[request.request_id] = Parked(kv, *state)
        self.running.remove(request)
        self._leave(request)
        self.waiting.appendleft(request)

    def drop_parked(self, *, but: Request | None) -> bool:
        """The last waiting request whose KV is on the host gives it up, and will be computed again; False when there is none."""
        victim = next((r for r in reversed(self.waiting) if r is not but and r.request_id in self._parked), None)
        if victim is None:
            return False
        self.parts.kv.discard(self._parked.pop(victim.request_id).kv)
        victim.restart()
        return True

    def _leave(self, request: Request) -> None:
        if request.seat in self.parts.kv.seats:  # parking has closed it
            self.parts.kv.close(request.seat)
        self.parts.methods.close(request.seat)
        self.parts.prefix.leave(request.seat)
        self._seats.append(request.seat)
        request.seat, request.room = -1, 0

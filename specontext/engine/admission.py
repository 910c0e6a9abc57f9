"""Who has a seat: requests come in when there is room, grow, and leave it for those that came before them.

Requests are admitted in order of arrival, on what they need now and a little more, as long as one more makes more tokens a second
(`worth.py`). When a tier is full, layers leave it (`residency.py`); where fewer requests would be faster, or when that is not
enough, the request that came last waits at the front of the queue, and its KV, head keys and last feature wait on the host. Where
the host has no room for them they are computed again.

Nobody is overtaken: whoever has a seat came before all who wait, except for those that are held. So a request waits at most until
all that came before it have ended, or `max_wait_s`, if memory has room for it then. Nobody comes and goes: whatever the clock has
learned meanwhile, one that was made to wait for the sake of tokens a second stays away until a request has ended, and one for
which layers have begun to leave comes in.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from specontext.core import Request
from specontext.engine.parts import Parts
from specontext.engine.statistics import MeterState
from specontext.engine.worth import Worth
from specontext.kv.seats import ParkedKV
from specontext.memory.tiers import Tier

# What a request waits for, in the words of the statistics.
SEATS, MEMORY, PREFIX = "max_num_seqs", "memory", "a prefix that another request computes"
LEAVING = "layers that leave the device"
SPEED, THROUGHPUT = "max_tpot_ms", "throughput"
TURN = "those before it"
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
        ends: requests that have ended.
    """

    def __init__(self, parts: Parts, *, seats: int, max_batched_tokens: int) -> None:
        self.parts, self.max_batched_tokens = parts, max_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = self.ends = 0
        self._outpaced = False  # the last one that lacked room was to make it by waiting, for the sake of tokens a second
        self.worth = Worth(parts.residency, parts.clock, parts.limits)
        self._answers: dict[str, tuple[object, bool]] = {}
        self._seats = list(range(seats - 1, -1, -1))
        self._parked: dict[str, Parked] = {}

    @property
    def stored(self) -> dict[int, int]:
        """Tokens stored, by seat."""
        return {request.seat: request.computed for request in self.running}

    def most(self, request: Request) -> int:
        """Tokens of a request at its longest."""
        return min(request.prompt_length + request.params.most_tokens, self.parts.max_tokens)

    def finish(self, request: Request) -> None:
        """Take a request out, running or waiting, and free what it holds."""
        self.ends += 1
        if request.seat < 0:
            self.waiting.remove(request)
            parked = self._parked.pop(request.request_id, None)
            if parked is not None:
                self.parts.kv.discard(parked.kv)
            return
        self.running.remove(request)
        self._leave(request)

    # Room -------------------------------------------------------------------------------------------------------------

    def grow(self, request: Request, tokens: int, *, preempt: bool, patient: bool = False) -> bool:
        """Make room for some more tokens of a running request; False when there is none (it may have been preempted itself).

        Args:
            preempt: those that came last make room for it.
            patient: rather than have a layer leave at once it waits while one does in portions.
        """
        length = request.computed + tokens
        if length <= request.room:
            return True

        def take() -> Tier | None:
            short = self.parts.kv.grow(request.seat, length)
            return short or (None if self.parts.methods.grow(request.seat, length) else Tier.DEVICE)

        while not self._take(take, patient=patient):
            if not preempt or not self.preempt(but=None) or request.seat < 0:
                return False
        self._note_room(request)
        return True

    def _note_room(self, request: Request) -> None:
        request.room = min(self.parts.kv.seats[request.seat].room, self.parts.methods.room(request.seat))

    def _take(self, take: Callable[[], Tier | None], *, patient: bool) -> bool:
        """Try to take pages, with layers leaving the tier that is full as long as that helps, and pays.

        Args:
            take: returns the tier that has too few pages, None where it has taken them.
            patient: False, too, where a layer leaves in portions, and pages can be taken later.
        """
        full: set[Tier] = set()
        self._outpaced = False
        while (short := take()) is not None:
            full.add(short)
            self._outpaced = short is Tier.DEVICE and not self.leaving_pays()
            if len(full) > 1 or self._outpaced:
                return False
            if patient and short is Tier.DEVICE and self.parts.residency.give_way():
                return False
            if not self.parts.residency.make_room(self.stored, short):
                return False
        return True

    def leaving_pays(self) -> bool:
        """Whether layers should leave the device for the running requests, rather than the last of them wait: always where
        users ask for so many, where it could not wait on the host, and where it has waited long enough."""
        running, least = self.running, max(1, self.parts.limits.min_num_seqs)
        if not self.parts.residency.adaptive or len(running) <= least or any(request.held for request in running):
            return True
        last = running[-1]
        if last.urgent or not self.parts.kv.can_park(last.seat, last.computed):
            return True
        lengths = [self._soon(request) for request in running]
        return self._ask("leaving", lengths, (), lambda: self.worth.leaving_pays(lengths))

    def _ask(self, question: str, lengths: Sequence[int], others: tuple[object, ...], answer: Callable[[], bool]) -> bool:
        """The answer for requests that run, kept while they are the same and have hardly grown: it is asked in every step."""
        known = (tuple(map(id, self.running)), sum(lengths) // (WATERMARK * len(lengths)), *others)
        if self._answers.get(question, (None,))[0] != known:
            self._answers[question] = known, answer()
        return self._answers[question][1]

    # In ---------------------------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Give seats to waiting requests, in order, as far as there is room and it pays."""
        while (request := self._first_waiting) is not None:
            why = self._seat_or_say(request)
            if why is not None:
                if why in request.waited_for:
                    request.waited_for.remove(why)
                request.waited_for.append(why)
                for behind in reversed(self.waiting):
                    if behind.waited_for:
                        break
                    behind.waited_for.append(TURN)
                if why == SEATS or self.running or not self.drop_parked(but=request):
                    return

    @property
    def _first_waiting(self) -> Request | None:
        return next((request for request in self.waiting if not request.held), None)

    def _seat_or_say(self, request: Request) -> str | None:
        """Give the first waiting request a seat, or say what it waits for."""
        if not self._seats:
            return SEATS
        parked = self._parked.get(request.request_id)
        held = parked.kv if parked is not None else None
        running = [self._soon(one) for one in self.running]
        wanted = [*running, self._soon(request)]
        self.parts.residency.settle(wanted, but=held)
        if not self.parts.residency.fits_somehow(wanted, but=held):
            return MEMORY
        # Who computes the same pages now has a seat, and gets on or leaves it.
        if parked is None and self.parts.prefix.awaited(request):
            return PREFIX
        if self.running and (why := self._unwanted(request, running, held)) is not None:
            return why
        decoding, residency = any(other.decoding and not other.held for other in self.running), self.parts.residency
        if decoding and not residency.fits_now(wanted, but=held) and residency.give_way():
            request.let_in = self.ends
            return LEAVING
        if not self._seat(request, parked, patient=decoding):
            return LEAVING if decoding and residency.awaited else MEMORY
        self.waiting.remove(request)
        self.running.append(request)
        return None

    def _unwanted(self, request: Request, running: list[int], held: ParkedKV | None) -> str | None:
        """Why a request should not join those that run though memory has room for it."""
        longest = self.parts.limits.max_wait_s
        if longest is not None and time.perf_counter() - request.waiting_since >= longest:
            request.urgent = True
            return None
        if self.worth.too_slow([*running, self._soon(request)], but=held):
            return SPEED
        if not self.parts.residency.adaptive:
            return None
        if self.ends in (request.set_back, request.let_in):  # what was said holds until somebody has ended
            return THROUGHPUT if request.set_back == self.ends else None
        behind = [self._soon(one) for one in islice((r for r in self.waiting if not r.held), len(self._seats))]
        others = (id(request), len(behind), sum(behind))
        pays = self._ask("joining", running, others, lambda: self.worth.joining_pays(running, behind, but=held))
        return None if pays else THROUGHPUT

    def _soon(self, request: Request) -> int:
        """Tokens that a request is to have room for before another may join."""
        return min(max(len(request.token_ids), request.computed) + WATERMARK, self.most(request))

    def _seat(self, request: Request, parked: Parked | None, *, patient: bool) -> bool:
        """Give a waiting request a seat, and back what it had before it was preempted, or what is known of its prompt.

        Args:
            patient: it waits while a layer leaves in portions, as others decode.
        """
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
                    short = parts.kv.open(seat, first, parts.methods.reader(request.choice), chain)
                if short is not None:
                    parts.methods.close(seat)
                elif parked is None:
                    parts.prefix.fill(request, seat, chain)
                return short

        if not self._take(take, patient=patient):
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
        """A request that is held, else the one that came last, leaves its seat and waits; False when there is no other."""
        victim = next((r for r in reversed(self.running) if r.held), None)
        if victim is None and len(self.running) > 1:
            victim = next((r for r in reversed(self.running) if r is not but), None)
        if victim is None:
            return False
        self.put_back(victim)
        if self._outpaced:
            victim.set_back = self.ends
        self.preemptions += 1
        victim.preemptions += 1
        return True

    def why_waiting(self, request: Request) -> str | None:
        """What a request waits for now; None where it has a seat."""
        if request.seat >= 0:
            return None
        if request.held:
            return "its token"
        return request.waited_for[-1] if request is self._first_waiting and request.waited_for else TURN

    def put_back(self, request: Request, *, dropping: bool = False) -> None:
        """A running request goes to the front of the queue, and what it has to the host, if there is room.

        One that is held goes to the end: the others of its batch come first.

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
        request.waiting_since, request.urgent = time.perf_counter(), False
        if request.held:
            self.waiting.append(request)
        else:
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

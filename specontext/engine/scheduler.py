"""Which requests run in a step, and with how many tokens.

There is no prefill or decode phase: in every step each running request catches up with its tokens. Requests are admitted in
order of arrival, on what they need now and a little more; they grow as they go. When the device is full, layers leave it
(`residency.py`); when that is not enough, the request that came last waits at the front of the queue, and its KV, head keys
and last feature wait on the host. Where the host has no room for them they are computed again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from specontext.core import Batch, Request, RequestError, SamplingParams
from specontext.engine.build import Parts
from specontext.engine.packing import pack
from specontext.engine.statistics import MeterState
from specontext.kv.parking import ParkedKV, discard, park, unpark
from specontext.memory.pages import OutOfPagesError

WATERMARK = 64  # tokens that every running request must have room to grow by before another is admitted
STUCK = "no room for the only request: this is an error of the engine, please report it"


@dataclass(frozen=True)
class Schedule:
    """The next step.

    Attributes:
        requests: in the batch's order, decoding ones first.
    """

    requests: tuple[Request, ...]
    batch: Batch


@dataclass(frozen=True)
class Parked:
    """Everything of a request that waits: into any seat again."""

    kv: ParkedKV
    methods: list[object]
    meter: MeterState


class Scheduler:
    """Waiting and running requests, their seats, and what each step computes.

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

    # In and out -------------------------------------------------------------------------------------------------------

    def check(self, prompt_length: int, params: SamplingParams) -> None:
        """Raises RequestError for a prompt that leaves no room for an output, or a request that could not run even alone."""
        limit = self.parts.max_tokens
        if prompt_length >= limit:
            shape = self.parts.kv.shape
            why = f" ({shape.limited_by})" if shape.limited_by and limit == shape.max_position else ""
            raise RequestError(
                f"the prompt has {prompt_length} tokens and the model's maximum is {limit}{why}, output included: "
                "shorten the prompt, or raise max_model_len where the model allows it"
            )
        length = min(prompt_length + params.max_tokens, limit)
        if (lack := self.parts.residency.lack(length)) is not None:
            raise RequestError(lack)

    def add(self, request: Request) -> None:
        """Queue a request that `check` lets through."""
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Take a request out, running or waiting, and free what it holds."""
        if request.seat < 0:
            self.waiting.remove(request)
            parked = self._parked.pop(request.request_id, None)
            if parked is not None:
                discard(self.parts.kv, parked.kv)
            return
        self.running.remove(request)
        self._leave(request)

    def _leave(self, request: Request) -> None:
        if request.seat in self.parts.kv.room:
            self.parts.kv.close(request.seat)
        self.parts.methods.close(request.seat)
        self.parts.prefix.leave(request.seat)
        self._seats.append(request.seat)
        request.seat = -1

    def _most(self, request: Request) -> int:
        """Tokens of a request at its longest."""
        return min(request.prompt_length + request.params.max_tokens, self.parts.max_tokens)

    # Steps ------------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """What of the next step does not depend on the tokens of this one: called while the device computes it."""
        self._admit()
        self.parts.residency.step(self.stored, self._lengths_in)

    def schedule(self) -> Schedule | None:
        """The next step's requests and batch; None when there is nothing to do."""
        self._admit()
        decodes, chunks = self._choose()
        resettled = False
        while self.running and not decodes and not chunks:  # nobody can grow: the others make room for the first
            if not self._preempt(but=self.running[0]):
                if resettled:
                    raise OutOfPagesError(STUCK)
                # There is a residency that has room for it, but no way there while it holds its pages.
                resettled = True
                self._leave_seat(self.running[0], dropping=True)
                self._admit()
            decodes, chunks = self._choose()
        if not decodes and not chunks:
            if self.waiting:
                raise OutOfPagesError(STUCK)
            return None
        self.parts.residency.steps += 1
        batch = pack(decodes, chunks, self.parts.kv.device)
        return Schedule((*decodes, *(request for request, _ in chunks)), batch)

    @property
    def stored(self) -> dict[int, int]:
        """Tokens stored, by seat."""
        return {request.seat: request.computed for request in self.running}

    def _lengths_in(self, steps: int) -> list[int]:
        """How long the running requests will be in so many steps, at most."""
        grown = []
        for request in self.running:
            pace = 1 if request.decoding else self.max_batched_tokens
            end = self._most(request) if request.decoding else request.prefill_length + steps
            grown.append(min(request.computed + pace * steps, end, self._most(request)))
        return grown

    def _choose(self) -> tuple[list[Request], list[tuple[Request, int]]]:
        """Decoding requests, and chunks of prompts in what is left of the step's tokens; all have room to grow."""
        decodes: list[Request] = []
        for request in [r for r in self.running if r.decoding]:
            # Those that came last make room for those that came first.
            if request.seat >= 0 and self._grow(request, 1, preempt=True):
                decodes.append(request)
        decodes = [request for request in decodes if request.seat >= 0]
        ways = list(dict.fromkeys(request.choice for request in decodes))
        decodes.sort(key=lambda request: ways.index(request.choice))  # those that choose alike stand together
        chunks: list[tuple[Request, int]] = []
        room = max(self.max_batched_tokens - len(decodes), 1)
        for request in self.running:
            length = min(request.prefill_length - request.computed, room)
            if not request.decoding and length > 0 and self._grow(request, length, preempt=False):
                chunks.append((request, length))
                room -= length
        return decodes, chunks

    def _grow(self, request: Request, tokens: int, *, preempt: bool) -> bool:
        """Make room for some more tokens of a running request; False when there is none (it may have been preempted itself)."""
        length = request.computed + tokens

        def take() -> None:
            self.parts.kv.grow(request.seat, length)
            self.parts.methods.grow(request.seat, length)

        while not self._take(take):
            if not preempt or not self._preempt(but=None):
                return False
            if request.seat < 0:
                return False
        return True

    def _take(self, take: Callable[[], None]) -> bool:
        """Try to take pages, with layers leaving the tier that is full as long as that helps."""
        full: set[bool] = set()
        while True:
            try:
                take()
                return True
            except OutOfPagesError as error:
                on_host = error.pages is self.parts.kv.host.pages
                full.add(on_host)
                if len(full) > 1 or not self.parts.residency.make_room(self.stored, on_host=on_host):
                    return False

    def advance(self, schedule: Schedule) -> list[tuple[int, Request]]:
        """Count a step's tokens as computed; the (row, request) pairs whose last token's logits are to be sampled."""
        batch, requests = schedule.batch, schedule.requests
        for request in requests[: batch.num_decodes]:
            request.computed += 1
        for request, segment in zip(requests[batch.num_decodes :], batch.prefills, strict=True):
            request.computed += segment.length
        return [(row, r) for row, r in enumerate(requests) if r.computed == len(r.token_ids)]

    # Waiting ----------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self.waiting and self._seats:
            request = self.waiting[0]
            parked = self._parked.get(request.request_id)
            wanted = [*(self._soon(r) for r in self.running), self._soon(request)]
            self.parts.residency.settle(wanted, but=parked.kv if parked else None)
            fits = self.parts.residency.fits_somehow(wanted, but=parked.kv if parked else None)
            # Who computes the same pages now has a seat, and gets on or leaves it.
            awaited = parked is None and self.parts.prefix.awaited(request)
            if fits and not awaited and self._seat(request):
                self.running.append(self.waiting.popleft())
            elif self.running or not self._drop_parked(but=request):
                return

    def _soon(self, request: Request) -> int:
        """Tokens that a request is to have room for before another may join."""
        return min(max(len(request.token_ids), request.computed) + WATERMARK, self._most(request))

    def _seat(self, request: Request) -> bool:
        """Give a waiting request a seat, and back what it had before it was preempted, or what is known of its prompt."""
        parts, seat = self.parts, self._seats[-1]
        parked = self._parked.get(request.request_id)

        def take() -> None:
            chain = parts.prefix.find(request, self.max_batched_tokens) if parked is None else []
            known = max(request.computed, parts.prefix.tokens(chain))
            first = min(request.prefill_length, known + self.max_batched_tokens)
            with parts.prefix.using(chain):
                parts.methods.open(seat, max(known, first), request.choice)
                try:
                    if parked is None:
                        parts.kv.open(seat, first, parts.methods.reader(request.choice))
                    else:
                        unpark(parts.kv, seat, parked.kv)
                except OutOfPagesError:
                    parts.methods.close(seat)
                    raise
                if parked is None:
                    parts.prefix.fill(request, seat, chain)

        if not self._take(take):
            return False
        parts.meter.reset(seat)
        if parked is not None:
            parts.methods.restore(seat, request.computed, parked.methods)
            parts.meter.restore(seat, parked.meter)
            del self._parked[request.request_id]
        request.seat = self._seats.pop()
        request.admitted_at = request.admitted_at or time.perf_counter()
        parts.prefix.follow(request, request.seat)
        return True

    def _drop_parked(self, *, but: Request | None) -> bool:
        """The last waiting request whose KV is on the host gives it up, and will be computed again; False when there is none."""
        victim = next((r for r in reversed(self.waiting) if r is not but and r.request_id in self._parked), None)
        if victim is None:
            return False
        discard(self.parts.kv, self._parked.pop(victim.request_id).kv)
        victim.restart()
        return True

    def _preempt(self, *, but: Request | None) -> bool:
        """The request that came last leaves its seat and waits at the front; False when there is no other."""
        victim = next((r for r in reversed(self.running) if r is not but), None)
        if victim is None or len(self.running) == 1:
            return False
        self._leave_seat(victim)
        self.preemptions += 1
        victim.preemptions += 1
        return True

    def _leave_seat(self, request: Request, *, dropping: bool = False) -> None:
        """A running request goes to the front of the queue, and what it has to the host, if there is room.

        Args:
            dropping: others that wait may lose what they have there.
        """
        seat = request.seat
        state = (self.parts.methods.save(seat, request.computed), self.parts.meter.save(seat))
        while True:
            try:
                self._parked[request.request_id] = Parked(park(self.parts.kv, seat, request.computed), *state)
            except OutOfPagesError:
                if dropping and self._drop_parked(but=None):
                    continue
                request.restart()
            break
        self.running.remove(request)
        self._leave(request)
        self.waiting.appendleft(request)

"""Which requests run in a step, with how many tokens, and the batch that they are packed into.

There is no prefill or decode phase: in every step each running request catches up with its tokens. Who runs, `admission.py` says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from specontext.core import Batch, Lane, Request, Segment
from specontext.engine.admission import Admission
from specontext.engine.parts import Parts
from specontext.errors import OutOfPagesError, RequestError
from specontext.kernels.dispatch import upload
from specontext.sampling_params import SamplingParams

STUCK = "no room for the only request: this is an error of the engine, please report it"


@dataclass(frozen=True)
class Schedule:
    """The next step.

    Attributes:
        requests: in the batch's order, decoding ones first.
    """

    requests: tuple[Request, ...]
    batch: Batch


class Scheduler:
    """What each step computes.

    Attributes:
        tokens: of a step.
        admission: who runs, and who waits.
    """

    def __init__(self, parts: Parts, *, seats: int) -> None:
        self.parts, self.tokens = parts, parts.step_tokens
        self.admission = Admission(parts, seats=seats, max_batched_tokens=self.tokens.alone)
        self.waiting, self.running = self.admission.waiting, self.admission.running

    @property
    def preemptions(self) -> int:
        """Requests that had to wait again, so far."""
        return self.admission.preemptions

    def forget(self) -> None:
        """Begin to count anew, and know of no prompt, while no request runs."""
        assert not self.running and not self.waiting
        for part in (self.parts.prefix, self.parts.meter, self.parts.residency, self.parts.clock):
            part.forget()
        self.admission.preemptions = 0

    def check(self, prompt_length: int, params: SamplingParams) -> None:
        """Raises RequestError for a prompt that leaves no room for an output, or a request that could not run even alone."""
        limit = self.parts.max_tokens
        if prompt_length >= limit:
            shape = self.parts.meter.shape
            why = f" ({shape.limited_by})" if shape.limited_by and limit == shape.max_position else ""
            raise RequestError(
                f"the prompt has {prompt_length} tokens and the model's maximum is {limit}{why}, output included: "
                "shorten the prompt, or raise max_model_len where the model allows it"
            )
        length = min(prompt_length + params.most_tokens, limit)
        if (lack := self.parts.residency.lack(length)) is not None:
            raise RequestError(lack)

    def add(self, request: Request) -> None:
        """Queue a request that `check` lets through."""
        request.waiting_since = request.arrived or time.perf_counter()
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Take a request out, running or waiting, and free what it holds."""
        self.admission.finish(request)

    def prepare(self) -> None:
        """What of the next step does not depend on the tokens of this one: called while the device computes it."""
        if self.waiting:
            self.admission.admit()
        if self.parts.residency.adaptive:
            self.parts.residency.advance(self.admission.stored, self._lengths_in, self.admission.leaving_pays)

    def schedule(self) -> Schedule | None:
        """The next step's requests and batch; None when there is nothing to do, or all requests are held."""
        admission = self.admission
        if self.waiting:
            admission.admit()
        decodes, chunks = self._choose()
        resettled = False
        while self.running and not decodes and not chunks:  # nobody can grow: the others make room for the first
            first = next((request for request in self.running if not request.held), None)
            if first is None:
                if all(request.held for request in self.waiting):
                    return None
                admission.preempt(but=None)
                admission.admit()
            elif not admission.preempt(but=first):
                if resettled:
                    raise OutOfPagesError(STUCK)
                # There is a residency that has room for it, but no way there while it holds its pages.
                resettled = True
                admission.put_back(first, dropping=True)
                admission.admit()
            decodes, chunks = self._choose()
        if not decodes and not chunks:
            if not all(request.held for request in self.waiting):
                raise OutOfPagesError(STUCK)
            return None
        self.parts.residency.steps += 1
        batch = pack(decodes, chunks, self.parts.kv.device)
        return Schedule((*decodes, *(request for request, _ in chunks)), batch)

    def schedule_ahead(
        self, ready: Sequence[tuple[int, Request]], tokens: Tensor, free: Callable[[Request], bool]
    ) -> Schedule | None:
        """The step after one that the device computes now, before the host knows its tokens.

        Requests that end with their token by their length are not in it; one that ends otherwise has a token too many computed.
        None where a request needs the host, or where others would have to make room.

        Args:
            ready: whose tokens the device chooses now, behind the rows of their logits; some may have ended meanwhile.
            tokens: int64 [ready requests] on the device.
            free: whether a request's next step takes the token of the device.
        """
        if self.waiting:
            self.admission.admit()
        if not all(map(free, self.running)):
            return None
        decodes, chunks = self._choose(ahead=True)
        if not decodes and not chunks:
            return None
        self.parts.residency.steps += 1
        rows = {request: place for place, (_, request) in enumerate(ready)}
        unread = [rows[request] if request.unread else -1 for request in decodes]
        batch = pack(decodes, chunks, self.parts.kv.device, tokens=tokens, unread=unread)
        return Schedule((*decodes, *(request for request, _ in chunks)), batch)

    def _lengths_in(self, steps: int) -> list[int]:
        """How long the running requests will be in so many steps, at most."""
        grown = []
        for request in self.running:
            pace = 1 if request.decoding else self.tokens.alone
            most = self.admission.most(request)
            end = most if request.decoding else request.prefill_length + steps
            grown.append(min(request.computed + pace * steps, end, most))
        return grown

    def _choose(self, *, ahead: bool = False) -> tuple[list[Request], list[tuple[Request, int]]]:
        """Decoding requests, and chunks of prompts in what is left of the step's tokens; all have room to grow.

        Chunks are large where nobody decodes: they use the device well. Who decodes waits for a small one at most.

        Args:
            ahead: some tokens are not known yet; then nobody makes room, and nothing is chosen where that is needed.
        """
        decodes: list[Request] = []
        for request in [r for r in self.running if r.decoding and not r.held]:
            if ahead and len(request.token_ids) + request.unread >= self.admission.most(request):
                continue  # it ends with the token that is under way
            # Those that came last make room for those that came first.
            if request.computed < request.room or (request.seat >= 0 and self.admission.grow(request, 1, preempt=not ahead)):
                decodes.append(request)
            elif ahead:
                return [], []
        decodes = [request for request in decodes if request.seat >= 0]
        ways = list(dict.fromkeys(request.choice for request in decodes))
        if len(ways) > 1:
            decodes.sort(key=lambda request: ways.index(request.choice))  # those that choose alike stand together
        chunks: list[tuple[Request, int]] = []
        most = self.tokens.alone
        if decodes:
            most = self.tokens.mixed if any(request.awaited for request in decodes) else self.tokens.unawaited
        room = max(most - len(decodes), 1)
        for request in self.running:
            length = min(request.prefill_length - request.computed, room)
            if request.decoding or request.held or length <= 0:
                continue
            if self.parts.kv.states is not None:
                length = self.parts.prefix.chunk(request, length)
            if self.admission.grow(request, length, preempt=False, patient=bool(decodes)):
                chunks.append((request, length))
                room -= length
        return decodes, chunks

    def advance(self, schedule: Schedule) -> list[tuple[int, Request]]:
        """Count a step's tokens as computed; the (row, request) pairs whose last token's logits are to be sampled."""
        batch, requests = schedule.batch, schedule.requests
        for request in requests[: batch.num_decodes]:
            request.computed += 1
        for request, segment in zip(requests[batch.num_decodes :], batch.prefills, strict=True):
            request.computed += segment.length
        return [(row, r) for row, r in enumerate(requests) if r.computed == len(r.token_ids) + r.unread]


@torch.inference_mode()  # as steps run, which are compiled for tensors that were made so
def pack(
    decodes: Sequence[Request],
    chunks: Sequence[tuple[Request, int]],
    device: torch.device,
    *,
    tokens: Tensor | None = None,
    unread: Sequence[int] = (),
) -> Batch:
    """The batch of one token of every decoding request and of chunks (request, tokens).

    Decoding requests that choose in the same way must follow one another.

    All its numbers go to the device in one copy.

    Args:
        tokens: int64 [N] on the device, some of which are those of decoding requests that the host does not know.
        unread: which of them, for each decoding request; -1 where the host knows its token.
    """
    places = [place for place, row in enumerate(unread) if row >= 0]
    ids: list[int] = []
    positions: list[int] = []
    seats: list[int] = []
    lengths: list[int] = []
    last: list[int] = []
    segments: list[Segment] = []
    for request, length in [(r, 1) for r in decodes] + list(chunks):
        start, stop = request.computed, request.computed + length
        if len(last) >= len(decodes):
            segments.append(Segment(request.seat, start, length, len(positions)))
        ids += request.token_ids[start:stop] or [0]  # what is not known yet is put there below
        positions += range(start, stop)
        seats += [request.seat] * length
        lengths += [stop] * length
        last.append(len(positions) - 1)
    seeds = [request.seed for request in decodes]
    parts = (ids, positions, seats, lengths, last, seeds, places, [unread[place] for place in places])
    packed = upload([number for part in parts for number in part], torch.int64, device)
    token_ids, position, seat, length_, last_tokens, seed, at, rows = packed.split([len(part) for part in parts])
    if places:
        assert tokens is not None
        token_ids.index_copy_(0, at, tokens.index_select(0, rows))
    return Batch(
        token_ids=token_ids,
        positions=position,
        seats=seat,
        lengths=length_,
        seeds=seed,
        num_decodes=len(decodes),
        prefills=tuple(segments),
        last_tokens=last_tokens,
        span=max((request.computed + 1 for request in decodes), default=0),
        lanes=_lanes(decodes) if any(request.choice is not None for request in decodes) else (),
    )


def _lanes(decodes: Sequence[Request]) -> tuple[Lane, ...]:
    lanes: list[Lane] = []
    for choice, members in groupby(decodes, key=lambda request: request.choice):
        spans = [request.computed + 1 for request in members]
        start = lanes[-1].stop if lanes else 0
        lanes.append(Lane(choice, start, start + len(spans), max(spans)))
    return tuple(lanes)

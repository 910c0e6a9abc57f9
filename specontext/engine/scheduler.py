"""Which requests run in a step, and with how many tokens.

There is no prefill or decode phase: in every step each running request catches up with its tokens. Requests join when a
seat and the pages for their whole possible length are free, in order of arrival, and leave between steps, so a request that
was admitted never runs out of memory.
"""

from __future__ import annotations

from collections import deque

import torch

from specontext.core import Batch, Request, RequestError, Segment
from specontext.engine.build import Parts
from specontext.memory.pages import OutOfPagesError


class Scheduler:
    """Waiting and running requests, their seats, and the packing of steps."""

    def __init__(self, parts: Parts, *, seats: int, max_batched_tokens: int) -> None:
        self.parts, self.max_batched_tokens = parts, max_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._seats = list(range(seats - 1, -1, -1))

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: its prompt leaves no room for an output, or it could not run even alone.
        """
        limit = self.parts.max_tokens
        if request.prompt_length >= limit:
            raise RequestError(
                f"the prompt has {request.prompt_length} tokens and the model's maximum is {limit}, output included: "
                "shorten the prompt, or raise max_model_len where the model allows it"
            )
        device, host = self.parts.kv.pages_needed(self._length(request))
        pools = ((device, self.parts.kv.arena.pages, "gpu_memory"), (host, self.parts.kv.host.pages, "host_memory"))
        for needed, pages, setting in pools:
            if needed > pages.num_pages - 1:
                raise RequestError(
                    f"a request of {self._length(request)} tokens needs {needed} pages and the {pages.name} has "
                    f"{pages.num_pages - 1}: raise {setting}, or lower max_tokens"
                )
        most = self.parts.selector.most_tokens
        if most is not None and self._length(request) > most:
            raise RequestError(
                f"a request of {self._length(request)} tokens needs retrieval keys for all, and there is room for {most}: "
                "raise gpu_memory, or lower max_tokens"
            )
        self.waiting.append(request)

    def _length(self, request: Request) -> int:
        return min(request.prompt_length + request.params.max_tokens, self.parts.max_tokens)

    def _admit(self) -> None:
        while self.waiting and self._seats:
            request = self.waiting[0]
            seat, tokens = self._seats[-1], self._length(request)
            try:
                self.parts.kv.open(seat, tokens)
            except OutOfPagesError:
                return
            try:
                self.parts.selector.open(seat, tokens)
            except OutOfPagesError:
                self.parts.kv.close(seat)
                return
            self.parts.meter.reset(seat)
            request.seat = self._seats.pop()
            self.running.append(self.waiting.popleft())

    def schedule(self) -> Batch | None:
        """The next step's batch: one token of every decoding request, then chunks of prompts; None when idle."""
        self._admit()
        if not self.running:
            return None
        decodes = [r for r in self.running if r.decoding]
        chunks: list[tuple[Request, int]] = []
        room = max(self.max_batched_tokens - len(decodes), 1)
        for request in self.running:
            if not request.decoding and room > 0:
                length = min(request.prompt_length - request.computed, room)
                chunks.append((request, length))
                room -= length
        return self._pack(decodes, chunks)

    def _pack(self, decodes: list[Request], chunks: list[tuple[Request, int]]) -> Batch:
        device = self.parts.kv.device
        ids: list[int] = []
        positions: list[int] = []
        seats: list[int] = []
        last: list[int] = []
        segments: list[Segment] = []
        for request, length in [(r, 1) for r in decodes] + chunks:
            if not request.decoding:
                segments.append(Segment(request.seat, request.computed, length, len(ids)))
            ids += request.token_ids[request.computed : request.computed + length]
            positions += range(request.computed, request.computed + length)
            seats += [request.seat] * length
            last.append(len(ids) - 1)
        packed = [torch.tensor(x, dtype=torch.int64, device=device) for x in (ids, positions, seats, last)]
        return Batch(
            requests=(*decodes, *(r for r, _ in chunks)),
            token_ids=packed[0],
            positions=packed[1],
            seats=packed[2],
            num_decodes=len(decodes),
            prefills=tuple(segments),
            last_tokens=packed[3],
        )

    def advance(self, batch: Batch) -> list[tuple[int, Request]]:
        """Count a step's tokens as computed; the (row, request) pairs whose last token's logits are to be sampled."""
        for request in batch.requests[: batch.num_decodes]:
            request.computed += 1
        for request, segment in zip(batch.requests[batch.num_decodes :], batch.prefills, strict=True):
            request.computed += segment.length
        return [(row, r) for row, r in enumerate(batch.requests) if r.computed == len(r.token_ids)]

    def finish(self, request: Request) -> None:
        """Take a request out, running or waiting, and free what it holds."""
        if request.seat < 0:
            self.waiting.remove(request)
            return
        self.running.remove(request)
        self.parts.kv.close(request.seat)
        self.parts.selector.close(request.seat)
        self._seats.append(request.seat)
        request.seat = -1

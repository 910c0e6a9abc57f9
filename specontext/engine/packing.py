"""Pack the tokens of one step into a batch: decode tokens first, then chunks of prompts, in one row without padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from specontext.core import Batch, Lane, Request, Segment


def pack(decodes: Sequence[Request], chunks: Sequence[tuple[Request, int]], device: torch.device) -> Batch:
    """The batch of one token of every decoding request and of chunks (request, tokens).

    Decoding requests that choose in the same way must follow one another.

    All its numbers go to the device in one copy.
    """
    ids: list[int] = []
    positions: list[int] = []
    seats: list[int] = []
    lengths: list[int] = []
    last: list[int] = []
    segments: list[Segment] = []
    for request, length in [(r, 1) for r in decodes] + list(chunks):
        start, stop = request.computed, request.computed + length
        if len(last) >= len(decodes):
            segments.append(Segment(request.seat, start, length, len(ids)))
        ids += request.token_ids[start:stop]
        positions += range(start, stop)
        seats += [request.seat] * length
        lengths += [stop] * length
        last.append(len(ids) - 1)
    seeds = [request.seed for request in decodes]
    parts = (ids, positions, seats, lengths, last, seeds)
    packed = torch.tensor([number for part in parts for number in part], dtype=torch.int64).to(device)
    token_ids, position, seat, length_, last_tokens, seed = packed.split([len(part) for part in parts])
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

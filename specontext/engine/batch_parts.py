"""A packed batch taken apart: lanes of decode tokens that run as captured steps, and one batch of everything else.

Nothing here asks the device for a number.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specontext.core import Batch, Lane


@dataclass(frozen=True)
class Part:
    """Some requests of a batch, as a batch of their own.

    Attributes:
        rows: where its requests stand in the whole, in order.
        shift: how many packed tokens fewer stand before its chunks than in the whole.
    """

    batch: Batch
    rows: tuple[slice, ...]
    shift: int = 0


def lane_part(batch: Batch, lane: Lane) -> Part:
    """The decode tokens of one lane."""
    part, count = slice(lane.start, lane.stop), lane.stop - lane.start
    own = Batch(
        token_ids=batch.token_ids[part],
        positions=batch.positions[part],
        seats=batch.seats[part],
        lengths=batch.lengths[part],
        seeds=batch.seeds[part],
        num_decodes=count,
        prefills=(),
        last_tokens=batch.last_tokens[:count],  # decode tokens stand first: these are 0, 1 ...
        span=lane.span,
        lanes=(replace(lane, start=0, stop=count),),
    )
    return Part(own, (part,))


def rest_part(batch: Batch, taken: Collection[Lane]) -> Part | None:
    """What is left without some lanes: the other ones, then all chunks; None where nothing is."""
    left = [lane for lane in batch.lanes if lane not in taken]
    if not left and not batch.prefills:
        return None
    lanes: list[Lane] = []
    for lane in left:
        start = lanes[-1].stop if lanes else 0
        lanes.append(replace(lane, start=start, stop=start + lane.stop - lane.start))
    count = lanes[-1].stop if lanes else 0
    shift = batch.num_decodes - count
    decodes = [slice(lane.start, lane.stop) for lane in left]
    tokens = [*decodes, slice(batch.num_decodes, None)] if batch.prefills else decodes
    rest = Batch(
        token_ids=_picked(batch.token_ids, tokens),
        positions=_picked(batch.positions, tokens),
        seats=_picked(batch.seats, tokens),
        lengths=_picked(batch.lengths, tokens),
        seeds=_picked(batch.seeds, decodes),
        num_decodes=count,
        prefills=tuple(replace(segment, offset=segment.offset - shift) for segment in batch.prefills),
        last_tokens=torch.cat((batch.last_tokens[:count], batch.last_tokens[batch.num_decodes :] - shift)),
        span=max((lane.span for lane in lanes), default=0),
        lanes=tuple(lanes),
    )
    chunks = slice(batch.num_decodes, batch.num_decodes + len(batch.prefills))
    return Part(rest, (*decodes, chunks) if batch.prefills else tuple(decodes), shift)


def _picked(numbers: Tensor, parts: Sequence[slice]) -> Tensor:
    return numbers[parts[0]] if len(parts) == 1 else torch.cat([numbers[part] for part in parts]) if parts else numbers[:0]


def joined(parts: Sequence[tuple[Part, Tensor]], requests: int) -> Tensor:
    """Rows of all parts, in the order of the whole batch: [requests, V] from [requests of a part, V] each."""
    whole = parts[0][1].new_empty((requests, *parts[0][1].shape[1:]))
    for part, values in parts:
        counts = [rows.stop - rows.start for rows in part.rows]
        for rows, some in zip(part.rows, values.split(counts), strict=True):
            whole[rows] = some
    return whole

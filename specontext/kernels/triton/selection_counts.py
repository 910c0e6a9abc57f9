"""Triton kernels of `count_selection`: two launches for what takes the reference some thirty, each as long.

1. One program a (request, group) pair counts its entries and looks up the chosen ones in the sorted row of the step before.
2. One program a row of `before`, or a block of it, writes it anew; the first of each request sums its pairs up and counts them.

A row is read by one launch and written by the next, so no program overwrites what another still looks at. Bytes: 9 or 10 an
entry, again in the second launch, and 4 a place of `before` in each. Sums are of integers, and each request adds to its counters
once: nothing depends on the order in which programs run, but for rows of padding, which select nothing.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specontext.kernels import selection_counts

NOTHING = tl.constexpr(selection_counts.NOTHING)
BLOCK = 1024  # entries of one step of a program


def count_selection(
    counts: Tensor,
    before: Tensor,
    seats: Tensor,
    tokens: Tensor,
    scored: Tensor,
    missing: Tensor | None,
    readers: Tensor,
    resident: Tensor,
    *,
    sink: int,
    row_bytes: int,
) -> None:
    """See `specontext.kernels.selection_counts.count_selection`."""
    requests, groups, width = tokens.shape
    _, kept_groups, kept = before.shape
    layers = len(readers)
    assert before.is_contiguous() and readers.stride(1) == counts.stride(1) == 1
    if not tokens.numel():
        return
    seats, tokens, flags = seats.contiguous(), tokens.contiguous(), scored.contiguous().view(torch.uint8)
    sums = torch.empty((5, requests, groups), dtype=torch.int64, device=tokens.device)
    _count_pairs[(requests * groups,)](
        tokens,
        flags,
        flags if missing is None else missing.contiguous().view(torch.uint8),
        before,
        seats,
        readers,
        readers.stride(0),
        resident.contiguous().view(torch.uint8),
        sums,
        layers,
        requests,
        groups,
        width,
        kept_groups,
        kept,
        sink,
        LOADS=missing is not None,
        LAYERS=triton.next_power_of_2(layers),
        BITS=kept.bit_length(),
        BLOCK=BLOCK,
    )
    _keep_and_add[(requests * kept_groups, triton.cdiv(kept, BLOCK))](
        tokens,
        flags,
        before,
        seats,
        sums,
        counts,
        counts.stride(0),
        row_bytes,
        requests,
        groups,
        width,
        kept_groups,
        kept,
        sink,
        GROUPS=triton.next_power_of_2(groups),
        BLOCK=BLOCK,
    )


@triton.jit
def _entry(place, sink, width):
    """Where in a selection the entry is that has this place when the chosen ones come first and the sinks last."""
    return tl.where(place + sink < width, place + sink, place + sink - width)


@triton.jit(do_not_specialize=["readers", "resident", "requests", "width"])
def _count_pairs(
    tokens,
    scored,
    missing,
    before,
    seats,
    readers,
    by_layer,
    resident,
    sums,
    layers,
    requests,
    groups,
    width,
    kept_groups,
    kept,
    sink,
    LOADS: tl.constexpr,  # `missing` is given
    LAYERS: tl.constexpr,  # at least as many as there are
    BITS: tl.constexpr,  # of `kept`
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    group = pair % groups
    then = before + (tl.load(seats + pair // groups) * kept_groups + group) * kept
    read = 0
    lost = 0
    total = 0
    again = 0
    for first in range(0, width, BLOCK):
        place = first + tl.arange(0, BLOCK)
        at = pair * width + _entry(place, sink, width)
        token = tl.load(tokens + at, mask=place < width, other=-1)
        flag = tl.load(scored + at, mask=place < width, other=0) != 0
        read += tl.sum((token >= 0).to(tl.int32), 0)
        total += tl.sum(flag.to(tl.int32), 0)
        if LOADS:
            lost += tl.sum((tl.load(missing + at, mask=place < width, other=0) != 0).to(tl.int32), 0)
        now = tl.where(flag & (place < kept), token, NOTHING).to(tl.int32)
        chosen = now != NOTHING
        lower = tl.zeros([BLOCK], tl.int32)  # tokens of the step before that are lower
        for i in tl.static_range(BITS):
            reach = lower + (1 << (BITS - 1 - i))
            other = tl.load(then + reach - 1, mask=chosen & (reach <= kept), other=NOTHING)
            lower = tl.where(other < now, reach, lower)
        again += tl.sum((chosen & (tl.load(then + lower, mask=chosen & (lower < kept), other=NOTHING) == now)).to(tl.int32), 0)

    layer = tl.arange(0, LAYERS)
    reader = tl.load(readers + layer * by_layer + group, mask=layer < layers, other=0)
    here = tl.load(resident + layer, mask=layer < layers, other=1) != 0
    pairs = requests.to(tl.int64) * groups
    tl.store(sums + pair, read * tl.sum(reader, 0))
    tl.store(sums + pairs + pair, lost * tl.sum(tl.where(here, 0, reader), 0))
    tl.store(sums + 2 * pairs + pair, again)
    tl.store(sums + 3 * pairs + pair, total)
    tl.store(sums + 4 * pairs + pair, (tl.load(then) != NOTHING).to(tl.int64))


@triton.jit
def _sum(numbers, count, COUNT: tl.constexpr):
    each = tl.arange(0, COUNT)
    return tl.sum(tl.load(numbers + each, mask=each < count, other=0), 0)


@triton.jit(do_not_specialize=["requests", "width"])
def _keep_and_add(
    tokens,
    scored,
    before,
    seats,
    sums,
    counts,
    by_seat,
    row_bytes,
    requests,
    groups,
    width,
    kept_groups,
    kept,
    sink,
    GROUPS: tl.constexpr,  # at least as many as there are
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64) // kept_groups
    group = tl.program_id(0) % kept_groups
    seat = tl.load(seats + request)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = (request * groups + group) * width + _entry(place, sink, width)
    flag = tl.load(scored + at, mask=place < tl.where(group < groups, width, 0), other=0) != 0
    now = tl.load(tokens + at, mask=flag, other=NOTHING).to(tl.int32)
    tl.store(before + (seat * kept_groups + group) * kept + place, now, mask=place < kept)
    if (group == 0) & (tl.program_id(1) == 0):
        first, pairs = sums + request * groups, requests.to(tl.int64) * groups
        read = _sum(first, groups, GROUPS)
        loaded = _sum(first + pairs, groups, GROUPS)
        again = _sum(first + 2 * pairs, groups, GROUPS)
        total = _sum(first + 3 * pairs, groups, GROUPS)
        known = _sum(first + 4 * pairs, groups, GROUPS)
        both = tl.where((known > 0) & (total > 0), 1.0, 0.0).to(tl.float64)
        # What a float32 quotient is: in float64 first, because float32's own is not always rounded right.
        share = again.to(tl.float32).to(tl.float64) / tl.maximum(total, 1).to(tl.float32).to(tl.float64)
        share = share.to(tl.float32).to(tl.float64) * both
        field = tl.arange(0, 8)
        added = tl.where(field == 0, read, tl.where(field == 1, read - loaded, loaded * row_bytes)).to(tl.float64)
        added = tl.where(field == 3, share, tl.where(field == 4, both, added))
        tl.atomic_add(counts + seat * by_seat + field, added, mask=field < 5, sem="relaxed")

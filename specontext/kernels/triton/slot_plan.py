# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Set difference and slot choice in three launches, without a sort and without waiting for the host.

1. Blocks of entries look their tokens up; hits mark their slots with this step.
2. One program a pair lists its free slots (all but those that were hit), another its misses, both ascending.
3. Blocks of free slots rank themselves by (last use, slot) among all free slots of the pair; a slot whose rank is below the
   number of misses takes the miss of that rank.

A pair touches its B tokens and slots, N times last use, and a few numbers for each miss: about 16 B + 8 N bytes. Ranking
compares F^2 times for F free slots: 0.1 million a pair at 1,204 slots and a budget of 1,024, of which 85 % are hits.

What is counted of a selection takes two launches:

1. One program a pair counts its entries and looks up the chosen ones in the sorted row of the step before.
2. One program a row of `before`, or a block of it, writes it anew; the first of each request sums its pairs up and counts them.

A row is read by one launch and written by the next, so no program overwrites what another still looks at. Bytes: 9 or 10 an
entry, again in the second launch, and 4 a place of `before` in each. Sums are of integers, and each request adds to its counters
once: nothing depends on the order in which programs run, but for rows of padding, which select nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specontext.kernels import slot_plan
from specontext.kernels.tables import Copies, Tiers

ROWS = 1024  # entries of one program that makes row numbers
NOTHING = tl.constexpr(slot_plan.NOTHING)
BLOCK = 1024  # entries of one step of a program that counts


def plan_slots(
    tokens: Tensor, seats: Tensor, slot_of_token: Tensor, token_of_slot: Tensor, last_used: Tensor, step: int | Tensor
) -> tuple[Tensor, Tensor]:
    """See `specontext.kernels.slot_plan.plan_slots`."""
    requests, groups, width = tokens.shape
    span, slot_count = slot_of_token.shape[-1], token_of_slot.shape[-1]
    assert slot_of_token.is_contiguous() and token_of_slot.is_contiguous() and last_used.is_contiguous()
    pairs, device = requests * groups, tokens.device
    tokens, seats = tokens.contiguous(), seats.contiguous()
    slots = torch.empty((requests, groups, width), dtype=torch.int64, device=device)
    missing = torch.empty((requests, groups, width), dtype=torch.bool, device=device)
    if not slots.numel():
        return slots, missing
    now = torch.full((), step, dtype=torch.int32, device=device) if isinstance(step, int) else step
    flags = missing.view(torch.uint8)
    free, ages = torch.empty((2, pairs, slot_count), dtype=torch.int32, device=device)  # free slots and their last use
    misses = torch.empty((pairs, width), dtype=torch.int32, device=device)
    counts = torch.empty((pairs, 2), dtype=torch.int32, device=device)  # free slots and misses
    _look_up[(pairs, triton.cdiv(width, 256))](
        tokens, seats, slot_of_token, last_used, now, slots, flags, groups, width, span, slot_count, BLOCK=256
    )
    _list[(pairs, 2)](
        seats, last_used, now, flags, free, ages, misses, counts, groups, width, slot_count, BLOCK=1024, num_warps=8
    )
    _assign[(pairs, triton.cdiv(slot_count, 32))](
        tokens,
        seats,
        slot_of_token,
        token_of_slot,
        last_used,
        now,
        slots,
        free,
        ages,
        misses,
        counts,
        groups,
        width,
        span,
        slot_count,
        BLOCK=32,
        OTHERS=128,
    )
    return slots, missing


def listed(seats: Tensor, source: Tensor, target: Tensor, wanted: Tensor) -> Copies:
    """See `specontext.kernels.slot_plan.listed`."""
    requests, groups, width = wanted.shape
    lists = torch.empty((2, requests, groups, width), dtype=torch.int32, device=wanted.device)
    counts = torch.empty((requests, groups), dtype=torch.int32, device=wanted.device)
    if counts.numel():
        flags = wanted.contiguous().view(torch.uint8)
        source, target = source.contiguous(), target.contiguous()
        _list_wanted[(requests * groups,)](flags, source, target, lists[0], lists[1], counts, width, BLOCK=1024, num_warps=8)
    return Copies(seats, lists[0], lists[1], counts)


def selected_rows(tiers: Tiers, layers: range, seats: Tensor, head_map: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
    """See `specontext.kernels.slot_plan.selected_rows`; int32, which every arena of fewer than 2 ** 31 rows fits. In one
    launch, per entry 8 bytes are read for a group, and 4 written for a KV head."""
    requests, groups, width = tokens.shape
    here, part = tiers.tokens, slice(layers.start, layers.stop)
    there = tiers.slots if tiers.slots is not None else here  # without slots all layers are resident
    tables = [pages.table[part] for pages in (here, there)]
    assert layers.step == 1 and all(table.is_contiguous() for table in tables)
    rows = torch.empty((len(layers), requests, here.heads, width), dtype=torch.int32, device=tokens.device)
    if rows.numel():
        _rows[(len(layers) * requests * here.heads, triton.cdiv(width, ROWS))](
            tokens.contiguous(),
            slots.contiguous(),
            *tables,
            tiers.resident[part].view(torch.uint8),
            seats.contiguous(),
            head_map[part].contiguous(),
            rows,
            requests,
            groups,
            width,
            *tables[0].shape[1:],
            tables[1].shape[2],
            PAGE=here.size,
            HEADS=here.heads,
            BLOCK=ROWS,
        )
    return rows


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
    """See `specontext.kernels.slot_plan.count_selection`."""
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
def list_flagged(flags, width, positions, BLOCK: tl.constexpr):
    """Write the places of the set flags, uint8 [width], to `positions`, int32, in order; returns their number."""
    count = tl.full((), 0, tl.int32)
    for start in range(0, width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        flag = tl.load(flags + place, mask=place < width, other=0) != 0
        one = flag.to(tl.int32)
        tl.store(positions + count + tl.cumsum(one, 0) - one, place, mask=flag)
        count += tl.sum(one, 0)
    return count


@triton.jit
def _list_wanted(wanted, source, target, source_list, target_list, counts, width, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64)
    first = pair * width
    count = tl.full((), 0, tl.int32)
    for start in range(0, width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        flag = tl.load(wanted + first + place, mask=place < width, other=0) != 0
        one = flag.to(tl.int32)
        to = first + count + tl.cumsum(one, 0) - one
        tl.store(source_list + to, tl.load(source + first + place, mask=flag, other=0).to(tl.int32), mask=flag)
        tl.store(target_list + to, tl.load(target + first + place, mask=flag, other=0).to(tl.int32), mask=flag)
        count += tl.sum(one, 0)
    tl.store(counts + pair, count)


@triton.jit
def _table_row(seats, pair, groups):
    return tl.load(seats + pair // groups).to(tl.int64) * groups + pair % groups


@triton.jit
def _look_up(tokens, seats, slot_of_token, last_used, now, slots, missing, groups, width, span, slot_count, BLOCK: tl.constexpr):
    pair = tl.program_id(0)
    row = _table_row(seats, pair, groups)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < width
    at = pair.to(tl.int64) * width + entry
    token = tl.load(tokens + at, mask=inside, other=-1).to(tl.int64)
    wanted = token >= 0
    slot = tl.load(slot_of_token + row * span + token, mask=wanted, other=-1)
    tl.store(last_used + row * slot_count + slot, tl.load(now), mask=slot >= 0)
    tl.store(slots + at, slot.to(tl.int64), mask=inside)
    tl.store(missing + at, (wanted & (slot < 0)).to(tl.uint8), mask=inside)


@triton.jit
def _list(seats, last_used, now, missing, free, ages, misses, counts, groups, width, slot_count, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        used = last_used + _table_row(seats, pair, groups) * slot_count
        step = tl.load(now)
        first = pair * slot_count
        count = tl.full((), 0, tl.int32)
        for start in range(0, slot_count, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            age = tl.load(used + slot, mask=slot < slot_count, other=0)
            flag = (age != step) & (slot < slot_count)
            one = flag.to(tl.int32)
            place = count + tl.cumsum(one, 0) - one
            tl.store(free + first + place, slot, mask=flag)
            tl.store(ages + first + place, age, mask=flag)
            count += tl.sum(one, 0)
        tl.store(counts + 2 * pair, count)
    else:
        tl.store(counts + 2 * pair + 1, list_flagged(missing + pair * width, width, misses + pair * width, BLOCK))


@triton.jit
def _assign(
    tokens, seats, slot_of_token, token_of_slot, last_used, now, slots, free, ages, misses, counts,
    groups, width, span, slot_count, BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    free_count = tl.load(counts + 2 * pair)
    miss_count = tl.load(counts + 2 * pair + 1)
    if (first < free_count) & (miss_count > 0):
        listed = ages + pair * slot_count
        place = first + tl.arange(0, BLOCK)
        inside = place < free_count
        age = tl.load(listed + place, mask=inside, other=0)
        before = tl.zeros((BLOCK, OTHERS), tl.int32)
        for start in range(0, free_count, OTHERS):
            other = start + tl.arange(0, OTHERS)
            other_age = tl.load(listed + other, mask=other < free_count, other=2147483647)[None, :]
            older = (other_age < age[:, None]) | ((other_age == age[:, None]) & (other[None, :] < place[:, None]))
            before += older.to(tl.int32)
        rank = tl.sum(before, 1)
        chosen = inside & (rank < miss_count)
        row = _table_row(seats, pair, groups)
        slot = tl.load(free + pair * slot_count + place, mask=chosen, other=0)
        at = pair * width + tl.load(misses + pair * width + rank, mask=chosen, other=0)
        token = tl.load(tokens + at, mask=chosen, other=0).to(tl.int64)
        held = token_of_slot + row * slot_count + slot
        evicted = tl.load(held, mask=chosen, other=-1)
        tl.store(slot_of_token + row * span + evicted, -1, mask=evicted >= 0)
        tl.store(slot_of_token + row * span + token, slot, mask=chosen)
        tl.store(held, token.to(tl.int32), mask=chosen)
        tl.store(last_used + row * slot_count + slot, tl.load(now), mask=chosen)
        tl.store(slots + at, slot.to(tl.int64), mask=chosen)


@triton.jit
def piece_of(pages, entry, head, live, PAGE: tl.constexpr, HEADS: tl.constexpr):
    """The piece of an entry of a seat, from the seat's pages: see `specontext.kernels.tables.Pages`."""
    page = tl.load(pages + entry // PAGE, mask=live, other=0).to(tl.int64)
    return (page * PAGE + entry % PAGE) * HEADS + head


@triton.jit(do_not_specialize=["requests", "seat_count", "token_width", "slot_width"])
def _rows(
    tokens, slots, token_pages, slot_pages, resident, seats, head_map, rows,
    requests, groups, width, seat_count, token_width, slot_width,
    PAGE: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    reader = tl.program_id(0)
    head = reader % HEADS
    request = reader // HEADS % requests
    layer = (reader // HEADS // requests).to(tl.int64)
    pair = (request * groups + tl.load(head_map + layer * HEADS + head)).to(tl.int64)
    seat = layer * seat_count + tl.load(seats + request)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    if tl.load(resident + layer) != 0:
        entry = tl.load(tokens + pair * width + column, mask=inside, other=-1)
        row = piece_of(token_pages + seat * token_width, entry, head, entry >= 0, PAGE, HEADS)
    else:
        entry = tl.load(slots + pair * width + column, mask=inside, other=-1)
        row = piece_of(slot_pages + seat * slot_width, entry, head, entry >= 0, PAGE, HEADS)
    row = tl.where(entry >= 0, row, -1)
    tl.store(rows + reader.to(tl.int64) * width + column, row.to(tl.int32), mask=inside)


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

"""Triton kernels of `top_k_positions` and, at the end, of `selected_tokens`. The first looks for the k-th greatest score by its
bits: those of a float32 that is not negative, read as an integer, have its order.

A row of up to `HELD` scores is held by one program, in one launch. It asks for one bit after the other how many scores are as
great as that: 31 sums at most, and none from where just k are left. Counts by digits are fewer sums, but each costs such a
program more than the bits of a digit do.

Longer rows have several programs, and five launches. Four count, among the scores whose leading digits are those of the k-th
greatest, how often each next digit occurs (8, 8, 8 and 7 bits, the greatest first); every program of the next launch finds the
digit from these counts by itself. The last launch writes the positions, ascending: the fourth left for every part of a row how
many scores reach each last digit, so each part knows its first place from a few numbers.

Bytes: the scores once, or five times, from the L2 cache where they fit, and 4 KB of counts a row. Sums are of integers, so
nothing depends on the order in which programs run.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specontext.kernels.top_k import ALWAYS
from specontext.kernels.triton.token_choice import best_tokens as best_tokens  # its kernels share parts of rows with draws

HELD = 8192  # scores of a row that one program holds in registers, 16 a thread: of pages of 16 tokens, 128K tokens
BLOCK = 1024  # scores of one step of a program of longer rows
MOST_PARTS = 256  # programs of a row
PLACES = 1024  # of a set that a program of `selected_tokens` fills
ROW_COUNTS = tl.constexpr(4 * 256)  # counts of the four digits
LAST_DIGITS = tl.constexpr(128)
REACHES = tl.constexpr(129)  # for each last digit, and beyond them


@triton.jit
def _load_keys(scores, position, span):
    """Integers in the order of the scores; -1 for negative ones and beyond the row."""
    score = tl.load(scores + position, mask=position < span, other=-1.0).to(tl.float32)
    return tl.where(score >= 0.0, score.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)


@triton.jit
def _leading_digits(counts, k, DIGITS: tl.constexpr):
    """The leading digits of the k-th greatest key, and how many of the keys with these digits are among the k greatest.

    All digits are 0 where there are fewer than k keys.
    """
    found = 0
    room = k
    for i in tl.static_range(DIGITS):
        value = tl.arange(0, 256)
        count = tl.load(counts + i * 256 + value)
        reach = tl.sum(count, 0) - tl.cumsum(count, 0) + count  # keys with this digit or a greater one
        digit = tl.max(tl.where(reach >= room, value, 0), 0)
        room -= tl.sum(tl.where(value > digit, count, 0), 0)
        found = found * (256 if i < 3 else 128) + digit
    return found, room


@triton.jit
def _write(chosen, position, greater, same, above, equal, skipped):
    """Write those positions of a row that are chosen: greater ones, and equal ones but for the first `skipped` of the row.

    Before these positions the row has `above` greater and `equal` equal ones.
    """
    both = tl.cumsum(greater.to(tl.int32) + (same.to(tl.int32) << 16), 0)
    sames = equal + (both >> 16)
    place = above + (both & 0xFFFF) + tl.maximum(sames - skipped, 0) - 1
    tl.store(chosen + place, position.to(tl.int64), mask=greater | (same & (sames > skipped)))


@triton.jit
def _pad(chosen, taken, k, BLOCK: tl.constexpr):
    for first in range(taken // BLOCK * BLOCK, k, BLOCK):
        place = first + tl.arange(0, BLOCK)
        tl.store(chosen + place, tl.full([BLOCK], -1, tl.int64), mask=(place >= taken) & (place < k))


@triton.jit(do_not_specialize=["parts", "k"])
def _count_digits(
    scores,
    counts,
    reaches,
    span,
    chunk,
    parts,
    k,
    DIGIT: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    VALUES: tl.constexpr = 1 << BITS
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    scores += row * span
    counts += row * ROW_COUNTS
    leading, _ = _leading_digits(counts, k, DIGIT)
    value = tl.arange(0, VALUES)
    total = tl.zeros([VALUES], tl.int32)
    above = 0
    for first in range(part * chunk, tl.minimum(part * chunk + chunk, span), BLOCK):
        key = _load_keys(scores, first + tl.arange(0, BLOCK), span)
        head = key >> (SHIFT + BITS)  # 0 for every key at the first digit, -1 for what is no key
        hit = head == leading
        hits = tl.sum(hit.to(tl.int32), 0)
        if hits > 0:
            # What is no hit is counted as digit 0 and taken off again.
            digit = tl.where(hit, (key >> SHIFT) & (VALUES - 1), 0)
            total += tl.histogram(digit, VALUES) - tl.where(value == 0, BLOCK - hits, 0)
        if DIGIT == 3:
            above += tl.sum((head > leading).to(tl.int32), 0)
    tl.atomic_add(counts + DIGIT * 256 + value, total, mask=total > 0, sem="relaxed")
    if DIGIT == 3:
        reaches += tl.program_id(0).to(tl.int64) * REACHES
        tl.store(reaches + value, above + tl.sum(total, 0) - tl.cumsum(total, 0) + total)
        tl.store(reaches + VALUES, above)


@triton.jit(do_not_specialize=["parts", "k"])
def _write_positions(scores, counts, reaches, chosen, span, chunk, parts, k, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    scores += row * span
    chosen += row * k
    least, room = _leading_digits(counts + row * ROW_COUNTS, k, 4)

    # Two-level prefix sums: of the parts before this one here, inside a part below.
    other = tl.arange(0, PARTS)
    reaches += (row * parts + other) * REACHES + least % LAST_DIGITS
    reach = tl.load(reaches, mask=other < parts, other=0)
    higher = tl.load(reaches + 1, mask=other < parts, other=0)
    equals = reach - higher
    all_equal = tl.sum(equals, 0)
    skipped = tl.maximum(all_equal - room, 0)  # the first ones of those that equal the least key are too many
    above = tl.sum(tl.where(other < part, higher, 0), 0)
    equal = tl.sum(tl.where(other < part, equals, 0), 0)

    if part == 0:
        _pad(chosen, tl.sum(higher, 0) + all_equal - skipped, k, BLOCK)
    for first in range(part * chunk, tl.minimum(part * chunk + chunk, span), BLOCK):
        position = first + tl.arange(0, BLOCK)
        key = _load_keys(scores, position, span)
        greater = key > least
        same = key == least
        _write(chosen, position, greater, same, above, equal, skipped)
        above += tl.sum(greater.to(tl.int32), 0)
        equal += tl.sum(same.to(tl.int32), 0)


@triton.jit(do_not_specialize=["k"])
def _held_row(scores, chosen, span, k, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chosen += row * k
    position = tl.arange(0, BLOCK)
    key = _load_keys(scores + row * span, position, span)
    # The greatest key that k or more reach, or one that just k do; 0 where there are not k of them.
    least = 0
    reached = tl.sum((key >= 0).to(tl.int32), 0)
    bit = 1 << 30
    for _ in range(31):
        if reached > k:
            reach = tl.sum((key >= least + bit).to(tl.int32), 0)
            if reach >= k:
                least += bit
                reached = reach
        bit = bit // 2
    skipped = tl.maximum(reached - k, 0)  # the first ones of those that equal it are too many
    _write(chosen, position, key > least, key == least, 0, 0, skipped)
    _pad(chosen, reached - skipped, k, BLOCK)


def top_k_positions(scores: Tensor, k: int) -> Tensor:
    """See `specontext.kernels.top_k.top_k_positions`; at most 32 bits a score."""
    span = scores.shape[-1]
    rows = scores.reshape(-1, span)
    chosen = torch.empty((*scores.shape[:-1], k), dtype=torch.int64, device=scores.device)
    if chosen.numel() == 0:
        return chosen
    rows = rows.contiguous()
    if span <= HELD:
        block = max(256, triton.next_power_of_2(span))
        _held_row[(len(rows),)](rows, chosen, span, k, BLOCK=block, num_warps=min(max(4, block // 256), 16))
        return chosen
    chunk = BLOCK * triton.next_power_of_2(triton.cdiv(span, BLOCK * MOST_PARTS))
    parts = triton.cdiv(span, chunk)
    counts = torch.zeros(len(rows) * ROW_COUNTS.value, dtype=torch.int32, device=rows.device)
    reaches = torch.empty(len(rows) * parts * REACHES.value, dtype=torch.int32, device=rows.device)
    grid = (len(rows) * parts,)
    for digit, (shift, bits) in enumerate(((23, 8), (15, 8), (7, 8), (0, 7))):
        _count_digits[grid](
            rows, counts, reaches, span, chunk, parts, k, DIGIT=digit, SHIFT=shift, BITS=bits, BLOCK=BLOCK, num_warps=4
        )
    padded = triton.next_power_of_2(parts)
    _write_positions[grid](rows, counts, reaches, chosen, span, chunk, parts, k, BLOCK=BLOCK, PARTS=padded, num_warps=4)
    return chosen


def selected_tokens(
    scored: Tensor, lengths: Tensor, ends: Tensor | None, *, sink: int, width: int, whole: int = 0
) -> tuple[Tensor, Tensor]:
    """See `specontext.kernels.top_k.selected_tokens`: one launch for what takes the reference some thirty, each as long.

    Reads 8 bytes a place that was chosen, and writes 9 a place.
    """
    requests, groups, count = scored.shape
    size = sink + count + width
    tokens = torch.empty((requests, groups, size), dtype=torch.int64, device=lengths.device)
    by_score = torch.empty((requests, groups, size), dtype=torch.bool, device=lengths.device)
    if tokens.numel():
        lengths = lengths.contiguous()
        _sets[(requests * groups, triton.cdiv(size, PLACES))](
            scored,
            *scored.stride(),
            lengths,
            lengths if ends is None else ends.contiguous(),
            tokens,
            by_score.view(torch.uint8),
            groups,
            sink,
            count,
            width,
            min(whole, ALWAYS - 1),
            ENDS=ends is not None,
            WHOLE=2 if whole == ALWAYS else int(whole > 0),
            BLOCK=PLACES,
        )
    return tokens, by_score


@triton.jit
def _sets(
    scored,
    by_request,
    by_group,
    by_place,
    lengths,
    ends,
    tokens,
    by_score,
    groups,
    sink,
    count,
    width,
    whole,
    ENDS: tl.constexpr,  # the ends of the candidates are given
    WHOLE: tl.constexpr,  # 0: what was chosen counts; 1: in contexts of more than `whole` tokens; 2: nowhere
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    request, group = row // groups, row % groups
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    size = sink + count + width
    length = tl.load(lengths + request)
    if ENDS:
        end = tl.load(ends + request)
    else:
        end = tl.maximum(length - width, sink)
    number = place - sink
    candidate = (number >= 0) & (number < count)
    if WHOLE > 0:
        window = tl.maximum(end - count, sink) + number
        last = tl.where(window < end, window, -1)
    if WHOLE == 2:
        chosen = last
    else:
        at = scored + request * by_request + group * by_group + number * by_place
        chosen = tl.load(at, mask=candidate, other=-1)
        if WHOLE == 1:
            chosen = tl.where(length > whole, chosen, last)
    fixed = tl.where(place < sink, place.to(tl.int64), end + (number - count))
    fixed = tl.where(fixed < length, fixed, -1)
    tl.store(tokens + row * size + place, tl.where(candidate, chosen, fixed), mask=place < size)
    tl.store(by_score + row * size + place, (candidate & (chosen >= 0)).to(tl.uint8), mask=place < size)

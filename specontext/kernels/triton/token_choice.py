"""Triton kernels of `best_tokens` and `draw_tokens`: nothing is sorted, and two launches draw the tokens of all rows.

The first has several programs a row. A row without top-k and top-p is drawn from there: each program finds the best of its
part. Of other rows it takes the mass, and the greatest logit of each group of some tens. The second has one program a row. No
token that is among the `NEAR` most likely ones is below the `NEAR`-th of these greatest logits, so the few groups that reach
it are read again, and their tokens from there on listed. Each is compared with each, which gives its rank and the mass above
it, and the best draw of those that are candidates is the row's. That is all where top-k is small, or where the list has the
mass of top-p.

Where distributions are flatter the program draws from the whole row, and asks how many tokens and how much mass rank above
what it drew. If that is too much, nothing from there on is a candidate, and it draws from what ranks above. The first draw
that is a candidate is the best of all candidates, since what was drawn from held them all. With top-p that takes a round or
two.

Sums are of integers, so nothing depends on the order in which programs run.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from specontext.kernels.dispatch import upload
from specontext.kernels.token_choice import Draw

CHUNK = 4096  # logits of a program, at least
MOST_CHUNKS = 64  # of a row
BLOCK = 1024  # logits of one step of a program
MOST_GROUPS = 4096  # of a row
NEAR = 256  # so many of the most likely tokens are listed, or as many as top-k says where that is less
LISTED = 512  # places of the list, since others are as likely as its last ones

NUMBERS: tl.constexpr = tl.constexpr(3)  # temperature, floor, top_p
INTS: tl.constexpr = tl.constexpr(5)  # row, limit, seed, output, position
COMPARED: tl.constexpr = tl.constexpr(16)  # tokens that all listed ones are compared with at a time
LEADING: tl.constexpr = tl.constexpr(16)  # bits of a key that groups are compared by
UNIT: tl.constexpr = tl.constexpr(2.0**40)
GOLDEN: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
FIRST: tl.constexpr = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
SECOND: tl.constexpr = tl.constexpr(0x94D049BB133111EB - (1 << 64))
SMALLEST: tl.constexpr = tl.constexpr(2.0**-52)
NO_TOKEN: tl.constexpr = tl.constexpr(1 << 30)
NO_MASS: tl.constexpr = tl.constexpr(2.0**62)  # more than there is
TOKENS: tl.constexpr = tl.constexpr(1 << 31)
LAST_TOKEN: tl.constexpr = tl.constexpr((1 << 31) - 1)


def best_tokens(logits: Tensor) -> Tensor:
    """See `specontext.kernels.top_k.best_tokens`. Reads the logits once, in two launches."""
    rows, size = logits.shape
    chunk, chunks = _parts(logits)
    found = torch.empty((3, rows), dtype=torch.int64, device=logits.device)
    best = torch.empty((rows, chunks), dtype=torch.float32, device=logits.device)
    token = torch.empty((rows, chunks), dtype=torch.int32, device=logits.device)
    if rows:
        _best_of_parts[(rows, chunks)](logits, best, token, size, logits.stride(0), CHUNK=chunk, BLOCK=min(BLOCK, chunk))
        _best_of_rows[(rows,)](best, token, found, rows, chunks, PLACES=triton.next_power_of_2(chunks))
    return found


def draw_tokens(logits: Tensor, tokens: Tensor, draws: Sequence[Draw]) -> None:
    """See `specontext.kernels.token_choice.draw_tokens`. Reads the logits once, and of rows with limits some groups again; where
    few tokens do not decide all, two or three times, and nine times more where top-p is of what a top-k above `NEAR` leaves."""
    if not draws:
        return
    count, size, device = len(draws), logits.shape[1], logits.device
    chunk, chunks = _parts(logits)
    group = triton.next_power_of_2(triton.cdiv(size, MOST_GROUPS))
    groups = chunks * chunk // group
    numbers = upload([draw.numbers() for draw in draws], torch.float64, device)
    ints = upload([(d.row, d.limit(size), d.seed, d.output, d.position) for d in draws], torch.int64, device)
    values = torch.empty((count, chunks), dtype=torch.float64, device=device)
    sums = torch.empty((count, chunks), dtype=torch.int64, device=device)  # a part's mass, or the rank of what it drew
    greatest = torch.empty((count, groups), dtype=torch.int32, device=device)
    listed = torch.empty((3, count, LISTED), dtype=torch.int64, device=device)  # groups; ranks and masses of tokens
    given = (logits, tokens, numbers, ints, size, logits.stride(0), values, sums, greatest)
    _survey[(count, chunks)](*given, groups, CHUNK=chunk, BLOCK=min(BLOCK, chunk), GROUP=group, num_warps=8)
    places = {"PARTS": triton.next_power_of_2(chunks), "GROUPS": triton.next_power_of_2(groups), "LISTED": LISTED}
    _choose[(count,)](*given, groups, chunks, listed, GROUP=group, BLOCK=BLOCK, NEAR=NEAR, **places, num_warps=16)


def _parts(logits: Tensor) -> tuple[int, int]:
    """Logits of a row that a program has, a power of two, and how many such programs there are."""
    assert logits.stride(1) == 1
    size = logits.shape[1]
    chunk = max(CHUNK, triton.next_power_of_2(triton.cdiv(size, MOST_CHUNKS)))
    return chunk, triton.cdiv(size, chunk)


# What is known of a logit ----------------------------------------------------------------------------------------------


@triton.jit
def _load_logits(logits, token, size):
    """Logits as float32; what is no number counts as minus infinity, as what is behind the row does."""
    x = tl.load(logits + token, mask=token < size, other=float("-inf")).to(tl.float32)
    return tl.where(x == x, x, float("-inf"))


@triton.jit
def _key(x):
    """int64 in the order of float32 logits, of 32 bits."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # adding zero turns -0.0 into 0.0
    return tl.where(bits < 0, -1 - bits.to(tl.int64), bits.to(tl.int64) + 2147483648)


@triton.jit
def _logit(key):
    """The logit with a key."""
    bits = tl.where(key < 2147483648, -1 - key, key - 2147483648)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _rank(key, token):
    """int64 that is greater, the more likely a token is; the first among equals is the greatest."""
    return key * TOKENS + (token ^ LAST_TOKEN)


@triton.jit
def _token(rank):
    return (rank & LAST_TOKEN) ^ LAST_TOKEN


@triton.jit
def _mass(x, top, temperature, floor):
    """Integer share of the mass, and the score, of logits: 2^40 and 0 for the greatest one."""
    score = (x.to(tl.float64) - top) / temperature
    share = tl.exp(score) * UNIT
    return tl.where((share == share) & (score >= floor), share, 0.0).to(tl.int64), score


@triton.jit
def _shifted(x, BITS: tl.constexpr):
    return (x.to(tl.uint64, bitcast=True) >> BITS).to(tl.int64, bitcast=True)


@triton.jit
def _mix(x):
    """See `specontext.kernels.counter_random.mix`."""
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


@triton.jit
def _noise(seed, output, position, token):
    """See `specontext.kernels.token_choice.gumbel`."""
    key = _mix(seed + GOLDEN)
    key = _mix((key ^ output) + GOLDEN)
    key = _mix((key ^ position) + GOLDEN)
    bits = _shifted(_mix(key + (token + 1).to(tl.int64) * GOLDEN), 12)
    uniform = (bits.to(tl.float64) + 0.5) * SMALLEST
    return -tl.log(-tl.log(1.0 - uniform))  # the difference is exact


# The most likely token --------------------------------------------------------------------------------------------------


@triton.jit
def _best_of_parts(logits, best, token, size, stride, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """The greatest logit of each part and the first token that has it; NaN where the part has one."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = part * CHUNK + tl.arange(0, BLOCK)
    greatest, first = tl.full([BLOCK], float("-inf"), tl.float32), lane
    broken = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, CHUNK, BLOCK):
        place = lane + begin
        x = tl.load(logits + row * stride + place, mask=place < size, other=float("-inf")).to(tl.float32)
        broken = tl.where(x == x, broken, 1)
        first = tl.where(x > greatest, place, first)
        greatest = tl.where(x > greatest, x, greatest)
    top = tl.max(greatest, 0)
    at = row * tl.num_programs(1) + part
    tl.store(best + at, tl.where(tl.max(broken, 0) > 0, float("nan"), top))
    tl.store(token + at, tl.min(tl.where(greatest == top, first, NO_TOKEN), 0))


@triton.jit(do_not_specialize=["rows", "parts"])
def _best_of_rows(best, token, found, rows, parts, PLACES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PLACES)
    greatest = tl.load(best + row * parts + part, mask=part < parts, other=float("-inf"))
    first = tl.load(token + row * parts + part, mask=part < parts, other=NO_TOKEN)
    broken = tl.max(tl.where(greatest == greatest, 0, 1), 0)
    greatest = tl.where(greatest == greatest, greatest, float("-inf"))
    top = tl.max(greatest, 0)
    broken = tl.where(top < float("inf"), broken, 1)
    tl.store(found + row, tl.min(tl.where(greatest == top, first, NO_TOKEN), 0).to(tl.int64))
    tl.store(found + rows + row, broken.to(tl.int64))
    tl.store(found + 2 * rows + row, tl.where((top == float("-inf")) & (broken == 0), 1, 0).to(tl.int64))


# The draw ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_draw(logits, tokens, numbers, ints, stride, draw):
    """Where a draw's row begins, its greatest logit; temperature and floor, limits of rank and of mass."""
    row = tl.load(ints + draw * INTS)
    begin = logits + row * stride
    top = tl.load(begin + tl.load(tokens + row)).to(tl.float64)
    numbers += draw * NUMBERS
    return begin, top, tl.load(numbers), tl.load(numbers + 1), tl.load(ints + draw * INTS + 1), tl.load(numbers + 2)


@triton.jit
def _load_seeds(ints, draw):
    ints += draw * INTS
    return tl.load(ints + 2), tl.load(ints + 3), tl.load(ints + 4)


@triton.jit
def _best(value, rank):
    """The greatest value, and the greatest rank of those that have it."""
    greatest = tl.max(value, 0)
    return greatest, tl.max(tl.where(value == greatest, rank, -1), 0)


@triton.jit
def _better(kept, score, token, rank, seed, output, position, greatest, winner):
    """The greater of what was found in each lane, and the scores with noise of what is kept: values and ranks."""
    value = tl.where(kept, score + _noise(seed, output, position, token), float("-inf"))
    better = (value > greatest) | ((value == greatest) & (rank > winner) & kept)
    return tl.where(better, value, greatest), tl.where(better, rank, winner)


@triton.jit(do_not_specialize=["groups"])
def _survey(
    logits, tokens, numbers, ints, size, stride, values, sums, greatest, groups,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Of a row with limits a part's mass and each group's greatest logit, by leading bits; of one with none its best draw."""
    draw, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = draw * tl.num_programs(1) + part
    begin, top, temperature, floor, limit, top_p = _load_draw(logits, tokens, numbers, ints, stride, draw)
    if (limit < size) | (top_p < 1.0):
        mass = tl.zeros([BLOCK // GROUP, GROUP], tl.int64)
        group = part * (CHUNK // GROUP) + tl.arange(0, BLOCK // GROUP)
        for _ in range(0, CHUNK, BLOCK):
            token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            x = _load_logits(begin, token, size)
            tl.store(greatest + draw * groups + group, tl.max(tl.where(token < size, _key(x) >> LEADING, -1), 1).to(tl.int32))
            if top_p < 1.0:
                mass += _mass(x, top, temperature, floor)[0]
            group += BLOCK // GROUP
        tl.store(sums + at, tl.sum(tl.sum(mass, 1), 0))
    else:
        seed, output, position = _load_seeds(ints, draw)
        lane = part * CHUNK + tl.arange(0, BLOCK)
        value = tl.full([BLOCK], float("-inf"), tl.float64)
        winner = tl.full([BLOCK], -1, tl.int64)
        for first in range(0, CHUNK, BLOCK):
            token = lane + first
            x = _load_logits(begin, token, size)
            score = (x.to(tl.float64) - top) / temperature
            kept = (token < size) & (score >= floor)
            if tl.max(kept.to(tl.int32), 0) > 0:
                value, winner = _better(kept, score, token, _rank(_key(x), token), seed, output, position, value, winner)
        found, rank = _best(value, winner)
        tl.store(values + at, found)
        tl.store(sums + at, rank)


@triton.jit(do_not_specialize=["groups", "parts"])
def _choose(
    logits, tokens, numbers, ints, size, stride, values, sums, greatest, groups, parts, listed,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, NEAR: tl.constexpr,
    PARTS: tl.constexpr, GROUPS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """The token: of a row with limits by its likely tokens if they decide, else by all; with none the best of its parts."""
    draw, draws = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    begin, top, temperature, floor, limit, top_p = _load_draw(logits, tokens, numbers, ints, stride, draw)
    part = tl.arange(0, PARTS)
    if (limit < size) | (top_p < 1.0):
        seed, output, position = _load_seeds(ints, draw)
        total = tl.sum(tl.load(sums + draw * parts + part, mask=part < parts, other=0), 0)
        list_of, ranks, shares = listed + draw * LISTED, listed + (draws + draw) * LISTED, listed + (2 * draws + draw) * LISTED
        near = tl.minimum(limit, NEAR).to(tl.int32)
        count = _list_likely(
            begin, top, temperature, floor, size, greatest + draw * groups, groups, near, list_of, ranks, shares,
            GROUP, BLOCK, GROUPS, LISTED,
        )  # fmt: skip
        place = tl.arange(0, LISTED)
        there = place < count
        rank = tl.load(ranks + place, mask=there, other=-1)
        share = tl.load(shares + place, mask=there, other=0)
        before, above = _before(rank, ranks, shares, tl.minimum(count, LISTED), LISTED)
        inside = there & (before < limit)
        mass = tl.sum(tl.where(inside, share, 0), 0)  # of all that top-k leaves, if that is listed
        ranked = (limit <= NEAR) | (count == size)
        enough = _enough(top_p, tl.where(ranked, mass, total))
        if (count <= LISTED) & (ranked | ((limit >= size) & (mass >= enough))):
            score = (_logit(rank >> 31).to(tl.float64) - top) / temperature
            kept = inside & (above < enough) & (score >= floor)
            value, winner = tl.full([LISTED], float("-inf"), tl.float64), rank
            value, winner = _better(kept, score, _token(rank), rank, seed, output, position, value, winner)
            winner = _best(value, winner)[1]
            _store_token(tokens, ints, draw, winner)
        else:
            if (limit < size) & (top_p < 1.0):
                total = _mass_of_likely(begin, top, temperature, floor, size, limit, BLOCK)
            enough = _enough(top_p, total)
            winner = _first_candidate(begin, top, temperature, floor, size, limit, enough, seed, output, position, BLOCK)
            _store_token(tokens, ints, draw, winner)
    else:
        value = tl.load(values + draw * parts + part, mask=part < parts, other=float("-inf"))
        winner = _best(value, tl.load(sums + draw * parts + part, mask=part < parts, other=-1))[1]
        _store_token(tokens, ints, draw, winner)


@triton.jit
def _enough(top_p, total):
    """A token above which there is so much mass is no candidate."""
    return tl.where(top_p < 1.0, tl.ceil(top_p * total.to(tl.float64)), NO_MASS).to(tl.int64)


@triton.jit
def _store_token(tokens, ints, draw, rank):
    """A row without a candidate, which is broken, keeps its token."""
    tl.store(tokens + tl.load(ints + draw * INTS), _token(rank), mask=rank >= 0)


# Few tokens that decide ---------------------------------------------------------------------------------------------------


@triton.jit
def _list_likely(
    begin, top, temperature, floor, size, greatest, groups, near, list_of, ranks, shares,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """List ranks and masses of the `near` most likely tokens and those about as likely as the last: how many they are. More than
    `LISTED` are not listed."""
    group = tl.arange(0, GROUPS)
    leading = tl.load(greatest + group, mask=group < groups, other=-1)
    least, bit = tl.zeros([], tl.int32), tl.full([], 1 << 15, tl.int32)
    for _ in range(0, LEADING):
        enough = tl.sum((leading >= least + bit).to(tl.int32), 0) >= near
        least, bit = tl.where(enough, least + bit, least), bit >> 1
    reaching = (leading >= least) & (group < groups)
    at = tl.cumsum(reaching.to(tl.int32), 0) - 1
    tl.store(list_of + at, group.to(tl.int64), mask=reaching & (at < LISTED))
    reached = tl.sum(reaching.to(tl.int32), 0)
    count = tl.zeros([], tl.int32)
    if reached <= LISTED:
        tl.debug_barrier()  # others have stored what a lane loads
        for first in range(0, reached * GROUP, BLOCK):
            lane = first + tl.arange(0, BLOCK)
            there = lane // GROUP < reached
            token = tl.load(list_of + lane // GROUP, mask=there, other=0).to(tl.int32) * GROUP + lane % GROUP
            x = _load_logits(begin, token, size)
            key = _key(x)
            hit = there & (token < size) & ((key >> LEADING) >= least)
            place = count + tl.cumsum(hit.to(tl.int32), 0) - 1
            listed = hit & (place < LISTED)
            tl.store(ranks + place, _rank(key, token), mask=listed)
            tl.store(shares + place, _mass(x, top, temperature, floor)[0], mask=listed)
            count = tl.max(place, 0) + 1
        tl.debug_barrier()
    return tl.where(reached <= LISTED, count, LISTED + 1)


@triton.jit
def _before(rank, ranks, shares, count, LISTED: tl.constexpr):
    """How many of the listed tokens are more likely than each, and their mass."""
    before, above = tl.zeros([LISTED], tl.int32), tl.zeros([LISTED], tl.int64)
    for first in range(0, count, COMPARED):
        place = first + tl.arange(0, COMPARED)
        other = tl.load(ranks + place, mask=place < count, other=-1)
        share = tl.load(shares + place, mask=place < count, other=0)
        more = other[None, :] > rank[:, None]
        before += tl.sum(more.to(tl.int32), 1)
        above += tl.sum(tl.where(more, share[None, :], 0), 1)
    return before, above


# Many tokens ------------------------------------------------------------------------------------------------------------


@triton.jit
def _first_candidate(begin, top, temperature, floor, size, limit, enough, seed, output, position, BLOCK: tl.constexpr):
    """Rank of the best draw of a whole row, then of what ranks above that, until what ranks above is neither `limit` tokens nor
    `enough` mass; -1 if nothing can be drawn."""
    drawn, winner = tl.full([], -1, tl.int64), tl.full([], -1, tl.int64)
    left = tl.full([], 1, tl.int32)
    while left > 0:
        value = tl.full([BLOCK], float("-inf"), tl.float64)
        best = tl.full([BLOCK], -1, tl.int64)
        mass, count = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int32)
        for first in range(0, size, BLOCK):
            token = first + tl.arange(0, BLOCK)
            x = _load_logits(begin, token, size)
            rank = _rank(_key(x), token)
            inside = (token < size) & (rank > drawn)
            if tl.max(inside.to(tl.int32), 0) > 0:
                share, score = _mass(x, top, temperature, floor)
                mass += tl.where(inside, share, 0)
                count += inside.to(tl.int32)
                value, best = _better(inside & (score >= floor), score, token, rank, seed, output, position, value, best)
        accepted = (drawn >= 0) & (tl.sum(count, 0) < limit) & (tl.sum(mass, 0) < enough)
        winner = tl.where(accepted, drawn, winner)
        drawn = _best(value, best)[1]
        left = tl.where(accepted | (drawn < 0), 0, 1)
    return winner


@triton.jit
def _mass_of_likely(begin, top, temperature, floor, size, limit, BLOCK: tl.constexpr):
    """Mass of the `limit` most likely tokens of a row. The key of the last one is found by four bits a round over the row."""
    least, unit = tl.zeros([], tl.int64), tl.full([], 1 << 28, tl.int64)
    for _ in range(0, 8):
        keys = least + tl.arange(0, 16).to(tl.int64) * unit
        counts = tl.zeros([BLOCK, 16], tl.int32)
        for first in range(0, size, BLOCK):
            token = first + tl.arange(0, BLOCK)
            key = tl.where(token < size, _key(_load_logits(begin, token, size)), -1)
            counts += (key[:, None] >= keys[None, :]).to(tl.int32)
        least += (tl.sum((tl.sum(counts, 0) >= limit).to(tl.int64), 0) - 1) * unit
        unit = unit >> 4
    mass, count = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int32)
    for first in range(0, size, BLOCK):
        token = first + tl.arange(0, BLOCK)
        x = _load_logits(begin, token, size)
        above = (token < size) & (_key(x) > least)
        mass += tl.where(above, _mass(x, top, temperature, floor)[0], 0)
        count += above.to(tl.int32)
    equals = limit - tl.sum(count, 0)
    return tl.sum(mass, 0) + equals * _mass(_logit(least), top, temperature, floor)[0]

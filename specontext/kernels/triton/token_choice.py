"""Triton kernels of `best_tokens` and `draw_tokens`: nothing is sorted, and parts of a row have programs of their own.

Candidates are a prefix of the ranking, so what is looked for is its end: the least logit of a candidate, and how many of those
that equal it are. Logits are read as integers that have their order (`_key`), and each launch of `_tally` finds four more bits of
that one: every program adds up, for the logits of its part that begin as those bits do, masses and counts by the next four. The
next launch looks in these sums for the place where the row's limit is reached: as many tokens as `top_k` says, then as much mass
as `top_p` says. That are four launches for bfloat16 and eight for other formats; parts without such a logit are passed over after
the first. In the end each program draws the best of its candidates, and the best of a row's programs is its token.

Sums are of integers, so nothing depends on the order in which programs run. Bytes: the logits once a launch, from the L2 cache
where they fit.
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
TALLIED = 256  # of one that adds up by digits

DIGIT_BITS: tl.constexpr = tl.constexpr(4)
DIGITS: tl.constexpr = tl.constexpr(16)
NUMBERS: tl.constexpr = tl.constexpr(3)  # temperature, floor, top_p
INTS: tl.constexpr = tl.constexpr(5)  # row, limit, seed, output, position
STATE: tl.constexpr = tl.constexpr(3)  # least key of what is looked at; mass and count above it
CUT: tl.constexpr = tl.constexpr(4)  # the end's key, its digit, how many of its equals are candidates, all mass up to there
UNIT: tl.constexpr = tl.constexpr(2.0**40)
GOLDEN: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
FIRST: tl.constexpr = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
SECOND: tl.constexpr = tl.constexpr(0x94D049BB133111EB - (1 << 64))
SMALLEST: tl.constexpr = tl.constexpr(2.0**-52)
NO_TOKEN: tl.constexpr = tl.constexpr(1 << 30)


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
    """See `specontext.kernels.token_choice.draw_tokens`. Reads the logits once, and for each limit that anybody has four or eight
    times more; besides 6 KB of sums a row and launch."""
    if not draws:
        return
    count, size, device = len(draws), logits.shape[1], logits.device
    chunk, chunks = _parts(logits)
    numbers = upload([draw.numbers() for draw in draws], torch.float64, device)
    ints = upload([(d.row, d.limit(size), d.seed, d.output, d.position) for d in draws], torch.int64, device)
    half = logits.dtype == torch.bfloat16  # whose bits are the leading ones of a float32
    bits = DIGIT_BITS.value
    passes = (16 if half else 32) // bits
    states = torch.empty((2, passes, count, STATE.value), dtype=torch.int64, device=device)
    masses = torch.empty((2, passes, count, chunks, DIGITS.value), dtype=torch.int64, device=device)
    counts = torch.empty(masses.shape, dtype=torch.int32, device=device)
    cuts = torch.empty((2, count, CUT.value), dtype=torch.int64, device=device)
    given = (logits, tokens, numbers, ints, size, logits.stride(0), chunks)
    sums, places = (states, masses, counts, cuts), triton.next_power_of_2(chunks)
    for by_mass in (False, True):
        if not any(draw.top_p < 1 if by_mass else draw.limit(size) < size for draw in draws):
            continue
        stage = {"BY_MASS": by_mass, "HALF": half, "PLACES": places}
        for number in range(passes):
            shift = (passes - 1 - number) * bits
            _tally[(count, chunks)](*given, *sums, number, shift, passes, CHUNK=chunk, BLOCK=min(TALLIED, chunk), **stage)
        _cut_off[(count,)](*given, *sums, passes, **stage)
    best = torch.empty((count, chunks), dtype=torch.float64, device=device)
    key = torch.empty((count, chunks), dtype=torch.int64, device=device)
    token = torch.empty((count, chunks), dtype=torch.int32, device=device)
    found = (best, key, token)
    sizes = {"CHUNK": chunk, "BLOCK": min(BLOCK, chunk), "HALF": half, "PLACES": places}
    _draw_in_parts[(count, chunks)](*given, counts, cuts, *found, passes, **sizes)
    _draw_of_rows[(count,)](*found, ints, tokens, chunks, PLACES=places)


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
def _key(x, HALF: tl.constexpr):
    """int64 in the order of float32 logits, at least 0; of 16 bits where they come from so many."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # adding zero turns -0.0 into 0.0
    key = tl.where(bits < 0, -1 - bits.to(tl.int64), bits.to(tl.int64) + 2147483648)
    return key >> 16 if HALF else key


@triton.jit
def _logit(key, HALF: tl.constexpr):
    """The logit with a key, one of those that a row has."""
    if HALF:
        key = key << 16
        negative = key < 2147483648
        key = tl.where(negative, key + 65535, key)  # the bits that were cut off were ones there
    else:
        negative = key < 2147483648
    bits = tl.where(negative, -1 - key, key - 2147483648)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


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


# Where the candidates end -----------------------------------------------------------------------------------------------


@triton.jit
def _wants(numbers, ints, draw, size, BY_MASS: tl.constexpr):
    """Whether a draw has the limit of this stage."""
    if BY_MASS:
        return tl.load(numbers + draw * NUMBERS + 2) < 1.0
    return tl.load(ints + draw * INTS + 1) < size


@triton.jit
def _enough(numbers, ints, masses, cuts, draw, draws, size, parts, passes, BY_MASS: tl.constexpr, PLACES: tl.constexpr):
    """What there must be above a token for it to be no candidate: tokens, or mass."""
    limit = tl.load(ints + draw * INTS + 1)
    if BY_MASS:
        total = tl.load(cuts + draw * CUT + 3, mask=limit < size, other=0)
        if limit >= size:
            part, digit = tl.arange(0, PLACES), tl.arange(0, DIGITS)
            at = ((passes * draws + draw) * parts + part[:, None]) * DIGITS + digit[None, :]  # of the first pass of this stage
            total = tl.sum(tl.sum(tl.load(masses + at, mask=part[:, None] < parts, other=0), 0), 0)
        limit = tl.ceil(tl.load(numbers + draw * NUMBERS + 2) * total.to(tl.float64)).to(tl.int64)
    return limit


@triton.jit
def _narrowed(states, masses, counts, at_pass, draw, draws, parts, shift, enough, BY_MASS: tl.constexpr, PLACES: tl.constexpr):
    """Where the pass with this number has found the end to lie: the least key there, the digit, mass and count above."""
    state = states + (at_pass * draws + draw) * STATE
    low, mass, count = tl.load(state), tl.load(state + 1), tl.load(state + 2)
    part, digit = tl.arange(0, PLACES), tl.arange(0, DIGITS)
    at = ((at_pass * draws + draw) * parts + part[:, None]) * DIGITS + digit[None, :]
    masses_of = tl.sum(tl.load(masses + at, mask=part[:, None] < parts, other=0), 0)
    counts_of = tl.sum(tl.load(counts + at, mask=part[:, None] < parts, other=0).to(tl.int64), 0)
    mass_above = mass + tl.sum(masses_of, 0) - tl.cumsum(masses_of, 0)  # what has a greater digit, for each digit
    count_above = count + tl.sum(counts_of, 0) - tl.cumsum(counts_of, 0)
    above = mass_above if BY_MASS else count_above
    found = tl.min(tl.where(above < enough, digit, DIGITS - 1), 0)
    mass = tl.sum(tl.where(digit == found, mass_above, 0), 0)
    count = tl.sum(tl.where(digit == found, count_above, 0), 0)
    return low + (found.to(tl.int64) << shift), found, mass, count


@triton.jit(do_not_specialize=["parts", "number", "shift", "passes"])
def _tally(
    logits, tokens, numbers, ints, size, stride, parts, states, masses, counts, cuts, number, shift, passes,
    BY_MASS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Masses and counts of a part's logits by the digit at `shift`, of those whose leading digits are the end's."""
    draw, part, draws = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(0)
    if _wants(numbers, ints, draw, size, BY_MASS):
        at_pass = (passes if BY_MASS else 0) + number
        low = tl.zeros([], tl.int64)
        mass, count = low, low
        if number > 0:
            enough = _enough(numbers, ints, masses, cuts, draw, draws, size, parts, passes, BY_MASS, PLACES)
            low, _, mass, count = _narrowed(
                states, masses, counts, at_pass - 1, draw, draws, parts, shift + DIGIT_BITS, enough, BY_MASS, PLACES
            )
        if part == 0:
            state = states + (at_pass * draws + draw) * STATE
            tl.store(state, low)
            tl.store(state + 1, mass)
            tl.store(state + 2, count)
        row = tl.load(ints + draw * INTS)
        top = tl.load(logits + row * stride + tl.load(tokens + row)).to(tl.float64)
        temperature, floor = tl.load(numbers + draw * NUMBERS), tl.load(numbers + draw * NUMBERS + 1)
        digit = tl.arange(0, DIGITS)
        mass_of = tl.zeros([BLOCK, DIGITS], tl.int64)
        count_of = tl.zeros([BLOCK, DIGITS], tl.int32)
        for begin in range(0, CHUNK, BLOCK):
            token = part * CHUNK + begin + tl.arange(0, BLOCK)
            x = _load_logits(logits + row * stride, token, size)
            key = _key(x, HALF)
            own = (key - low) >> shift
            inside = (token < size) & (key >= low) & (own < DIGITS)
            if tl.max(inside.to(tl.int32), 0) > 0:
                share, _ = _mass(x, top, temperature, floor)
                hit = inside[:, None] & (own[:, None] == digit[None, :])
                mass_of += tl.where(hit, share[:, None], 0)
                count_of += hit.to(tl.int32)
        at = ((at_pass * draws + draw) * parts + part) * DIGITS + digit
        tl.store(masses + at, tl.sum(mass_of, 0))
        tl.store(counts + at, tl.sum(count_of, 0))


@triton.jit(do_not_specialize=["parts", "passes"])
def _cut_off(
    logits, tokens, numbers, ints, size, stride, parts, states, masses, counts, cuts, passes,
    BY_MASS: tl.constexpr, HALF: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """The end of the candidates by one limit, from the last pass."""
    draw, draws = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    if _wants(numbers, ints, draw, size, BY_MASS):
        enough = _enough(numbers, ints, masses, cuts, draw, draws, size, parts, passes, BY_MASS, PLACES)
        last = (passes if BY_MASS else 0) + passes - 1
        key, digit, mass, count = _narrowed(states, masses, counts, last, draw, draws, parts, 0, enough, BY_MASS, PLACES)
        row = tl.load(ints + draw * INTS)
        top = tl.load(logits + row * stride + tl.load(tokens + row)).to(tl.float64)
        temperature, floor = tl.load(numbers + draw * NUMBERS), tl.load(numbers + draw * NUMBERS + 1)
        share, _ = _mass(_logit(key, HALF), top, temperature, floor)
        equals = enough - count
        if BY_MASS:
            missing = enough - mass
            equals = tl.where(share > 0, (missing + share - 1) // tl.maximum(share, 1), size)
        cut = cuts + ((draws if BY_MASS else 0) + draw) * CUT
        tl.store(cut, key)
        tl.store(cut + 1, digit.to(tl.int64))
        tl.store(cut + 2, equals)
        tl.store(cut + 3, mass + equals * share)


# The draw ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _end(numbers, ints, counts, cuts, draw, draws, part, parts, size, passes, BY_MASS: tl.constexpr, PLACES: tl.constexpr):
    """The end's key, -1 where there is none; how many of its equals are candidates, less those in the parts before."""
    key = tl.full([], -1, tl.int64)
    equals = tl.zeros([], tl.int64)
    if _wants(numbers, ints, draw, size, BY_MASS):
        cut = cuts + ((draws if BY_MASS else 0) + draw) * CUT
        key = tl.load(cut)
        last = (passes if BY_MASS else 0) + passes - 1
        other = tl.arange(0, PLACES)
        at = ((last * draws + draw) * parts + other) * DIGITS + tl.load(cut + 1)
        equals = tl.load(cut + 2) - tl.sum(tl.load(counts + at, mask=other < part, other=0).to(tl.int64), 0)
    return key, equals


@triton.jit
def _within(key, end, equals, inside):
    """Whether logits come before the end, and how many of the end's equals are left for the next block."""
    same = inside & (key == end)
    number = tl.cumsum(same.to(tl.int32), 0)  # from 1
    return inside & ((key > end) | (same & (number <= equals))), equals - tl.sum(same.to(tl.int64), 0)


@triton.jit(do_not_specialize=["parts", "passes"])
def _draw_in_parts(
    logits, tokens, numbers, ints, size, stride, parts, counts, cuts, best, keys, found, passes,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """The best draw among a part's candidates: its score with noise, its key, its token; minus infinity where there is none."""
    draw, part, draws = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(0)
    ranks_end, ranks = _end(numbers, ints, counts, cuts, draw, draws, part, parts, size, passes, False, PLACES)
    mass_end, masses = _end(numbers, ints, counts, cuts, draw, draws, part, parts, size, passes, True, PLACES)
    row = tl.load(ints + draw * INTS)
    top = tl.load(logits + row * stride + tl.load(tokens + row)).to(tl.float64)
    temperature, floor = tl.load(numbers + draw * NUMBERS), tl.load(numbers + draw * NUMBERS + 1)
    seed, output = tl.load(ints + draw * INTS + 2), tl.load(ints + draw * INTS + 3)
    position = tl.load(ints + draw * INTS + 4)
    lane = part * CHUNK + tl.arange(0, BLOCK)
    greatest = tl.full([BLOCK], float("-inf"), tl.float64)
    greatest_key = tl.full([BLOCK], -1, tl.int64)
    winner = lane
    for begin in range(0, CHUNK, BLOCK):
        token = lane + begin
        x = _load_logits(logits + row * stride, token, size)
        key = _key(x, HALF)
        kept, ranks = _within(key, ranks_end, ranks, token < size)
        also, masses = _within(key, mass_end, masses, token < size)
        kept &= also
        if tl.max(kept.to(tl.int32), 0) > 0:
            score = (x.to(tl.float64) - top) / temperature
            kept &= score >= floor
            value = tl.where(kept, score + _noise(seed, output, position, token), float("-inf"))
            key = tl.where(kept, key, -1)
            better = (value > greatest) | ((value == greatest) & (key > greatest_key))
            greatest = tl.where(better, value, greatest)
            greatest_key = tl.where(better, key, greatest_key)
            winner = tl.where(better, token, winner)
    _store_best(best, keys, found, draw * parts + part, greatest, greatest_key, winner)


@triton.jit
def _store_best(best, keys, found, at, value, key, token):
    """The greatest value, the greatest key of those that have it, the first token of these."""
    top = tl.max(value, 0)
    key = tl.where(value == top, key, -1)
    rank = tl.max(key, 0)
    tl.store(best + at, top)
    tl.store(keys + at, rank)
    tl.store(found + at, tl.min(tl.where((value == top) & (key == rank), token, NO_TOKEN), 0))


@triton.jit(do_not_specialize=["parts"])
def _draw_of_rows(best, keys, found, ints, tokens, parts, PLACES: tl.constexpr):
    draw = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PLACES)
    there, at = part < parts, draw * parts + part
    value = tl.load(best + at, mask=there, other=float("-inf"))
    key = tl.load(keys + at, mask=there, other=-1)
    token = tl.load(found + at, mask=there, other=NO_TOKEN)
    top = tl.max(value, 0)
    key = tl.where(value == top, key, -1)
    token = tl.where((value == top) & (key == tl.max(key, 0)), token, NO_TOKEN)
    tl.store(tokens + tl.load(ints + draw * INTS), tl.min(token, 0).to(tl.int64))

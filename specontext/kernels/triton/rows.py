# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Moving KV rows by index. A pool may be pinned host memory: its address is the same on the device, and rows cross the bus once.

Every program moves tiles of up to 16 KB, 16 bytes a thread and load, whole rows side by side, so that a few hundred of them
keep a bus busy (a round trip of some microseconds times tens of gigabytes a second is 0.1 to 0.2 MB in flight).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specontext.kernels.quantised_rows import LEAST, SCALES, SCALES_TRIED
from specontext.kernels.spans import span_of, vectors_in
from specontext.kernels.tables import NewTokens, Pages, Places, Tiers, is_quantised
from specontext.kernels.triton.pieces import (
    FP8,
    INT8,
    append_pieces,
    as_copied,
    copy_pieces,
    copy_rows,
    first_of,
    kind_of,
    number_of,
    row_tile,
    scales_at,
)
from specontext.kernels.triton.slot_plan import piece_of

__all__ = [
    "append_keys",
    "append_layer",
    "append_pieces",
    "append_tokens",
    "copy_pieces",
    "gather_rows",
    "gather_tokens",
    "quantise_tokens",
]

TILE_BYTES = 16384
FEW_ROWS, QUANTISED_ROWS = 4096, 4  # up to so many new rows, which are quantised, a program writes a few
LEAST_MAGNITUDE, TRIED = tl.constexpr(LEAST), tl.constexpr(SCALES_TRIED)
ROUNDS = tl.constexpr(12582912.0)  # 1.5 * 2^23: a small number that is added to it becomes an integer, ties to even
ROUNDS_BITS = tl.constexpr(0x4B400000)


def gather_rows(source: Tensor, source_rows: Tensor, target: Tensor, target_rows: Tensor) -> None:
    """See `specontext.kernels.rows.gather_rows`. Moves a row in and out, and 16 bytes of row numbers for each."""
    count = source_rows.numel()
    if count:
        assert source.dtype == target.dtype and source.is_contiguous() and target.is_contiguous()
        tile = row_tile(source, TILE_BYTES)
        _gather[(triton.cdiv(count, tile.rows),)](
            as_copied(source),
            source_rows.contiguous(),
            as_copied(target),
            target_rows.contiguous(),
            count,
            WIDTH=tile.width,
            BLOCK=tile.block,
            REST=tile.rest,
            SOURCE_SPAN=span_of(source),
            TARGET_SPAN=span_of(target),
            ROWS=tile.rows,
        )


def gather_tokens(pages: Pages, layer: int, seat: int, start: int, target: Tensor) -> None:
    """See `specontext.kernels.rows.gather_tokens`. Moves every row in and out; page numbers are read in place."""
    tokens = len(target)
    if not tokens:
        return
    table, (_, place) = pages.table_of(layer)[seat], pages.layers.homes[layer]
    assert table.is_contiguous() and target.shape[1] == pages.heads
    assert target.dtype == pages.rows.dtype and target.is_contiguous() and pages.rows.is_contiguous()
    tile = row_tile(pages.rows, TILE_BYTES)
    _gather_tokens[(triton.cdiv(tokens * pages.heads, tile.rows),)](
        as_copied(pages.rows),
        table,
        as_copied(target),
        tokens * pages.heads,
        start,
        place,
        PAGE=pages.size,
        PLACES=pages.layers.count,
        HEADS=pages.heads,
        WIDTH=tile.width,
        BLOCK=tile.block,
        REST=tile.rest,
        SPAN=span_of(pages.rows),
        ROWS=tile.rows,
    )


def append_tokens(pages: Pages, layer: int, new: NewTokens) -> None:
    """See `specontext.kernels.rows.append_tokens`."""
    key, value = _dense_last(new.key), _dense_last(new.value)
    tokens, heads, head_dim = key.shape
    if not tokens:
        return
    table, (_, place) = pages.table_of(layer), pages.layers.homes[layer]
    assert table.is_contiguous() and pages.rows.is_contiguous()
    block, rows = _append_tile(key, quantised=is_quantised(pages.rows))
    pool, words, kind = _as_written(pages.rows)
    _append_to_pages[(triton.cdiv(tokens * heads, rows),)](
        pool,
        words,
        table,
        new.seats.contiguous(),
        new.positions.contiguous(),
        key,
        value,
        tokens * heads,
        table.shape[1],
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        place,
        PAGE=pages.size,
        PLACES=pages.layers.count,
        HEADS=heads,
        DIM=head_dim,
        BLOCK=block,
        ROWS=rows,
        KIND=kind,
        SPAN=span_of(pages.rows),
        PARTS=vectors_in(pages.rows, head_dim),
    )


def append_layer(tiers: Tiers, layer: int, new: NewTokens, *, to_host: bool = True) -> None:
    """See `specontext.kernels.rows.append_layer`. K and V are read once, and the page tables in place."""
    key, value = _dense_last(new.key), _dense_last(new.value)
    tokens, heads, head_dim = key.shape
    if not tokens:
        return
    host, device, slots = tiers.host, tiers.tokens, tiers.slots
    assert slots is not None
    tables = [pages.table_of(layer) for pages in (host, device, slots)]
    assert all(x.is_contiguous() for x in (host.rows, device.rows, *tables))
    block, rows = _append_tile(key, quantised=is_quantised(host.rows))
    (pool, pool_words, kind), (arena, arena_words, arena_kind) = _as_written(host.rows), _as_written(device.rows)
    _append_to_tier[(triton.cdiv(tokens * heads, rows),)](
        pool,
        pool_words,
        arena,
        arena_words,
        *tables,
        tiers.resident[layer : layer + 1].view(torch.uint8),
        new.seats.contiguous(),
        new.positions.contiguous(),
        new.lengths.contiguous(),
        key,
        value,
        tokens * heads,
        *(table.shape[1] for table in tables),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        slots.sink,
        slots.recent,
        host.layers.homes[layer][1],
        PAGE=device.size,
        PLACES=host.layers.count,
        TO_HOST=to_host,
        HEADS=heads,
        DIM=head_dim,
        BLOCK=block,
        ROWS=rows,
        KIND=kind,
        SPAN=span_of(host.rows),
        ARENA_KIND=arena_kind,
        ARENA_SPAN=span_of(device.rows),
        PARTS=vectors_in(host.rows, head_dim),
    )


def quantise_tokens(key: Tensor, value: Tensor, codes: torch.dtype) -> Tensor:
    """See `specontext.kernels.rows.quantise_tokens`: tokens that are appended to an empty pool of one page."""
    (tokens, heads, head_dim), device = key.shape, key.device
    rows = torch.empty((tokens * heads, 2 * head_dim + SCALES), dtype=codes, device=device)
    seats, nothing = (
        torch.zeros(tokens, dtype=torch.int64, device=device),
        torch.zeros((1, 1, 1), dtype=torch.int64, device=device),
    )
    alone = Places(((0, 0),), nothing[0, 0], nothing[0, 0], 1)
    positions = torch.arange(tokens, device=device)
    pages = Pages(rows, nothing, 1 << 30, heads, alone)
    append_tokens(pages, 0, NewTokens(seats, positions, positions, key, value))
    return rows.view(tokens, heads, -1)


def append_keys(keys: Tensor, table: Tensor, seats: Tensor, positions: Tensor, new: Tensor) -> None:
    """See `specontext.kernels.rows.append_keys`: one program a token."""
    tokens, groups, head_dim = new.shape
    if not tokens:
        return
    assert keys.stride(3) == 1 and keys.stride(2) == head_dim and table.stride(1) == 1
    numbers = groups * head_dim
    _append_keys[(tokens,)](
        keys,
        table,
        seats.contiguous(),
        positions.contiguous(),
        new.contiguous(),
        keys.stride(0),
        keys.stride(1),
        table.stride(0),
        PAGE=keys.shape[1],
        NUMBERS=numbers,
        BLOCK=triton.next_power_of_2(numbers),
    )


def _dense_last(new: Tensor) -> Tensor:
    return new if new.stride(-1) == 1 else new.contiguous()


def _append_tile(key: Tensor, *, quantised: bool) -> tuple[int, int]:
    """Block of a head's numbers, and how many heads of tokens a program writes: a few of a decode step's where a scale has to be
    found for each, so that the whole device works at it."""
    block = triton.next_power_of_2(key.shape[2])
    rows = max(1, min(128, TILE_BYTES // (2 * block * key.itemsize)))
    return block, min(rows, QUANTISED_ROWS) if quantised and key.shape[0] * key.shape[1] <= FEW_ROWS else rows


def _as_written(rows: Tensor) -> tuple[Tensor, Tensor, int]:
    """Rows, the same memory by 4 bytes, and what they are made of: numbers, or codes that are written as integers."""
    if not is_quantised(rows):
        return rows, rows, 0
    return rows.view(torch.int8), rows.view(torch.int32), kind_of(rows)


@triton.jit(do_not_specialize=["count"])  # one kernel, whatever there is to move
def _gather(
    source, source_rows, target, target_rows, count,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
    SOURCE_SPAN: tl.constexpr, TARGET_SPAN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    source_row = tl.load(source_rows + at, mask=at < count, other=-1).to(tl.int64)
    live = source_row >= 0
    target_row = tl.load(target_rows + at, mask=live, other=0).to(tl.int64)
    copy_rows(source, source_row, target, target_row, live, WIDTH, BLOCK, REST, SOURCE_SPAN, TARGET_SPAN)


@triton.jit(do_not_specialize=["count", "start", "place"])
def _gather_tokens(
    pool, pages, target, count, start, place,
    PAGE: tl.constexpr, PLACES: tl.constexpr, HEADS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = at < count
    row = piece_of(pages, start + at // HEADS, at % HEADS, live, PAGE, HEADS) * PLACES + place
    copy_rows(pool, row, target, at, live, WIDTH, BLOCK, REST, SPAN, 1 if SPAN else 0)


@triton.jit
def _write(
    pool, words, row, key, value, scales, live,
    KIND: tl.constexpr, SPAN: tl.constexpr, PARTS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)[None, :]
    mask = live[:, None] & (column < DIM)
    start = row * (PARTS * DIM)
    if KIND > 0:
        start = 4 * first_of(row, PARTS * DIM // 4, SPAN)
    first = pool + start[:, None] + column
    tl.store(first, key.to(pool.dtype.element_ty), mask=mask)
    if PARTS == 2:  # a latent is both
        tl.store(first + DIM, value.to(pool.dtype.element_ty), mask=mask)
    if KIND > 0:
        tl.store(words + scales_at(row, PARTS * DIM // 4, SPAN), scales, mask=live)


@triton.jit
def _bfloat16(numbers):
    """Positive float32 numbers, rounded to what bfloat16 has."""
    bits = numbers.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(numbers, scale, most):
    """Numbers [ROWS, BLOCK] over scales [ROWS], as a product with the reciprocal. FP8 needs no bound: with one the compiler
    cannot make a single operation, which rounds once, of the product and a sum."""
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    return tl.minimum(tl.maximum(numbers * inverse[:, None], -most), most)


@triton.jit
def _codes(numbers, KIND: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Codes int8 and scales, float32 as int32, of numbers [ROWS, BLOCK]: as `quantised_rows.quantise` makes them, to the bit."""
    numbers = tl.where(tl.arange(0, BLOCK)[None, :] < DIM, numbers.to(tl.float32), 0.0)
    most = tl.max(numbers.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)  # as an integer: what is no number is greater than all
    finite = most < 0x7F800000
    most = tl.maximum(tl.where(finite, most, 0).to(tl.float32, bitcast=True), LEAST_MAGNITUDE)
    scale = _bfloat16(most * (1 / 127))
    if KIND == FP8:
        scale = _bfloat16(most * (1 / 448))
        least = tl.full(most.shape, float("inf"), tl.float32)
        for i in tl.static_range(TRIED):
            tried = _bfloat16(most * (2.0 ** (i / TRIED) / 448))
            scaled = _scaled(numbers, tried, 512.0)
            bits = scaled.to(tl.int32, bitcast=True)
            rounded = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
            error = tl.max(tl.abs(rounded - scaled), 1) * tried
            scale = tl.where(error < least, tried, scale)
            least = tl.minimum(error, least)
    scaled = _scaled(numbers, scale, 127.0 if KIND == INT8 else 512.0)
    if KIND == INT8:
        codes = (scaled + ROUNDS).to(tl.int32, bitcast=True) - ROUNDS_BITS
    else:
        bits = scaled.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # A mantissa of three bits, ties to even, with another bias of the exponent; below 2^-6 multiples of 2^-9.
        codes = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
        small = (tl.abs(scaled) * 512.0 + ROUNDS).to(tl.int32, bitcast=True) - ROUNDS_BITS
        codes = tl.where(magnitude < 0x3C800000, small, codes) | ((bits >> 24) & 0x80)
    return codes.to(tl.int8), tl.where(finite, scale.to(tl.int32, bitcast=True), 0x7FC00000)


@triton.jit
def _rows(key, value, KIND: tl.constexpr, PARTS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """K and V as they are written, and both scales as the last word of a row, which numbers do not have."""
    scales = 0
    if KIND > 0:
        key, key_scale = _codes(key, KIND, DIM, BLOCK)
        value_scale = key_scale
        if PARTS == 2:
            value, value_scale = _codes(value, KIND, DIM, BLOCK)
        scales = value_scale | ((key_scale >> 16) & 0xFFFF)
    return key, value, scales


@triton.jit
def _read(new, token, head, token_stride, head_stride, live, DIM: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)[None, :]
    mask = live[:, None] & (column < DIM)
    return tl.load(new + (token * token_stride + head * head_stride)[:, None] + column, mask=mask)


@triton.jit(do_not_specialize=["count", "page_width", "place"])
def _append_to_pages(
    pool, words, pages, seats, positions, key, value,
    count, page_width, key_token, key_head, value_token, value_head, place,
    PAGE: tl.constexpr, PLACES: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    KIND: tl.constexpr, SPAN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = at // HEADS, at % HEADS
    position = tl.load(positions + token, mask=at < count, other=-1).to(tl.int64)
    live = position >= 0
    seat = tl.load(seats + token, mask=live, other=0).to(tl.int64)
    new_key = _read(key, token, head, key_token, key_head, live, DIM, BLOCK)
    new_value = _read(value, token, head, value_token, value_head, live, DIM, BLOCK)
    new_key, new_value, scales = _rows(new_key, new_value, KIND, PARTS, DIM, BLOCK)
    row = piece_of(pages + seat * page_width, position, head, live, PAGE, HEADS) * PLACES + place
    _write(pool, words, row, new_key, new_value, scales, live, KIND, SPAN, PARTS, DIM, BLOCK)


@triton.jit(do_not_specialize=["count", "host_width", "token_width", "slot_width", "sink", "recent", "place"])
def _append_to_tier(
    host, host_words, arena, arena_words, host_pages, token_pages, slot_pages, resident, seats, positions, lengths, key, value,
    count, host_width, token_width, slot_width, key_token, key_head, value_token, value_head, sink, recent, place,
    PAGE: tl.constexpr, PLACES: tl.constexpr, TO_HOST: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    KIND: tl.constexpr, SPAN: tl.constexpr, ARENA_KIND: tl.constexpr, ARENA_SPAN: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = at // HEADS, at % HEADS
    position = tl.load(positions + token, mask=at < count, other=-1).to(tl.int64)
    live = position >= 0
    seat = tl.load(seats + token, mask=live, other=0).to(tl.int64)
    read_key = _read(key, token, head, key_token, key_head, live, DIM, BLOCK)
    read_value = _read(value, token, head, value_token, value_head, live, DIM, BLOCK)
    new_key, new_value, scales = _rows(read_key, read_value, KIND, PARTS, DIM, BLOCK)
    if tl.load(resident) != 0:
        row = piece_of(token_pages + seat * token_width, position, head, live, PAGE, HEADS)
        if KIND == ARENA_KIND:
            _write(arena, arena_words, row, new_key, new_value, scales, live, ARENA_KIND, ARENA_SPAN, PARTS, DIM, BLOCK)
        else:
            _write(arena, arena_words, row, read_key, read_value, scales, live, ARENA_KIND, ARENA_SPAN, PARTS, DIM, BLOCK)
    else:
        if TO_HOST:
            row = piece_of(host_pages + seat * host_width, position, head, live, PAGE, HEADS) * PLACES + place
            _write(host, host_words, row, new_key, new_value, scales, live, KIND, SPAN, PARTS, DIM, BLOCK)
        length = tl.load(lengths + token, mask=live, other=0).to(tl.int64)
        kept = live & ((position < sink) | (position >= length - recent))
        slot = tl.where(position < sink, position, sink + position % recent)
        row = piece_of(slot_pages + seat * slot_width, slot, head, kept, PAGE, HEADS)
        if KIND == ARENA_KIND:
            _write(arena, arena_words, row, new_key, new_value, scales, kept, ARENA_KIND, ARENA_SPAN, PARTS, DIM, BLOCK)
        else:
            key_scale, value_scale = (scales << 16).to(tl.float32, bitcast=True), (scales & -65536).to(tl.float32, bitcast=True)
            as_key = number_of(new_key.to(tl.int32), KIND) * key_scale[:, None]
            as_value = number_of(new_value.to(tl.int32), KIND) * value_scale[:, None]
            _write(arena, arena_words, row, as_key, as_value, scales, kept, ARENA_KIND, ARENA_SPAN, PARTS, DIM, BLOCK)


@triton.jit
def _append_keys(
    keys, table, seats, positions, new, page_stride, token_stride, table_stride,
    PAGE: tl.constexpr, NUMBERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token)
    page = tl.load(table + tl.load(seats + token) * table_stride + position // PAGE, mask=position >= 0, other=0)
    column = tl.arange(0, BLOCK)
    inside = column < tl.where(position >= 0, NUMBERS, 0)
    numbers = tl.load(new + token * NUMBERS + column, mask=inside)
    place = keys + page * page_stride + position % PAGE * token_stride + column
    tl.store(place, numbers.to(keys.dtype.element_ty), mask=inside)

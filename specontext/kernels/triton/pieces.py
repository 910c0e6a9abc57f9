# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Pieces of KV rows between pools, a few programs at a time, so that the rest of the device is left to what runs beside them.

A bus with a round trip of two microseconds and 50 GB/s wants 100 KB under way at any time, whoever asks for them. So a program
works on several tiles of pieces at once, in a pipeline through shared memory (asynchronous copies): it looks up the entries of
one tile, their pages of the next, has the rows of one or two under way, and stores those that have come.

More under way than the bus needs is harmful: what a processor has asked for comes back in order, so that whatever else runs there
waits behind rows from the bus, tens of microseconds each time where all programs together have 1.5 MB under way. So more programs
take smaller tiles.

A tile is [rows, numbers of a row], 16 bytes a thread and copy; rows of a piece are neighbours in it as they are in memory. Codes
of rows in 8 bits are copied by words of 4 bytes, four at once where they lie in spans, and their scales beside them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from specontext.kernels.spans import row_size, span_of
from specontext.kernels.tables import Copies, Pages, Parts, holds_latents, is_quantised
from specontext.kernels.triton.slot_plan import piece_of

PROGRAMS = (8, 32)  # with few requests layers hide what is loaded, and want the device; with many the bus is waited for
WRITERS = 16
TILE_BYTES = 16384
WARPS = 4
STAGES = 4  # of the pipeline: shared memory for three tiles
FP8, INT8 = tl.constexpr(1), tl.constexpr(2)  # what rows are made of; 0 for numbers


def copy_pieces(
    source: Pages,
    target: Pages,
    parts: Parts,
    skipped: Tensor,
    copies: Copies,
    *,
    programs: int | None = None,
    tile_bytes: int | None = None,
    warps: int = WARPS,
    stages: int = STAGES,
) -> None:
    """See `specontext.kernels.rows.copy_pieces`. A row costs its bytes; of indices a piece costs about 24 bytes and 8 a layer.

    Args:
        tile_bytes, warps, stages: of a program; tiles are smaller by default where more programs share the work.
    """
    requests, groups, width = copies.source.shape
    readers = len(parts) * requests
    if not readers * width:
        return
    scaled = is_quantised(source.rows) and not is_quantised(target.rows)
    assert source.heads == target.heads and (scaled or source.rows.dtype == target.rows.dtype)
    assert all(x.is_contiguous() for x in (source.rows, target.rows, source.table, target.table, parts.layers))
    programs = programs or min(max(requests, PROGRAMS[0]), PROGRAMS[1])
    tile_bytes = tile_bytes or TILE_BYTES * PROGRAMS[0] // max(programs, PROGRAMS[0])
    tile = codes_tile(source.rows, tile_bytes) if scaled else row_tile(source.rows, tile_bytes)
    layers = parts.layers.shape[1]
    padded = triton.next_power_of_2(layers)
    pieces = max(1, tile.rows // padded)
    # All programs are at one block and request at a time: a bus that reads at random needs a table that stays in its cache.
    splits = min(triton.cdiv(programs, source.heads), triton.cdiv(width, pieces))
    _copy_pieces[(min(readers * splits, programs),)](
        as_copied(source.rows),
        as_copied(target.rows),
        source.table,
        target.table,
        source.layers.lines,
        target.layers.lines,
        source.layers.places,
        target.layers.places,
        parts.layers,
        parts.heads,
        parts.groups,
        copies.seats.contiguous(),
        skipped.view(torch.uint8),
        copies.source.contiguous(),
        copies.target.contiguous(),
        copies.counts.contiguous(),
        readers * splits,
        splits,
        len(parts),
        groups,
        width,
        source.table.shape[1],
        source.table.shape[2],
        target.table.shape[1],
        target.table.shape[2],
        HEADS=source.heads,
        SOURCE_PAGE=source.size,
        TARGET_PAGE=target.size,
        SOURCE_PLACES=source.layers.count,
        TARGET_PLACES=target.layers.count,
        LAYERS=layers,
        LAYERS_PAD=padded,
        WIDTH=tile.width,
        BLOCK=tile.block,
        REST=tile.rest,
        SOURCE_SPAN=span_of(source.rows),
        TARGET_SPAN=span_of(target.rows),
        KIND=kind_of(source.rows) if scaled else 0,
        PIECES=pieces,
        STAGES=stages,
        num_warps=warps,
    )


def append_pieces(pages: Pages, line: int, seats: Tensor, positions: Tensor, new: Tensor, wanted: Tensor) -> None:
    """See `specontext.kernels.rows.append_pieces`. A few programs write all: many would stand in others' way."""
    tokens, heads, places = new.shape[:3]
    if not tokens:
        return
    table = pages.table[line]
    assert pages.rows.is_contiguous() and table.is_contiguous() and new.is_contiguous() and new.dtype == pages.rows.dtype
    tile = row_tile(pages.rows, TILE_BYTES)
    padded = triton.next_power_of_2(places)
    pieces = max(1, tile.rows // padded)
    _append_pieces[(min(triton.cdiv(tokens * heads, pieces), WRITERS),)](
        as_copied(pages.rows),
        table,
        seats.contiguous(),
        positions.contiguous(),
        as_copied(new),
        wanted.view(torch.uint8),
        tokens * heads,
        table.shape[1],
        PAGE=pages.size,
        HEADS=heads,
        PLACES=places,
        PLACES_PAD=padded,
        WIDTH=tile.width,
        BLOCK=tile.block,
        REST=tile.rest,
        SPAN=span_of(pages.rows),
        PIECES=pieces,
        STAGES=STAGES,
        num_warps=WARPS,
    )


class RowTile(NamedTuple):
    """How a program copies rows.

    Attributes:
        width: numbers of a row, or words of 4 bytes of its codes.
        block: of them that are copied at once, masked where a row has fewer.
        rest: room for those that are copied then; 0 where there are none.
        rows: that a program moves at once, a power of two.
    """

    width: int
    block: int
    rest: int
    rows: int


def row_tile(rows: Tensor, tile_bytes: int) -> RowTile:
    """How rows of a pool are copied, as they are."""
    if is_quantised(rows):
        width, size = row_size(rows)[0] // 4 - 1, 4
    else:
        width, size = rows[:1].numel(), rows.itemsize
    block, rest = triton.next_power_of_2(width), 0
    if holds_latents(rows) and block > width:
        block //= 2
        rest = triton.next_power_of_2(width - block)
    return RowTile(width, block, rest, rows_in(tile_bytes // (block * size)))


def codes_tile(rows: Tensor, tile_bytes: int) -> RowTile:
    """How rows in 8 bits are copied that become numbers on the way.

    Half as many rows as are copied as they are, because their numbers stand in registers.
    """
    codes = row_size(rows)[0] // 4 - 1
    block = triton.next_power_of_2(codes)
    return RowTile(codes, block, 0, rows_in(tile_bytes // (8 * block)))


def rows_in(most: int) -> int:
    """Rows of a tile that has room for so many: a power of two."""
    return 1 << max(1, min(128, most)).bit_length() - 1


def kind_of(rows: Tensor) -> int:
    """What rows of a pool are made of: 0 for numbers, `FP8` or `INT8`."""
    if not is_quantised(rows):
        return 0
    return INT8.value if rows.dtype == torch.int8 else FP8.value


def as_copied(rows: Tensor) -> Tensor:
    """Rows as they are copied: in 8 bits by words of 4 bytes, whatever the codes are."""
    return rows.view(torch.int32) if is_quantised(rows) else rows


@triton.jit
def first_of(row, WIDTH: tl.constexpr, SPAN: tl.constexpr):
    """Where a row begins: its numbers, or where SPAN is not 0 its codes (WIDTH words); see `specontext.kernels.spans`."""
    first = row * WIDTH
    if SPAN:  # Triton 3.6 takes rows that follow each other for aligned like the first of them, if it is not told
        first = tl.multiple_of(first + row // SPAN * SPAN, 4 if WIDTH % 4 == 0 and SPAN % 4 == 0 else 1)
    return first


@triton.jit
def scales_at(row, WIDTH: tl.constexpr, SPAN: tl.constexpr):
    """Where the scales of a row are, which are one word."""
    return row // SPAN * (SPAN * (WIDTH + 1)) + SPAN * WIDTH + row % SPAN


@triton.jit
def copy_rows(
    source, source_row, target, target_row, live, WIDTH: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
    SOURCE_SPAN: tl.constexpr, TARGET_SPAN: tl.constexpr,
):  # fmt: skip
    """Copy the rows that are live, of WIDTH numbers, or words of codes and their scales."""
    column = tl.arange(0, BLOCK)[None, :]
    mask = live[:, None] & (column < WIDTH)
    source_first = first_of(source_row, WIDTH, SOURCE_SPAN)[:, None]
    target_first = first_of(target_row, WIDTH, TARGET_SPAN)[:, None]
    numbers = tl.load(source + source_first + column, mask=mask)
    if SOURCE_SPAN:
        scales = tl.load(source + scales_at(source_row, WIDTH, SOURCE_SPAN), mask=live)
        tl.store(target + scales_at(target_row, WIDTH, TARGET_SPAN), scales, mask=live)
    if REST:
        behind = BLOCK + tl.arange(0, REST)[None, :]
        present = live[:, None] & (behind < WIDTH)
        others = tl.load(source + source_first + behind, mask=present)
        tl.store(target + target_first + behind, others, mask=present)
    tl.store(target + target_first + column, numbers, mask=mask)


@triton.jit
def number_of(code, KIND: tl.constexpr):
    """Numbers float32 of codes, which are the low 8 bits of int32."""
    if KIND == INT8:
        number = ((code << 24) >> 24).to(tl.float32)
    else:  # as float16 the same bits are the number over 256
        bits = ((code & 0x7F) << 7) | ((code & 0x80) << 8)
        number = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return number


@triton.jit
def copy_as_numbers(
    source, source_row, target, target_row, live, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """Copy the rows that are live, of WIDTH words of codes and their scales, as the numbers that they stand for."""
    column = tl.arange(0, BLOCK)[None, :]
    begin = first_of(source_row, WIDTH, SPAN)[:, None]
    codes = tl.load(source + begin + column, mask=live[:, None] & (column < WIDTH), other=0)
    both = tl.load(source + scales_at(source_row, WIDTH, SPAN), mask=live, other=0)[:, None]
    key_scale, value_scale = (both << 16).to(tl.float32, bitcast=True), (both & -65536).to(tl.float32, bitcast=True)
    even = tl.interleave(number_of(codes, KIND), number_of(codes >> 16, KIND))
    odd = tl.interleave(number_of(codes >> 8, KIND), number_of(codes >> 24, KIND))
    numbers = tl.interleave(even, odd)  # in the order of their codes
    place = tl.arange(0, 4 * BLOCK)[None, :]
    numbers = numbers * tl.where(place < 2 * WIDTH, key_scale, value_scale)
    first = target + (target_row * (4 * WIDTH))[:, None]
    tl.store(first + place, numbers.to(target.dtype.element_ty), mask=live[:, None] & (place < 4 * WIDTH))


@triton.jit(
    do_not_specialize=[
        "items", "splits", "part_count", "groups", "width", "source_seats", "source_pages", "target_seats", "target_pages"
    ]
)  # fmt: skip
def _copy_pieces(
    source, target, source_table, target_table, source_line, target_line, source_place, target_place,
    part_layers, part_heads, part_groups, seats, skipped, source_entries, target_entries, counts,
    items, splits, part_count, groups, width, source_seats, source_pages, target_seats, target_pages,
    HEADS: tl.constexpr, SOURCE_PAGE: tl.constexpr, TARGET_PAGE: tl.constexpr,
    SOURCE_PLACES: tl.constexpr, TARGET_PLACES: tl.constexpr,
    LAYERS: tl.constexpr, LAYERS_PAD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
    SOURCE_SPAN: tl.constexpr, TARGET_SPAN: tl.constexpr, KIND: tl.constexpr, PIECES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, PIECES * LAYERS_PAD)
    of_piece = lane // LAYERS_PAD
    member = lane % LAYERS_PAD
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        split = item % splits
        part = item // splits % part_count
        request = item // splits // part_count
        head = tl.load(part_heads + part).to(tl.int64)
        pair = request.to(tl.int64) * groups + tl.load(part_groups + part).to(tl.int64)
        seat = tl.load(seats + request).to(tl.int64)
        count = tl.load(counts + pair)
        layer = tl.load(part_layers + part * LAYERS + member, mask=member < LAYERS, other=-1).to(tl.int64)
        present = layer >= 0
        present = present & (tl.load(skipped + layer, mask=present, other=1) == 0)
        # The pages of a request in each layer of the part, and the layers' places.
        from_table = source_table + (tl.load(source_line + layer, mask=present, other=0) * source_seats + seat) * source_pages
        to_table = target_table + (tl.load(target_line + layer, mask=present, other=0) * target_seats + seat) * target_pages
        from_place = tl.load(source_place + layer, mask=present, other=0)
        to_place = tl.load(target_place + layer, mask=present, other=0)
        count = tl.where(tl.max(present.to(tl.int32), 0) == 0, 0, count)
        from_entries = source_entries + pair * width
        to_entries = target_entries + pair * width
        for first in tl.range(split * PIECES, count, splits * PIECES, num_stages=STAGES):
            piece = first + of_piece
            live = present & (piece < count)
            source_entry = tl.load(from_entries + piece, mask=live, other=0).to(tl.int64)
            target_entry = tl.load(to_entries + piece, mask=live, other=0).to(tl.int64)
            source_row = piece_of(from_table, source_entry, head, live, SOURCE_PAGE, HEADS) * SOURCE_PLACES + from_place
            target_row = piece_of(to_table, target_entry, head, live, TARGET_PAGE, HEADS) * TARGET_PLACES + to_place
            if KIND:
                copy_as_numbers(source, source_row, target, target_row, live, WIDTH, BLOCK, SOURCE_SPAN, KIND)
            else:
                copy_rows(source, source_row, target, target_row, live, WIDTH, BLOCK, REST, SOURCE_SPAN, TARGET_SPAN)


@triton.jit(do_not_specialize=["count", "page_width"])
def _append_pieces(
    pool, pages, seats, positions, new, wanted, count, page_width,
    PAGE: tl.constexpr, HEADS: tl.constexpr, PLACES: tl.constexpr, PLACES_PAD: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, SPAN: tl.constexpr,
    PIECES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, PIECES * PLACES_PAD)
    place = lane % PLACES_PAD
    present = place < PLACES
    present = present & (tl.load(wanted + place, mask=present, other=0) != 0)
    for first in tl.range(tl.program_id(0) * PIECES, count, tl.num_programs(0) * PIECES, num_stages=STAGES):
        piece = (first + lane // PLACES_PAD).to(tl.int64)
        token, head = piece // HEADS, piece % HEADS
        position = tl.load(positions + token, mask=piece < count, other=-1).to(tl.int64)
        live = (position >= 0) & present
        seat = tl.load(seats + token, mask=live, other=0).to(tl.int64)
        row = piece_of(pages + seat * page_width, position, head, live, PAGE, HEADS) * PLACES + place
        copy_rows(new, piece * PLACES + place, pool, row, live, WIDTH, BLOCK, REST, 1 if SPAN else 0, SPAN)

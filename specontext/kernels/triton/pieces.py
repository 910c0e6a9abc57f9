# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Pieces of KV rows between pools, a few programs at a time, so that the rest of the device is left to what runs beside them.

A bus with a round trip of two microseconds and 50 GB/s wants 100 KB under way at any time, whoever asks for them. So a program
works on several tiles of pieces at once, in a pipeline through shared memory (asynchronous copies): it looks up the entries of
one tile, their pages of the next, has the rows of one or two under way, and stores those that have come.

A tile is [rows, numbers of a row], 16 bytes a thread and copy; rows of a piece are neighbours in it as they are in memory. Rows
in 8 bits begin at multiples of 4 bytes and are copied by as many: the largest power of two of them, and then the rest of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from specontext.kernels.tables import Copies, Pages, Parts, holds_latents, is_quantised
from specontext.kernels.triton.slot_plan import piece_of

PROGRAMS = (8, 32)  # with few requests layers hide what is loaded, and want the device; with many the bus is waited for
WRITERS = 16
TILE_BYTES = 16384
WARPS = 4
STAGES = 4  # of the pipeline: shared memory for three tiles


def copy_pieces(
    source: Pages,
    target: Pages,
    parts: Parts,
    skipped: Tensor,
    copies: Copies,
    *,
    programs: int | None = None,
    tile_bytes: int = TILE_BYTES,
    warps: int = WARPS,
    stages: int = STAGES,
) -> None:
    """See `specontext.kernels.rows.copy_pieces`. A row costs its bytes; of indices a piece costs about 24 bytes and 8 a layer.

    Args:
        tile_bytes, warps, stages: of a program.
    """
    requests, groups, width = copies.source.shape
    readers = len(parts) * requests
    if not readers * width:
        return
    assert source.rows.dtype == target.rows.dtype and source.heads == target.heads
    assert all(x.is_contiguous() for x in (source.rows, target.rows, source.table, target.table, parts.layers))
    tile = row_tile(source.rows, tile_bytes)
    layers = parts.layers.shape[1]
    padded = triton.next_power_of_2(layers)
    pieces = max(1, tile.rows // padded)
    programs = programs or min(max(requests, PROGRAMS[0]), PROGRAMS[1])
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
        PIECES=pieces,
        STAGES=STAGES,
        num_warps=WARPS,
    )


class RowTile(NamedTuple):
    """How a program copies rows.

    Attributes:
        width: numbers, or words of 4 bytes, of a row.
        block: of them that are copied at once, masked where a row has fewer.
        rest: room for those that are copied then; 0 where there are none.
        rows: that a program moves at once.
    """

    width: int
    block: int
    rest: int
    rows: int


def row_tile(rows: Tensor, tile_bytes: int) -> RowTile:
    """How rows [N, *row] of a pool are copied."""
    copied = as_copied(rows)
    width = copied[:1].numel()
    block, rest = triton.next_power_of_2(width), 0
    if (copied is not rows or holds_latents(rows)) and block > width:
        block //= 2
        rest = triton.next_power_of_2(width - block)
    return RowTile(width, block, rest, max(1, min(128, tile_bytes // (block * copied.itemsize))))


def as_copied(rows: Tensor) -> Tensor:
    """Rows as they are copied: in 8 bits by words of 4 bytes, whatever the codes are."""
    return rows.view(torch.int32) if is_quantised(rows) else rows


@triton.jit
def copy_rows(source, source_row, target, target_row, live, WIDTH: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr):
    """Copy the rows that are live, of WIDTH numbers."""
    column = tl.arange(0, BLOCK)[None, :]
    mask = live[:, None] & (column < WIDTH)
    numbers = tl.load(source + (source_row * WIDTH)[:, None] + column, mask=mask)
    if REST:
        behind = BLOCK + tl.arange(0, REST)[None, :]
        present = live[:, None] & (behind < WIDTH)
        others = tl.load(source + (source_row * WIDTH)[:, None] + behind, mask=present)
        tl.store(target + (target_row * WIDTH)[:, None] + behind, others, mask=present)
    tl.store(target + (target_row * WIDTH)[:, None] + column, numbers, mask=mask)


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
    PIECES: tl.constexpr, STAGES: tl.constexpr,
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
            copy_rows(source, source_row, target, target_row, live, WIDTH, BLOCK, REST)


@triton.jit(do_not_specialize=["count", "page_width"])
def _append_pieces(
    pool, pages, seats, positions, new, wanted, count, page_width,
    PAGE: tl.constexpr, HEADS: tl.constexpr, PLACES: tl.constexpr, PLACES_PAD: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, PIECES: tl.constexpr, STAGES: tl.constexpr,
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
        copy_rows(new, piece * PLACES + place, pool, row, live, WIDTH, BLOCK, REST)

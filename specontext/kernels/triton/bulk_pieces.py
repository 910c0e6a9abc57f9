# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Rows from the host into slots by bulk copies, on GPUs that have them (Hopper and later).

What a program reads with ordinary loads comes back through its processor's cache in the order in which it was asked for. So
whatever else runs there waits behind rows that are on their way over the bus: with a full bus some tens of microseconds each
time, in which kernels of two are done. Bulk copies go from the bus to shared memory past that queue.

Each thread of a warp looks up one row, has it copied into its part of shared memory, waits for it, and has it copied out.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from specontext.kernels.tables import Copies, Pages, Parts
from specontext.kernels.triton.slot_plan import piece_of

FIRST = 9  # capability whose hardware has bulk copies
LANES = 32  # threads of a program, a row each
MOST_BYTES = 1024  # of a row: 32 of them fit the shared memory that a program may declare
PROGRAMS = 24


@cache
def _copies(device: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= FIRST


def takes(source: Tensor, target: Tensor, layers: int) -> bool:
    """Whether rows of these pools, of so many layers at once, are copied so: from the host, on hardware that can."""
    size = source[:1].numel() * source.itemsize
    return (
        source.device.type == "cpu"
        and target.is_cuda
        and _copies(target.device.index or 0)
        and size % 16 == 0
        and size <= MOST_BYTES
        and layers <= LANES
    )


@cache
def _program(size: int) -> str:
    """PTX: each thread copies `size` bytes from $1 to $2 where $3 is not 0."""
    return f"""{{
    .reg .pred live, here;
    .reg .b32 thread, room, done;
    .shared .align 128 .b8 rooms[{LANES * size}];
    .shared .align 8 .b64 all_done[{LANES}];
    setp.ne.b32 live, $3, 0;
    mov.u32 thread, %tid.x;
    mov.u32 room, rooms;
    mad.lo.u32 room, thread, {size}, room;
    mov.u32 done, all_done;
    mad.lo.u32 done, thread, 8, done;
    @!live bra END;
    mbarrier.init.shared::cta.b64 [done], 1;
    fence.proxy.async.shared::cta;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [done], {size};
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [room], [$1], {size}, [done];
    WAIT:
    mbarrier.try_wait.parity.shared::cta.b64 here, [done], 0;
    @!here bra WAIT;
    fence.proxy.async.shared::cta;
    cp.async.bulk.global.shared::cta.bulk_group [$2], [room], {size};
    cp.async.bulk.commit_group;
    mbarrier.inval.shared::cta.b64 [done];
    cp.async.bulk.wait_group.read 0;
    END:
    mov.u32 $0, 0;
    }}"""


def copy_pieces(source: Pages, target: Pages, parts: Parts, skipped: Tensor, copies: Copies, *, programs: int | None) -> None:
    """`specontext.kernels.rows.copy_pieces` where `takes` says so."""
    requests, groups, width = copies.source.shape
    layers = parts.layers.shape[1]
    padded = triton.next_power_of_2(layers)
    pieces = LANES // padded
    programs = programs or PROGRAMS
    # All programs are at one block and request at a time: a bus that reads at random needs a table that stays in its cache.
    splits = min(triton.cdiv(programs, source.heads), triton.cdiv(width, pieces))
    items = len(parts) * requests * splits
    numbers = source.rows[:1].numel()
    _copy_rows[(min(items, programs),)](
        source.rows,
        target.rows,
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
        items,
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
        WIDTH=numbers,
        PIECES=pieces,
        PROGRAM=_program(numbers * source.rows.itemsize),
        num_warps=1,
    )


@triton.jit(
    do_not_specialize=[
        "items", "splits", "part_count", "groups", "width", "source_seats", "source_pages", "target_seats", "target_pages"
    ]
)  # fmt: skip
def _copy_rows(
    source, target, source_table, target_table, source_line, target_line, source_place, target_place,
    part_layers, part_heads, part_groups, seats, skipped, source_entries, target_entries, counts,
    items, splits, part_count, groups, width, source_seats, source_pages, target_seats, target_pages,
    HEADS: tl.constexpr, SOURCE_PAGE: tl.constexpr, TARGET_PAGE: tl.constexpr,
    SOURCE_PLACES: tl.constexpr, TARGET_PLACES: tl.constexpr,
    LAYERS: tl.constexpr, LAYERS_PAD: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, PROGRAM: tl.constexpr,
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
        layer = tl.load(part_layers + part * LAYERS + member, mask=member < LAYERS, other=-1).to(tl.int64)
        present = layer >= 0
        present = present & (tl.load(skipped + layer, mask=present, other=1) == 0)
        from_table = source_table + (tl.load(source_line + layer, mask=present, other=0) * source_seats + seat) * source_pages
        to_table = target_table + (tl.load(target_line + layer, mask=present, other=0) * target_seats + seat) * target_pages
        from_place = tl.load(source_place + layer, mask=present, other=0)
        to_place = tl.load(target_place + layer, mask=present, other=0)
        count = tl.where(tl.max(present.to(tl.int32), 0) == 0, 0, tl.load(counts + pair))
        for first in tl.range(split * PIECES, count, splits * PIECES, num_stages=1):
            piece = first + of_piece
            live = present & (piece < count)
            source_entry = tl.load(source_entries + pair * width + piece, mask=live, other=0).to(tl.int64)
            target_entry = tl.load(target_entries + pair * width + piece, mask=live, other=0).to(tl.int64)
            source_row = piece_of(from_table, source_entry, head, live, SOURCE_PAGE, HEADS) * SOURCE_PLACES + from_place
            target_row = piece_of(to_table, target_entry, head, live, TARGET_PAGE, HEADS) * TARGET_PLACES + to_place
            tl.inline_asm_elementwise(
                PROGRAM,
                "=r,l,l,r",
                [source + source_row * WIDTH, target + target_row * WIDTH, live.to(tl.int32)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )

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

from specontext.kernels.triton.slot_plan import list_flagged

TILE_BYTES = 16384
# Of the gather of layers. Eight fill an H100's bus; with 32 the rest of the device lost a seventh of its speed meanwhile.
PROGRAMS = 8


def gather_rows(source: Tensor, source_rows: Tensor, target: Tensor, target_rows: Tensor) -> None:
    """See `specontext.kernels.rows.gather_rows`. Moves a row in and out, and 16 bytes of row numbers for each."""
    count = source_rows.numel()
    if count:
        width, block, rows = _tile(source, target)
        _gather[(triton.cdiv(count, rows),)](
            source, source_rows.contiguous(), target, target_rows.contiguous(), count, WIDTH=width, BLOCK=block, ROWS=rows
        )


def gather_rows_layers(
    source: Tensor,
    target: Tensor,
    source_pages: Tensor,
    target_pages: Tensor,
    layers: Tensor,
    seats: Tensor,
    head_map: Tensor,
    resident: Tensor,
    tokens: Tensor,
    slots: Tensor,
    missing: Tensor,
    page_size: int,
) -> None:
    """See `specontext.kernels.rows.gather_rows_layers`: two launches, whatever the number of layers.

    The first lists the misses of each pair, so that the second moves full tiles, a pair's list split over some programs.
    Each missing row costs its bytes and about 40 of indices, which all layers and heads share in the caches.
    """
    requests, groups, width = tokens.shape
    readers = len(layers) * requests * head_map.shape[1]
    if not readers * width:
        return
    assert source_pages.is_contiguous() and target_pages.is_contiguous()
    row_width, block, rows = _tile(source, target)
    misses = torch.empty((requests * groups, width), dtype=torch.int32, device=tokens.device)
    counts = torch.empty(requests * groups, dtype=torch.int32, device=tokens.device)
    _list_misses[(requests * groups,)](missing.contiguous().view(torch.uint8), misses, counts, width, BLOCK=1024, num_warps=8)
    # All programs are at one layer and request at a time: a bus that reads at random needs a table that stays in its cache.
    splits = min(triton.cdiv(PROGRAMS, head_map.shape[1]), triton.cdiv(width, rows))
    _gather_layers[(min(readers * splits, PROGRAMS),)](
        source,
        target,
        source_pages,
        target_pages,
        layers.contiguous(),
        seats.contiguous(),
        head_map.contiguous(),
        resident.view(torch.uint8),
        tokens.contiguous(),
        slots.contiguous(),
        misses,
        counts,
        readers * splits,
        splits,
        requests,
        groups,
        width,
        source_pages.shape[1],
        source_pages.shape[2],
        target_pages.shape[2],
        PAGE=page_size,
        HEADS=head_map.shape[1],
        WIDTH=row_width,
        BLOCK=block,
        ROWS=rows,
    )


def append_tokens(
    pool: Tensor, pages: Tensor, seats: Tensor, positions: Tensor, key: Tensor, value: Tensor, page_size: int
) -> None:
    """See `specontext.kernels.rows.append_tokens`."""
    key, value = _dense_last(key), _dense_last(value)
    tokens, heads, head_dim = key.shape
    if not tokens:
        return
    assert pages.is_contiguous() and pool.is_contiguous()
    block, rows = _append_tile(key)
    _append_to_pages[(triton.cdiv(tokens * heads, rows),)](
        pool,
        pages,
        seats.contiguous(),
        positions.contiguous(),
        key,
        value,
        tokens * heads,
        pages.shape[1],
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        PAGE=page_size,
        HEADS=heads,
        DIM=head_dim,
        BLOCK=block,
        ROWS=rows,
    )


def append_layer(
    host: Tensor,
    host_pages: Tensor,
    arena: Tensor,
    token_pages: Tensor,
    slot_pages: Tensor,
    resident: Tensor,
    seats: Tensor,
    positions: Tensor,
    lengths: Tensor,
    key: Tensor,
    value: Tensor,
    page_size: int,
    sink: int,
    recent: int,
    *,
    to_host: bool = True,
) -> None:
    """See `specontext.kernels.rows.append_layer`. K and V are read once, and the page tables in place."""
    key, value = _dense_last(key), _dense_last(value)
    tokens, heads, head_dim = key.shape
    if not tokens:
        return
    pages = (host_pages, token_pages, slot_pages)
    assert all(x.is_contiguous() for x in (host, arena, *pages))
    block, rows = _append_tile(key)
    _append_to_tier[(triton.cdiv(tokens * heads, rows),)](
        host,
        arena,
        *pages,
        resident.view(torch.uint8),
        seats.contiguous(),
        positions.contiguous(),
        lengths.contiguous(),
        key,
        value,
        tokens * heads,
        *(table.shape[1] for table in pages),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        sink,
        recent,
        PAGE=page_size,
        TO_HOST=to_host,
        HEADS=heads,
        DIM=head_dim,
        BLOCK=block,
        ROWS=rows,
    )


def _dense_last(new: Tensor) -> Tensor:
    return new if new.stride(-1) == 1 else new.contiguous()


def _append_tile(key: Tensor) -> tuple[int, int]:
    """Block of a head's numbers, and how many heads of tokens a program writes."""
    block = triton.next_power_of_2(key.shape[2])
    return block, max(1, min(128, TILE_BYTES // (2 * block * key.itemsize)))


def _tile(source: Tensor, target: Tensor) -> tuple[int, int, int]:
    """Numbers in a row, the block that holds them, and how many rows a program moves at once."""
    assert source.dtype == target.dtype and source.is_contiguous() and target.is_contiguous()
    width = source.shape[1] * source.shape[2]
    block = triton.next_power_of_2(width)
    return width, block, max(1, min(128, TILE_BYTES // (block * source.itemsize)))


@triton.jit
def _copy(source, source_row, target, target_row, live, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)[None, :]
    mask = live[:, None] & (column < WIDTH)
    numbers = tl.load(source + source_row[:, None] * WIDTH + column, mask=mask)
    tl.store(target + target_row[:, None] * WIDTH + column, numbers, mask=mask)


@triton.jit(do_not_specialize=["count"])  # one kernel, whatever there is to move
def _gather(source, source_rows, target, target_rows, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    source_row = tl.load(source_rows + at, mask=at < count, other=-1).to(tl.int64)
    live = source_row >= 0
    target_row = tl.load(target_rows + at, mask=live, other=0).to(tl.int64)
    _copy(source, source_row, target, target_row, live, WIDTH, BLOCK)


@triton.jit
def _list_misses(missing, misses, counts, width, BLOCK: tl.constexpr):
    pair = tl.program_id(0)
    first = pair.to(tl.int64) * width
    tl.store(counts + pair, list_flagged(missing + first, width, misses + first, BLOCK))


@triton.jit
def _row_of(pages, entry, head, live, PAGE: tl.constexpr, HEADS: tl.constexpr):
    page = tl.load(pages + entry // PAGE, mask=live, other=0).to(tl.int64)
    return (page * PAGE + entry % PAGE) * HEADS + head


@triton.jit(do_not_specialize=["items", "splits", "requests", "seat_count", "source_width", "target_width"])
def _gather_layers(
    source, target, source_pages, target_pages, layers, seats, head_map, resident, tokens, slots, misses, counts,
    items, splits, requests, groups, width, seat_count, source_width, target_width,
    PAGE: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        reader = item // splits
        head = reader % HEADS
        request = reader // HEADS % requests
        layer = tl.load(layers + reader // HEADS // requests).to(tl.int64)
        pair = request * groups + tl.load(head_map + layer * HEADS + head).to(tl.int64)
        seat = layer * seat_count + tl.load(seats + request).to(tl.int64)
        count = tl.where(tl.load(resident + layer) != 0, 0, tl.load(counts + pair))
        for first in range(item % splits * ROWS, count, splits * ROWS):
            place = first + tl.arange(0, ROWS)
            live = place < count
            at = pair * width + tl.load(misses + pair * width + place, mask=live, other=0)
            token = tl.load(tokens + at, mask=live, other=0).to(tl.int64)
            slot = tl.load(slots + at, mask=live, other=0).to(tl.int64)
            source_row = _row_of(source_pages + seat * source_width, token, head, live, PAGE, HEADS)
            target_row = _row_of(target_pages + seat * target_width, slot, head, live, PAGE, HEADS)
            _copy(source, source_row, target, target_row, live, WIDTH, BLOCK)


@triton.jit
def _write(pool, row, key, value, live, DIM: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)[None, :]
    mask = live[:, None] & (column < DIM)
    first = pool + row[:, None] * (2 * DIM) + column
    tl.store(first, key.to(pool.dtype.element_ty), mask=mask)
    tl.store(first + DIM, value.to(pool.dtype.element_ty), mask=mask)


@triton.jit
def _read(new, token, head, token_stride, head_stride, live, DIM: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)[None, :]
    mask = live[:, None] & (column < DIM)
    return tl.load(new + (token * token_stride + head * head_stride)[:, None] + column, mask=mask)


@triton.jit(do_not_specialize=["count", "page_width"])
def _append_to_pages(
    pool, pages, seats, positions, key, value,
    count, page_width, key_token, key_head, value_token, value_head,
    PAGE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = at // HEADS, at % HEADS
    position = tl.load(positions + token, mask=at < count, other=-1).to(tl.int64)
    live = position >= 0
    seat = tl.load(seats + token, mask=live, other=0).to(tl.int64)
    new_key = _read(key, token, head, key_token, key_head, live, DIM, BLOCK)
    new_value = _read(value, token, head, value_token, value_head, live, DIM, BLOCK)
    row = _row_of(pages + seat * page_width, position, head, live, PAGE, HEADS)
    _write(pool, row, new_key, new_value, live, DIM, BLOCK)


@triton.jit(do_not_specialize=["count", "host_width", "token_width", "slot_width", "sink", "recent"])
def _append_to_tier(
    host, arena, host_pages, token_pages, slot_pages, resident, seats, positions, lengths, key, value,
    count, host_width, token_width, slot_width, key_token, key_head, value_token, value_head, sink, recent,
    PAGE: tl.constexpr, TO_HOST: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = at // HEADS, at % HEADS
    position = tl.load(positions + token, mask=at < count, other=-1).to(tl.int64)
    live = position >= 0
    seat = tl.load(seats + token, mask=live, other=0).to(tl.int64)
    new_key = _read(key, token, head, key_token, key_head, live, DIM, BLOCK)
    new_value = _read(value, token, head, value_token, value_head, live, DIM, BLOCK)
    if tl.load(resident) != 0:
        row = _row_of(token_pages + seat * token_width, position, head, live, PAGE, HEADS)
        _write(arena, row, new_key, new_value, live, DIM, BLOCK)
    else:
        if TO_HOST:
            row = _row_of(host_pages + seat * host_width, position, head, live, PAGE, HEADS)
            _write(host, row, new_key, new_value, live, DIM, BLOCK)
        length = tl.load(lengths + token, mask=live, other=0).to(tl.int64)
        kept = live & ((position < sink) | (position >= length - recent))
        slot = tl.where(position < sink, position, sink + position % recent)
        row = _row_of(slot_pages + seat * slot_width, slot, head, kept, PAGE, HEADS)
        _write(arena, row, new_key, new_value, kept, DIM, BLOCK)

"""Operations that number KV rows or write new ones: row numbers of a selection, append."""

from __future__ import annotations

import torch
from kernel_case import PAGE_SIZE, RECENT, SINK, Case
from kernel_checks import Operation, calls_of, require_equal, row_numbers
from torch import Tensor

from specontext.kernels import row_index
from specontext.kernels import rows as moves


def rows(case: Case) -> list[Operation]:
    """Rows of a selection for all layers; every second layer is resident, with the arena's pages as pages of its tokens."""
    shape, width, device = case.shape, case.budget.total, case.device
    count, most = 4, case.arena_pages.shape[2] * PAGE_SIZE
    entries = torch.randint(most, (2, count, case.requests, case.groups, width), generator=case.order).to(device)
    entries[..., -1] = -1
    fixed = {
        "token_pages": case.arena_pages,
        "slot_pages": case.arena_pages.flip(2).contiguous(),
        "resident": torch.arange(shape.layers, device=device) % 2 == 0,
        "seats": case.seats,
        "head_map": case.head_map,
        "page_size": PAGE_SIZE,
    }

    def call(i: int) -> Tensor:
        return row_index.selected_rows(entries[0, i], entries[1, i], **fixed)

    right = row_index.selected_rows_reference(entries[0, 1], entries[1, 1], **fixed)
    error, size = require_equal("row index", call(1), right), call(1).itemsize
    pairs = case.requests * width
    words = f"{case.requests} x {shape.layers} layers x {shape.kv_heads} heads x {width}"
    moved = pairs * (2 * case.groups * 8 + shape.layers * shape.kv_heads * size)
    return [Operation("row_index", words, calls_of(call, count), error, moved)]


def append(case: Case) -> list[Operation]:
    shape, count = case.shape, 8
    new = case.random(2, count, case.requests, shape.kv_heads, shape.head_dim)
    lengths = torch.full((case.requests,), case.context, device=case.device)
    host_pages, slot_pages, context_pages = case.host_pages[0], case.arena_pages[0], case.context_pages[0]
    positions = [lengths - 1 - i for i in range(count)]
    tiers = {
        "host": case.host,
        "arena": case.arena,
        "host_pages": host_pages,
        "token_pages": slot_pages,  # of a resident layer; not read here
        "slot_pages": slot_pages,
        "resident": torch.zeros(1, dtype=torch.bool, device=case.device),
        "page_size": PAGE_SIZE,
        "sink": SINK,
        "recent": RECENT,
    }

    def tokens(i: int) -> dict[str, Tensor]:
        return {"seats": case.seats, "positions": positions[i], "key": new[0, i], "value": new[1, i]}

    def offloaded(i: int) -> None:
        moves.append_layer(**tiers, **tokens(i), lengths=lengths)

    def resident(i: int) -> None:
        moves.append_tokens(case.context_rows, context_pages, **tokens(i), page_size=PAGE_SIZE)

    for i in range(count):
        offloaded(i)
        resident(i)
    _synchronize(case.device)
    for i in range(count):
        right = torch.stack((new[0, i], new[1, i]), 2)  # [R, Hkv, 2, D]
        ring = SINK + positions[i] % RECENT
        for pool, pages, entry in (
            (case.host, host_pages, positions[i]),
            (case.arena, slot_pages, ring),
            (case.context_rows, context_pages, positions[i]),
        ):
            rows = row_numbers(pages, entry[:, None, None].expand(-1, shape.kv_heads, 1), shape.kv_heads)[..., 0]
            require_equal("append", pool[rows.to(pool.device)], right.to(pool.device))
    size = case.requests * shape.kv_heads * shape.row_bytes
    words = f"{case.requests} tokens x {shape.kv_heads} heads, one layer"
    both = Operation("append_tiers", words, calls_of(offloaded, count), 0.0, 3 * size)
    if case.device.type == "cuda":
        both.bytes, both.over = size, "bus"
    return [both, Operation("append_tokens", words, calls_of(resident, count), 0.0, 2 * size)]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Operations that number KV rows or write new ones: row numbers of a selection, append."""

from __future__ import annotations

import torch
from kernel_case import PAGE_SIZE, RECENT, SINK, Case
from kernel_checks import Operation, calls_of, require_equal, row_numbers
from torch import Tensor

from specontext.kernels import rows as moves
from specontext.kernels import slot_plan
from specontext.kernels.dispatch import reference_of
from specontext.kernels.quantised_rows import quantise
from specontext.kernels.spans import read_rows
from specontext.kernels.tables import NewTokens, Pages, Slots, Tiers
from specontext.kv.layout import places_of
from specontext.memory.layer_blocks import one_by_one


def _pages(case: Case, rows: Tensor, table: Tensor) -> Pages:
    """Pages of layers each by itself."""
    return Pages(rows, table, PAGE_SIZE, case.shape.kv_heads, places_of(one_by_one(len(table)), case.device))


def _slots(case: Case, rows: Tensor, table: Tensor) -> Slots:
    pages = _pages(case, rows, table)
    return Slots(rows, table, PAGE_SIZE, case.shape.kv_heads, pages.layers, SINK, RECENT)


def rows(case: Case) -> list[Operation]:
    """Rows of a selection for all layers; every second layer is resident, with the arena's pages as pages of its tokens."""
    shape, width, device = case.shape, case.budget.total, case.device
    count, most = 4, case.arena_pages.shape[2] * PAGE_SIZE
    entries = torch.randint(most, (2, count, case.requests, case.groups, width), generator=case.order).to(device)
    entries[..., -1] = -1
    here = _pages(case, case.arena, case.arena_pages)
    there = _slots(case, case.arena, case.arena_pages.flip(2).contiguous())
    tiers = Tiers(here, there, here, torch.arange(shape.layers, device=device) % 2 == 0)
    fixed = (tiers, range(shape.layers), case.seats, case.head_map)

    def call(i: int) -> Tensor:
        return slot_plan.selected_rows(*fixed, entries[0, i], entries[1, i])

    right = reference_of(slot_plan.selected_rows)(*fixed, entries[0, 1], entries[1, 1])
    error, size = require_equal("row index", call(1), right), call(1).itemsize
    pairs = case.requests * width
    words = f"{case.requests} x {shape.layers} layers x {shape.kv_heads} heads x {width}"
    moved = pairs * (2 * case.groups * 8 + shape.layers * shape.kv_heads * size)
    return [Operation("row_index", words, calls_of(call, count), error, moved)]


def append(case: Case) -> list[Operation]:
    shape, count = case.shape, 8
    new = case.random(case.row[0], count, case.requests, shape.kv_heads, shape.head_dim)
    lengths = torch.full((case.requests,), case.context, device=case.device)
    host_pages, slot_pages, context_pages = case.host_pages, case.arena_pages, case.context_pages
    positions = [lengths - 1 - i for i in range(count)]
    slots = _slots(case, case.arena, slot_pages)
    host = _pages(case, case.host, host_pages)
    offloaded_layer = torch.zeros(1, dtype=torch.bool, device=case.device)
    tiers = Tiers(slots, slots, host, offloaded_layer)  # the pages of a resident layer are not read here
    context = _pages(case, case.context_rows, context_pages)
    tokens = [NewTokens(case.seats, positions[i], lengths, new[0, i], new[-1, i]) for i in range(count)]

    def offloaded(i: int) -> None:
        moves.append_layer(tiers, 0, tokens[i])

    def resident(i: int) -> None:
        moves.append_tokens(context, 0, tokens[i])

    for i in range(count):
        offloaded(i)
        resident(i)
    _synchronize(case.device)
    for i in range(count):
        right = new[:, i].permute(1, 2, 0, 3)  # [R, Hkv, *row]
        ring = SINK + positions[i] % RECENT
        for pool, pages, entry in (
            (case.host, host_pages, positions[i]),
            (case.arena, slot_pages, ring),
            (case.context_rows, context_pages, positions[i]),
        ):
            rows = row_numbers(pages[0], entry[:, None, None].expand(-1, shape.kv_heads, 1), shape.kv_heads)[..., 0]
            expected = right if shape.kv_dtype is None else quantise(right, shape.kv_dtype)
            require_equal("append", read_rows(pool, rows.to(pool.device)), expected.to(pool.device))
    size = case.requests * shape.kv_heads * shape.row_bytes
    words = f"{case.requests} tokens x {shape.kv_heads} heads, one layer"
    both = Operation("append_tiers", words, calls_of(offloaded, count), 0.0, 3 * size)
    if case.device.type == "cuda":
        both.bytes, both.over = size, "bus"
    return [both, Operation("append_tokens", words, calls_of(resident, count), 0.0, 2 * size)]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

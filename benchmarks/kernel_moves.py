"""Operations that move KV rows or number them: gather from the host pool, row numbers of a selection, append."""

from __future__ import annotations

import torch
from kernel_case import PAGE_SIZE, RECENT, SINK, Case
from kernel_checks import Operation, WrongResult, calls_of, require_equal, row_numbers
from measure import GIB
from torch import Tensor

from specontext.kernels import rows as moves
from specontext.kernels import slot_plan
from specontext.kernels.dispatch import reference_of, use_triton
from specontext.kernels.tables import Copies, NewTokens, Pages, Slots, Tiers

GATHER_TARGET = 0.7  # of the copy engine's bandwidth


def gather(case: Case) -> list[Operation]:
    """Pages as the engine lays them out and, beside it, anywhere in the pool: what a lack of order costs."""
    return [_gather(case, "gather", case.host_pages), _gather(case, "gather_scattered", case.scattered_pages)]


def _gather(case: Case, name: str, pages: Tensor) -> Operation:
    shape, device = case.shape, case.device
    steady = case.plans[len(case.selections) :]
    tokens = [t.to(device) for t in case.selections]
    slots = [torch.where(s >= 0, s + SINK + RECENT, s).to(device) for s, _ in steady]
    missing = [m.to(device) for _, m in steady]
    if device.type == "cuda" and not use_triton(tokens[0]):
        raise WrongResult("gather: the kernel would not run here; is Triton installed?")
    source, target = Pages(case.host, pages, PAGE_SIZE, shape.kv_heads), _slots(case, case.arena, case.arena_pages)
    which = (torch.arange(shape.layers, device=device), torch.zeros(shape.layers, dtype=torch.bool, device=device))
    copies = [Copies(case.seats, *plan, case.head_map) for plan in zip(tokens, slots, missing, strict=True)]

    def call(i: int) -> None:
        moves.gather_rows_layers(source, target, *which, copies[i])

    right = case.arena.clone()
    reference_of(moves.gather_rows_layers)(source, _slots(case, right, case.arena_pages), *which, copies[1])
    call(1)
    error = require_equal("gather", case.arena, right)
    del right
    rows = case.misses * shape.layers * shape.kv_heads // case.groups
    pool = case.host.numel() * case.host.itemsize / GIB
    words = f"{rows} rows of {shape.row_bytes} B, {shape.layers} layers, pool {pool:.1f} GiB"
    crossed = rows * shape.row_bytes
    operation = Operation(name, words, calls_of(call, len(tokens)), error, crossed if device.type == "cuda" else 2 * crossed)
    if device.type == "cuda":
        operation.over, operation.note = "bus", f"target {GATHER_TARGET:.0%} of the copy engine"
    return operation


def _slots(case: Case, rows: Tensor, pages: Tensor) -> Slots:
    return Slots(rows, pages, PAGE_SIZE, case.shape.kv_heads, SINK, RECENT)


def rows(case: Case) -> list[Operation]:
    """Rows of a selection for all layers; every second layer is resident, with the arena's pages as pages of its tokens."""
    shape, width, device = case.shape, case.budget.total, case.device
    count, most = 4, case.arena_pages.shape[2] * PAGE_SIZE
    entries = torch.randint(most, (2, count, case.requests, case.groups, width), generator=case.order).to(device)
    entries[..., -1] = -1
    here = Pages(case.arena, case.arena_pages, PAGE_SIZE, shape.kv_heads)
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
    new = case.random(2, count, case.requests, shape.kv_heads, shape.head_dim)
    lengths = torch.full((case.requests,), case.context, device=case.device)
    host_pages, slot_pages, context_pages = case.host_pages, case.arena_pages, case.context_pages
    positions = [lengths - 1 - i for i in range(count)]
    slots = _slots(case, case.arena, slot_pages)
    host = Pages(case.host, host_pages, PAGE_SIZE, shape.kv_heads)
    offloaded_layer = torch.zeros(1, dtype=torch.bool, device=case.device)
    tiers = Tiers(slots, slots, host, offloaded_layer)  # the pages of a resident layer are not read here
    context = Pages(case.context_rows, context_pages, PAGE_SIZE, shape.kv_heads)
    tokens = [NewTokens(case.seats, positions[i], lengths, new[0, i], new[1, i]) for i in range(count)]

    def offloaded(i: int) -> None:
        moves.append_layer(tiers, 0, tokens[i])

    def resident(i: int) -> None:
        moves.append_tokens(context, 0, tokens[i])

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
            rows = row_numbers(pages[0], entry[:, None, None].expand(-1, shape.kv_heads, 1), shape.kv_heads)[..., 0]
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

"""Operations on rows of neighbouring layers that lie side by side on the host: pieces in and out, and one layer out of a block.

pieces       the missing rows of all layers as pieces of 1, 2, 4 and 8 rows from pages anywhere in the pool, by 8 to 64 programs
tiles        pieces of the engine's size by programs with larger and smaller tiles, and more or fewer of them under way
gather       the same as the engine does it: pages in the order of prompts, the kernel's own numbers; and with a head map that
             sends some heads elsewhere from layer to layer, so that their pieces fall apart
dense_read   one layer's rows of consecutive tokens, out of pieces and beside it where a layer's rows lie together
write_back   the new rows of one token a request in all layers, as pieces, and beside it row by row
chunk        the rows of a prompt's chunk in one block, as pieces, and beside it layer by layer
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from kernel_case import PAGE_SIZE, RECENT, SINK, Case
from kernel_checks import Operation, WrongResult, calls_of, require_equal
from measure import GIB
from torch import Tensor

from specontext.kernels import rows as kernels
from specontext.kernels.dispatch import reference_of, use_triton
from specontext.kernels.quantised_rows import quantise
from specontext.kernels.rows import append_tokens, gather_rows
from specontext.kernels.slot_plan import listed
from specontext.kernels.spans import read_rows, rows_like
from specontext.kernels.tables import Copies, NewTokens, Pages, Parts, is_quantised
from specontext.kv.layout import BlockParts, places_of
from specontext.memory.layer_blocks import LayerBlocks, divide_layers, one_by_one

GATHER_TARGET = 42.0  # GB/s from pools of 16 and 44 GiB
ROWS = (1, 2, 4, 8)  # of a piece
PROGRAMS = (8, 16, 32, 64)
TILES = ((16384, 4, 3), (16384, 4, 4), (16384, 4, 6), (32768, 8, 3), (32768, 8, 4), (8192, 4, 6))  # bytes, warps and stages
ELSEWHERE = (0.1, 0.3)  # shares of the heads of a layer
DENSE_TOKENS = 16384
WRITTEN_AT_ONCE = 4  # sets of new rows


def blocks_of(case: Case, rows: int | None = None) -> LayerBlocks:
    """Blocks of the engine's size, or of so many layers."""
    head_map, size = case.head_map.tolist(), case.shape.row_bytes
    return divide_layers(head_map, size) if rows is None else divide_layers(head_map, size, least=rows * size)


def on_host(case: Case, blocks: LayerBlocks, table: Tensor) -> Pages:
    host, page = case.host, PAGE_SIZE * case.shape.kv_heads * blocks.places
    if is_quantised(host):  # a page is a span
        rows = host[: len(host) // blocks.places * blocks.places].view(-1, page, host.shape[2])
    else:
        rows = host[: len(host) // page * page]
    return Pages(rows, table.contiguous().to(case.device), PAGE_SIZE, case.shape.kv_heads, places_of(blocks, case.device))


def in_slots(case: Case) -> Pages:
    alone = places_of(one_by_one(case.shape.layers), case.device)
    return Pages(case.arena, case.arena_pages, PAGE_SIZE, case.shape.kv_heads, alone)


def pool_pages(case: Case, blocks: LayerBlocks) -> int:
    """Pages of the host pool, without the one that nobody holds."""
    return case.host.nbytes // (PAGE_SIZE * case.shape.kv_heads * blocks.places * case.shape.row_bytes) - 1


def anywhere(case: Case, blocks: LayerBlocks) -> Tensor:
    """Pages [blocks, R, P] anywhere in the pool; distinct in a block."""
    count = case.requests * case.token_pages
    least = pool_pages(case, blocks)
    if least < count:
        raise ValueError(f"the host pool holds fewer than {case.requests} x {case.context} tokens of one block: enlarge it")
    return torch.stack([case.permutation(least, 1)[:count].view(case.requests, -1) for _ in blocks.sizes])


def as_prompts_leave_them(case: Case, blocks: LayerBlocks) -> Tensor:
    """Pages [blocks, R, P]: runs of a chunk's pages, block after block; blocks share pages where the pool has too little room."""
    lines, run = len(blocks.sizes), max(1, case.chunk // PAGE_SIZE)
    token, line = torch.arange(case.token_pages), torch.arange(lines)[:, None, None]
    request = torch.arange(case.requests)[:, None] * (-(-case.token_pages // run) * run * lines)
    return 1 + (request + token // run * (run * lines) + line * run + token % run) % pool_pages(case, blocks)


# Loads ----------------------------------------------------------------------------------------------------------------


def pieces(case: Case) -> list[Operation]:
    found = []
    for rows in ROWS:
        if rows <= case.shape.layers:
            blocks = blocks_of(case, rows)
            source = on_host(case, blocks, anywhere(case, blocks))
            parts = BlockParts.of_map(blocks, case.head_map.tolist(), case.device).all
            size = rows * case.shape.row_bytes
            found += [
                _loads(case, f"pieces_{size}_by_{programs}", source, parts, f"{size} B", programs=programs)
                for programs in (PROGRAMS if case.device.type == "cuda" else PROGRAMS[:1])
            ]
    return found


def tiles(case: Case) -> list[Operation]:
    if case.device.type != "cuda":
        return []
    from specontext.kernels.triton.pieces import copy_pieces

    blocks = blocks_of(case)
    source = on_host(case, blocks, anywhere(case, blocks))
    parts = BlockParts.of_map(blocks, case.head_map.tolist(), case.device).all
    words = f"{blocks.places * case.shape.row_bytes} B"
    return [
        _loads(
            case,
            f"tiles_{size >> 10}k_{warps}_warps_{stages}_stages_by_{programs}",
            source,
            parts,
            words,
            copy=copy_pieces,
            programs=programs,
            tile_bytes=size,
            warps=warps,
            stages=stages,
        )
        for size, warps, stages in TILES
        for programs in (4, *PROGRAMS[:3])
    ]


def gather(case: Case) -> list[Operation]:
    blocks, head_map = blocks_of(case), case.head_map.tolist()
    source = on_host(case, blocks, as_prompts_leave_them(case, blocks))
    words = f"{blocks.places * case.shape.row_bytes} B"
    found = [_loads(case, "gather", source, BlockParts.of_map(blocks, head_map, case.device).all, words)]
    for share in ELSEWHERE if case.groups > 1 else ():
        measured = [[(g + 1) % case.groups if _one_in(case, share) else g for g in groups] for groups in head_map]
        parts = BlockParts.of_map(blocks, measured, case.device).all
        words = f"{len(parts)} parts in place of {len(blocks.sizes) * case.shape.kv_heads}"
        found.append(_loads(case, f"gather_{share:.0%}_elsewhere", source, parts, words))
    for operation in found:
        operation.note = f"target {GATHER_TARGET:.0f} GB/s" if case.device.type == "cuda" else ""
    return found


def _one_in(case: Case, share: float) -> bool:
    return bool(torch.rand((), generator=case.order) < share)


def _loads(
    case: Case,
    name: str,
    source: Pages,
    parts: Parts,
    words: str,
    *,
    copy: Callable[..., None] = kernels.copy_pieces,
    **how: Any,
) -> Operation:
    """Loads of what the steady state of a sequence of selections misses."""
    shape, device, target = case.shape, case.device, in_slots(case)
    steady = case.plans[len(case.selections) :]
    copies = []
    for tokens, (slots, missing) in zip(case.selections, steady, strict=True):
        slots = torch.where(slots >= 0, slots + SINK + RECENT, slots)
        copies.append(listed(case.seats, *(x.to(device) for x in (tokens, slots, missing))))
    if device.type == "cuda" and not use_triton(copies[0].counts):
        raise WrongResult(f"{name}: the kernel would not run here; is Triton installed?")
    here = torch.zeros(shape.layers, dtype=torch.bool, device=device)

    def call(i: int) -> None:
        copy(source, target, parts, here, copies[i], **how)

    before = case.arena.clone()
    reference_of(kernels.copy_pieces)(source, target, parts, here, copies[1])
    right = case.arena.clone()
    case.arena.copy_(before)
    del before
    call(1)
    error = require_equal(name, case.arena, right)
    del right
    read = (parts.layers >= 0).sum(1) * sum(c.counts[:, parts.groups].sum(0) for c in copies) / len(copies)
    crossed = int(read.sum()) * shape.row_bytes
    pool = case.host.numel() * case.host.itemsize / GIB
    shown = f"{crossed // shape.row_bytes} rows of {shape.row_bytes} B, {words}, pool {pool:.1f} GiB"
    return _operation(case, name, shown, calls_of(call, len(copies)), error, crossed)


def _operation(
    case: Case, name: str, words: str, calls: Sequence[Callable[[], Any]], error: float, crossed: int, moved: int | None = None
) -> Operation:
    """What crosses the bus once on a GPU; on a CPU it is read and written, or what is said to be moved."""
    if case.device.type == "cuda":
        return Operation(name, words, calls, error, crossed, over="bus")
    return Operation(name, words, calls, error, 2 * crossed if moved is None else moved)


# One layer ------------------------------------------------------------------------------------------------------------


def dense_read(case: Case) -> list[Operation]:
    """As dense attention streams them: token by token, or each head's tokens one after the other."""
    heads = case.shape.kv_heads
    tokens = torch.arange(min(DENSE_TOKENS, case.context), device=case.device)
    staging = rows_like(case.host, len(tokens) * heads, case.device)
    place = torch.arange(len(staging), device=case.device)
    found = []
    for name, blocks in (("dense_read_alone", one_by_one(case.shape.layers)), ("dense_read", blocks_of(case))):
        source = on_host(case, blocks, as_prompts_leave_them(case, blocks))
        for order in ("tokens", "heads"):
            rows = []
            for layer in range(case.shape.layers):
                found_rows = source.rows_of(layer, case.seats[:1], tokens[None, None])[0]  # [Hkv, T]
                rows.append((found_rows.T if order == "tokens" else found_rows).reshape(-1))

            def call(i: int, rows: list[Tensor] = rows, pool: Tensor = source.rows) -> None:
                gather_rows(pool, rows[i], staging, place)

            right = torch.empty_like(staging)
            reference_of(gather_rows)(source.rows, rows[-1], right, place)
            call(len(rows) - 1)
            error = require_equal(name, staging, right)
            words = f"{len(tokens)} tokens x {heads} heads, 1 row in {source.layers.count}"
            size = len(staging) * case.shape.row_bytes
            found.append(_operation(case, f"{name}_by_{order}", words, calls_of(call, len(rows)), error, size))
    return found


# Out ------------------------------------------------------------------------------------------------------------------


def write_back(case: Case) -> list[Operation]:
    shape, device, source = case.shape, case.device, in_slots(case)
    here = torch.zeros(shape.layers, dtype=torch.bool, device=device)
    positions = [torch.full((case.requests, 1, 1), PAGE_SIZE + i, device=device) for i in range(WRITTEN_AT_ONCE)]
    found = []
    for name, blocks in (("write_back", blocks_of(case)), ("write_back_rows", one_by_one(shape.layers))):
        target = on_host(case, blocks, _for_writing(case, blocks, 2))
        parts = BlockParts.of_map(blocks, [[0] * shape.kv_heads] * shape.layers, device).all
        copies = [Copies.of_all(case.seats, SINK + at % RECENT, at) for at in positions]

        def call(i: int, target: Pages = target, parts: Parts = parts, copies: list[Copies] = copies) -> None:
            kernels.copy_pieces(source, target, parts, here, copies[i])

        for i in range(WRITTEN_AT_ONCE):
            call(i)
            _synchronize(device)
            _require_written(case, name, source, target, copies[i])
        size = case.requests * shape.layers * shape.kv_heads * shape.row_bytes
        words = f"{case.requests} tokens x {shape.layers} layers x {shape.kv_heads} heads, {target.layers.count} rows a piece"
        found.append(_operation(case, name, words, calls_of(call, WRITTEN_AT_ONCE), 0.0, size))
    return found


def _require_written(case: Case, name: str, source: Pages, target: Pages, copies: Copies) -> None:
    for layer in range(case.shape.layers):
        rows = []
        for pages, entries in ((source, copies.source), (target, copies.target)):
            numbers = pages.rows_of(layer, copies.seats, entries.long())
            rows.append(read_rows(pages.rows, numbers.to(pages.rows.device)))
        require_equal(name, rows[1].to(case.device), rows[0])


def chunk(case: Case) -> list[Operation]:
    shape, device, blocks = case.shape, case.device, blocks_of(case)
    count, heads, places = case.chunk, shape.kv_heads, blocks.places
    numbers = case.random(count, heads, places, *case.row)
    new = numbers if shape.kv_dtype is None else quantise(numbers, shape.kv_dtype)
    seats, positions = torch.zeros(count, dtype=torch.int64, device=device), torch.arange(count, device=device)
    wanted = torch.arange(places, device=device) < blocks.sizes[0]
    width = -(-count // PAGE_SIZE)
    in_blocks = on_host(case, blocks, _for_writing(case, blocks, width))
    single = one_by_one(shape.layers)
    in_layers = on_host(case, single, _for_writing(case, single, width))
    key_value = [(numbers[:, :, place, 0], numbers[:, :, place, -1]) for place in range(blocks.sizes[0])]

    def as_pieces(_: int) -> None:
        kernels.append_pieces(in_blocks, 0, seats, positions, new, wanted)

    def by_layers(_: int) -> None:
        for layer, (key, value) in enumerate(key_value):
            append_tokens(in_layers, layer, NewTokens(seats, positions, positions, key, value))

    found = []
    for name, call, pages in (("chunk", as_pieces, in_blocks), ("chunk_by_layers", by_layers, in_layers)):
        call(0)
        _synchronize(device)
        for layer in range(blocks.sizes[0]):
            rows = pages.rows_of(layer, case.seats[:1], positions[None, None])[0].T  # [T, Hkv]
            require_equal(name, read_rows(pages.rows, rows.to(pages.rows.device)).to(device), new[:, :, layer].contiguous())
        words = f"{count} tokens x {blocks.sizes[0]} layers x {heads} heads"
        size = count * blocks.sizes[0] * heads * shape.row_bytes
        found.append(_operation(case, name, words, calls_of(call, 1), 0.0, size))
    return found


def _for_writing(case: Case, blocks: LayerBlocks, pages: int) -> Tensor:
    """Distinct pages [blocks, R, pages] anywhere in the pool."""
    count, room = len(blocks.sizes) * case.requests * pages, pool_pages(case, blocks)
    if room < count:
        raise ValueError(f"the host pool has {room} pages and {count} are written: enlarge it")
    return case.permutation(room, 1)[:count].view(len(blocks.sizes), case.requests, pages)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Rows moved by the Triton kernels and by the references, against plain loops: the right bits in the right rows, no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

pytest.importorskip("triton")

from specontext.core import Selection
from specontext.kernels import dispatch, rows
from specontext.kernels.tables import NewTokens, Pages, Slots, Tiers
from specontext.kernels.triton import rows as triton_rows
from specontext.kv.cache import KVCache
from specontext.kv.hot_slots import SlotSizes
from specontext.kv.layout import Layout, Reader, places_of
from specontext.kv.pool import make_pools
from specontext.memory.layer_blocks import LayerBlocks, one_by_one
from specontext.model_shape import ModelShape
from specontext.retrieval.selector import Budget

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
QUICK = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
FORMATS = [torch.float32, torch.float16, torch.bfloat16]
DIMS = [3, 64, 80, 96, 128, 256]
Function = Callable[..., None]

both = pytest.mark.parametrize("module", [triton_rows, rows], ids=["triton", "reference"])


def function_of(module: Any, name: str) -> Function:
    if module is triton_rows:
        return getattr(module, name)  # type: ignore[no-any-return]
    return getattr(rows, f"{name}_reference", None) or dispatch.reference_of(getattr(rows, name))


def random_rows(count: int, dim: int, dtype: torch.dtype, seed: int = 0, *, pinned: bool = False) -> Tensor:
    numbers = torch.randn(count, 2, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return numbers.pin_memory() if pinned else numbers.to(DEVICE)


def page_tables(layers: int, seats: int, pages: int, generator: torch.Generator) -> Tensor:
    """Distinct pages, page 0 belongs to nobody: int64 [L, seats, P]."""
    return 1 + torch.randperm(layers * seats * pages, generator=generator).view(layers, seats, pages)


def row_of(pages: Tensor, entry: int, head: int, page_size: int, kv_heads: int) -> int:
    return (int(pages[entry // page_size]) * page_size + entry % page_size) * kv_heads + head


# Gather ---------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_gather(module: Any, dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    source, target = random_rows(90, dim, dtype), random_rows(70, dim, dtype, seed=2)
    source_rows = torch.randint(-30, 90, (3, 1, 21), generator=generator)  # some are skipped, some occur twice
    target_rows = torch.randperm(70, generator=generator)[:63].view(3, 1, 21)
    expected = target.clone()
    for a, b in zip(source_rows.flatten().tolist(), target_rows.flatten().tolist(), strict=True):
        if a >= 0:
            expected[b] = source[a]
    function_of(module, "gather_rows")(source, source_rows.to(DEVICE), target, target_rows.to(DEVICE))
    assert torch.equal(target, expected)


@both
@pytest.mark.parametrize("count", [0, 1, 40])
def test_gather_of_nothing(module: Any, count: int) -> None:
    target = random_rows(50, 4, torch.float32)
    before, nowhere = target.clone(), torch.full((count,), -1, device=DEVICE)
    function_of(module, "gather_rows")(target + 1, nowhere, target, nowhere)
    assert torch.equal(target, before)


@both
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(("dim", "kv_heads", "page_size"), [(3, 1, 1), (64, 5, 3), (80, 2, 16), (128, 1, 4)])
@pytest.mark.parametrize(("start", "tokens"), [(0, 1), (0, 30), (7, 11), (29, 0)])
def test_gather_of_tokens(
    module: Any, start: int, tokens: int, dim: int, kv_heads: int, page_size: int, dtype: torch.dtype
) -> None:
    block = LayerBlocks((3,), 4, (0, 1, 2))
    table = page_tables(1, 2, 30, torch.Generator().manual_seed(5))
    pool = random_rows(61 * page_size * kv_heads * block.places, dim, dtype)
    pages = Pages(pool, table.to(DEVICE), page_size, kv_heads, places_of(block, DEVICE))
    whole = random_rows((tokens + 2) * kv_heads, dim, dtype, seed=1).view(tokens + 2, kv_heads, 2, dim)
    expected = whole.clone()
    for t in range(tokens):
        for h in range(kv_heads):
            expected[t, h] = pool[row_of(table[0, 1], start + t, h, page_size, kv_heads) * block.places + 2]
    function_of(module, "gather_tokens")(pages, 2, 1, start, whole[:tokens])
    assert torch.equal(whole, expected)


# Append ---------------------------------------------------------------------------------------------------------------


def new_tokens(tokens: int, kv_heads: int, dim: int, dtype: torch.dtype, *, transposed: bool) -> tuple[Tensor, Tensor]:
    """K and V [T, Hkv, D], as a model's attention hands them over or dense."""
    generator = torch.Generator().manual_seed(4)
    key, value = torch.randn(2, kv_heads, tokens, dim, generator=generator).to(dtype).to(DEVICE).transpose(1, 2)
    return (key, value) if transposed else (key.contiguous(), value.contiguous())


@both
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("dim", "kv_heads", "page_size"), [(3, 1, 1), (64, 5, 3), (80, 2, 16), (96, 3, 5), (128, 1, 4), (256, 2, 7)]
)
@pytest.mark.parametrize("resident", [False, True], ids=["offloaded", "resident"])
def test_append_to_both_tiers(module: Any, resident: bool, dim: int, kv_heads: int, page_size: int, dtype: torch.dtype) -> None:
    """A chunk, a decode token and a padded row: all to the tier where the layer lives; of an offloaded one sinks and the ring's
    tokens to their slots as well."""
    generator = torch.Generator().manual_seed(6)
    sink, recent = 2, 3
    block = LayerBlocks((3,), 4, (0, 1, 2))  # of the host; the layer is its second
    in_block = places_of(block, DEVICE)
    host_pages = page_tables(1, 3, 12, generator)[0]
    token_pages, slot_pages = (1 + torch.randperm(51, generator=generator)).split((36, 15))
    token_pages, slot_pages = token_pages.view(3, 12), slot_pages.view(3, 5)
    host = random_rows(37 * page_size * kv_heads * block.places, dim, dtype)
    arena = random_rows(52 * page_size * kv_heads, dim, dtype, seed=1)
    last = 12 * page_size - 1
    tokens = [(2, p, 9) for p in range(9)] + [(0, last, last + 1), (1, -1, 0)]  # seat, position, length
    key, value = new_tokens(len(tokens), kv_heads, dim, dtype, transposed=dim != 80)
    expected_host, expected_arena, expected_pool = host.clone(), arena.clone(), host.clone()
    for t, (seat, position, length) in enumerate(tokens):
        for h in range(kv_heads if position >= 0 else 0):
            new = torch.stack((key[t, h], value[t, h]))
            row = row_of(host_pages[seat], position, h, page_size, kv_heads) * block.places + 1
            expected_pool[row] = new
            if resident:
                expected_arena[row_of(token_pages[seat], position, h, page_size, kv_heads)] = new
                continue
            expected_host[row] = new
            if position < sink or position >= length - recent:
                slot = position if position < sink else sink + position % recent
                expected_arena[row_of(slot_pages[seat], slot, h, page_size, kv_heads)] = new
    seats, positions, lengths = (torch.tensor(x, device=DEVICE) for x in zip(*tokens, strict=True))
    of_host, of_tokens, of_slots = (x.to(DEVICE)[None] for x in (host_pages, token_pages, slot_pages))
    pool, flags = host.clone(), torch.tensor([not resident, resident, not resident], device=DEVICE)
    new, sizes, alone = NewTokens(seats, positions, lengths, key, value), (page_size, kv_heads), places_of(one_by_one(3), DEVICE)
    function_of(module, "append_tokens")(Pages(pool, of_host, *sizes, in_block), 1, new)
    assert torch.equal(pool, expected_pool)
    slots = Slots(arena, of_slots.expand(3, -1, -1).contiguous(), *sizes, alone, sink, recent)
    of_layers = Pages(arena, of_tokens.expand(3, -1, -1).contiguous(), *sizes, alone)
    tiers = Tiers(of_layers, slots, Pages(host, of_host, *sizes, in_block), flags)
    function_of(module, "append_layer")(tiers, 1, new)
    assert torch.equal(host, expected_host) and torch.equal(arena, expected_arena)


@both
def test_append_converts_to_the_pools_format(module: Any) -> None:
    key, value = new_tokens(4, 2, 64, torch.float32, transposed=True)
    arena = random_rows(8, 64, torch.float16)
    seats, positions = torch.zeros(4, dtype=torch.int64, device=DEVICE), torch.arange(4, device=DEVICE)
    pages = Pages(arena, torch.zeros((1, 1, 1), dtype=torch.int64, device=DEVICE), 4, 2, places_of(one_by_one(1), DEVICE))
    function_of(module, "append_tokens")(pages, 0, NewTokens(seats, positions, positions + 1, key, value))
    assert torch.equal(arena, torch.stack((key, value), dim=2).half().view(8, 2, 64))


@both
def test_append_of_nothing(module: Any) -> None:
    pool = random_rows(8, 4, torch.float32)
    before, nothing = pool.clone(), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    key, value = new_tokens(0, 2, 4, torch.float32, transposed=False)
    table = torch.ones((1, 1, 1), dtype=torch.int64, device=DEVICE)
    alone = places_of(one_by_one(1), DEVICE)
    pages, new = Pages(pool, table, 2, 2, alone), NewTokens(nothing, nothing, nothing, key, value)
    function_of(module, "append_tokens")(pages, 0, new)
    tiers = Tiers(pages, Slots(pool, table, 2, 2, alone, 1, 1), pages, torch.zeros(1, dtype=torch.bool, device=DEVICE))
    function_of(module, "append_layer")(tiers, 0, new)
    assert torch.equal(pool, before)


# Together -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_layer", [False, True], ids=["one selection", "a selection a layer"])
def test_both_tiers_by_the_kernels(in_layer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of two requests, with the references and with the kernels: the same plans, and rows with the same numbers."""
    runs = []
    for choice in ("torch", "triton"):
        monkeypatch.setenv(dispatch.VARIABLE, choice)
        runs.append(steps_of_two_requests(in_layer))
    assert len(runs[0]) == len(runs[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def steps_of_two_requests(in_layer: bool) -> list[Tensor]:
    """What attention reads and what is missing, step after step; layer 1 is resident."""
    generator = torch.Generator().manual_seed(7)
    layers, kv_heads, groups, budget = 3, 2, 3, Budget(9, 2, 3)
    layout = Layout.of_shape(ModelShape(layers, 8, kv_heads, kv_heads, 4, 10, 64, torch.float32), 4)
    head_map = torch.randint(0, groups, (layers, kv_heads), generator=generator)
    kv = KVCache(
        *make_pools(layout, device_pages=60, host_pages=60, device=DEVICE),
        resident=(False, True, False),
        reader=Reader.of_map(layout, head_map, DEVICE, in_layer=in_layer),
        slots=SlotSizes(11, sink=2, recent=3, tables=layers if in_layer else 1, groups=groups),
        seats=3,
        max_tokens=48,
        verify_loads=True,
    )
    seats, start = torch.tensor([2, 0], device=DEVICE), torch.tensor([20, 29], device=DEVICE)

    def append(layer: int, which: Tensor, positions: Tensor, lengths: Tensor, *, chunk: bool = False) -> None:
        new = torch.randn(2, len(which), kv_heads, 4, generator=generator).to(DEVICE)
        store = kv.transfers.append_chunk if chunk else kv.transfers.append
        store(layer, NewTokens(which, positions, lengths, new[0], new[1]))

    for seat, length in zip(seats.tolist(), start.tolist(), strict=True):
        assert kv.open(seat, 40) is None
        for layer in range(layers):
            which, lengths = (torch.full((length,), n, device=DEVICE) for n in (seat, length))
            append(layer, which, torch.arange(length, device=DEVICE), lengths, chunk=True)
    kv.transfers.end_step()
    seen = []
    for step in range(3):
        lengths = start + step + 1
        selections: list[Selection] = []
        for layer in range(layers):
            if in_layer or layer == 0:
                order = torch.rand(2, groups, 16, generator=generator).argsort(-1)[..., : budget.scored]
                selections.append(budget.compose((2 + order.sort(-1).values).to(DEVICE), lengths))
                reading = kv.read(seats, selections[-1], layer if in_layer else None)
                seen += [reading.plan.slots, reading.plan.missing] if reading.plan is not None else []
            append(layer, seats, lengths - 1, lengths)
            kv.transfers.wait(layer)
            rows = kv.transfers.rows(range(layer, layer + 1), reading)[0]
            kv.transfers.check_rows(layer, reading, rows)
            seen.append(torch.where((rows >= 0)[..., None, None], kv.arena.rows[rows.clamp(min=0).long()], 0.0))
        kv.transfers.end_step()
    kv.check_integrity()
    return seen


# Pinned host memory ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE.type != "cuda", reason="only a GPU reads pinned memory in place")
def test_pools_in_host_memory() -> None:
    generator = torch.Generator().manual_seed(8)
    tables, alone = page_tables(2, 1, 8, generator), places_of(one_by_one(2), DEVICE)
    host = random_rows(17 * 4 * 2, 64, torch.bfloat16, pinned=True)
    plain, arena = host.to(DEVICE), random_rows(17 * 4 * 2, 64, torch.bfloat16, seed=1)
    expected = arena.clone()
    of_host, of_plain, of_arena, of_expected = (Pages(r, tables.to(DEVICE), 4, 2, alone) for r in (host, plain, arena, expected))
    at = torch.randperm(100, generator=generator).to(DEVICE)
    rows.gather_rows(host, at, arena, at.flip(0))
    function_of(rows, "gather_rows")(plain, at, expected, at.flip(0))
    assert torch.equal(arena, expected)
    key, value = new_tokens(5, 2, 64, torch.bfloat16, transposed=True)
    place = (torch.zeros(5, dtype=torch.int64, device=DEVICE), torch.arange(5, device=DEVICE))
    new = NewTokens(*place, torch.full((5,), 5, device=DEVICE), key, value)
    for function, in_host, on_device in (
        (rows.append_layer, of_host, of_arena),
        (function_of(rows, "append_layer"), of_plain, of_expected),
    ):
        slot_pages = Slots(on_device.rows, on_device.table, 4, 2, alone, 1, 2)
        function(Tiers(on_device, slot_pages, in_host, torch.zeros(2, dtype=torch.bool, device=DEVICE)), 1, new)
    torch.cuda.synchronize()
    assert torch.equal(arena, expected) and torch.equal(host.to(DEVICE), plain)

"""Row numbers of selections and new keys of the head, by the kernels and by the references, against plain loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from specontext.kernels import rows, slot_plan
from specontext.kernels.dispatch import reference_of
from specontext.kernels.tables import Pages, Slots, Tiers
from specontext.kernels.triton import rows as triton_rows
from specontext.kernels.triton import slot_plan as triton_slot_plan
from specontext.kv.layout import Layout, places_of
from specontext.kv.pool import make_pools
from specontext.memory.layer_blocks import one_by_one
from specontext.model_shape import ModelShape

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
QUICK = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
Function = Callable[..., Any]

rows_by = pytest.mark.parametrize(
    "selected_rows", [triton_slot_plan.selected_rows, reference_of(slot_plan.selected_rows)], ids=["triton", "torch"]
)
keys_by = pytest.mark.parametrize(
    "append_keys", [triton_rows.append_keys, reference_of(rows.append_keys)], ids=["triton", "torch"]
)


@rows_by
@QUICK
@given(
    seed=st.integers(0, 2**31),
    heads=st.sampled_from([(1, 1), (2, 3), (3, 2), (8, 8), (16, 1)]),
    page_size=st.integers(1, 5),
    width=st.sampled_from([1, 7, 33]),
    requests=st.integers(1, 3),
)
def test_rows_of_both_tiers(
    selected_rows: Function, seed: int, heads: tuple[int, int], page_size: int, width: int, requests: int
) -> None:
    """A resident layer finds tokens in token pages, an offloaded one slots in slot pages; the last seat is padding's."""
    generator = torch.Generator().manual_seed(seed)
    (kv_heads, groups), layers, seats = heads, 3, 4

    def drawn(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    token_pages, slot_pages = drawn(99, layers, seats, 9), drawn(99, layers, seats, 4)
    tokens, slots = drawn(9 * page_size, requests, groups, width), drawn(4 * page_size, requests, groups, width)
    absent = drawn(4, requests, groups, width) == 0
    tokens[absent] = slots[absent] = -1
    resident = drawn(2, layers) == 1
    which = torch.randperm(seats, generator=generator)[:requests]
    head_map = drawn(groups, layers, kv_heads)
    none = torch.zeros(0, device=DEVICE)  # rows of pools are not looked at
    sizes = (page_size, kv_heads, places_of(one_by_one(layers), DEVICE))
    here, there = Pages(none, token_pages.to(DEVICE), *sizes), Slots(none, slot_pages.to(DEVICE), *sizes, 1, 1)
    tiers = Tiers(here, there, here, resident.to(DEVICE))
    found = selected_rows(tiers, range(layers), *(x.to(DEVICE) for x in (which, head_map, tokens, slots)))
    one = selected_rows(tiers, range(1, 2), *(x.to(DEVICE) for x in (which, head_map, tokens, slots)))
    assert torch.equal(one[0], found[1])
    assert found.shape == (layers, requests, kv_heads, width)
    for layer in range(layers):
        entries, pages = (tokens, token_pages) if resident[layer] else (slots, slot_pages)
        for r, seat in enumerate(which.tolist()):
            for head in range(kv_heads):
                expected = [
                    -1 if e < 0 else (int(pages[layer, seat, e // page_size]) * page_size + e % page_size) * kv_heads + head
                    for e in entries[r, head_map[layer, head]].tolist()
                ]
                assert found[layer, r, head].tolist() == expected


@rows_by
def test_rows_of_nothing(selected_rows: Function) -> None:
    nothing = torch.zeros((0, 2, 5), dtype=torch.int64, device=DEVICE)
    table, flags = torch.zeros((1, 1, 1), dtype=torch.int64, device=DEVICE), torch.ones(1, dtype=torch.bool, device=DEVICE)
    pages = Pages(nothing, table, 4, 1, places_of(one_by_one(1), DEVICE))
    found = selected_rows(Tiers(pages, None, pages, flags), range(1), nothing[:, 0, 0], table[:, 0], nothing, nothing)
    assert found.shape == (1, 0, 1, 5)


@keys_by
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("groups", "head_dim", "kv_heads", "kv_dim"), [(1, 64, 2, 80), (2, 32, 2, 32), (3, 20, 1, 96), (8, 128, 8, 128)]
)
def test_keys_into_pages_of_the_arena(
    append_keys: Function, groups: int, head_dim: int, kv_heads: int, kv_dim: int, dtype: torch.dtype
) -> None:
    """Pages of KV seen as pages of keys, which may leave a rest; padding has negative positions and writes nothing."""
    shape = ModelShape(1, 8, kv_heads, kv_heads, kv_dim, 10, 64, dtype)
    arena, _ = make_pools(Layout.of_shape(shape, 4), device_pages=9, host_pages=1, device=DEVICE)
    arena.rows.fill_(7.0)
    keys = arena.as_keys(groups, head_dim)
    size = keys.shape[1]
    assert size == 4 * kv_heads * 2 * kv_dim // (groups * head_dim) > 0
    table = torch.tensor([[3, 5], [8, 1], [0, 0]], device=DEVICE)
    seats = torch.tensor([0, 1, 0, 2, 1], device=DEVICE)
    positions = torch.tensor([0, size, 2 * size - 1, -1, 1 % size], device=DEVICE)
    new = torch.randn((5, groups, head_dim), generator=torch.Generator().manual_seed(3)).to(dtype).to(DEVICE)
    expected = arena.rows.clone().view(9, -1)
    for t, (seat, position) in enumerate(zip(seats.tolist(), positions.tolist(), strict=True)):
        if position >= 0:
            first = position % size * groups * head_dim
            expected[int(table[seat, position // size]), first : first + groups * head_dim] = new[t].flatten()
    append_keys(keys, table, seats, positions, new)
    assert torch.equal(arena.rows.view(9, -1), expected)


@keys_by
def test_keys_of_nothing(append_keys: Function) -> None:
    keys = torch.ones((2, 4, 2, 8), device=DEVICE)
    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    append_keys(
        keys, torch.zeros((1, 1), dtype=torch.int64, device=DEVICE), nothing, nothing, torch.zeros((0, 2, 8), device=DEVICE)
    )
    assert keys.eq(1).all()

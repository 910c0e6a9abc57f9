"""Pieces copied by the Triton kernels and by the references, against plain loops: the right bits in the right rows, no others."""

from __future__ import annotations

import random
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
from specontext.kernels.tables import Copies, Pages
from specontext.kernels.triton import rows as triton_rows
from specontext.kernels.triton import slot_plan as triton_slot_plan
from specontext.kv.layout import BlockParts, places_of
from specontext.memory.layer_blocks import LayerBlocks, divide_layers, one_by_one

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
QUICK = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
FORMATS = [torch.float32, torch.float16, torch.bfloat16]
SEATS = 3

both = pytest.mark.parametrize("module", [triton_rows, rows], ids=["triton", "reference"])


def function_of(module: Any, name: str) -> Callable[..., Any]:
    return getattr(module, name) if module is triton_rows else reference_of(getattr(module, name))  # type: ignore[no-any-return]


def pool(
    blocks: LayerBlocks,
    pages: int,
    page_size: int,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    seed: int,
    *,
    pinned: bool = False,
    seats: int = SEATS,
) -> Pages:
    """A pool of random rows with distinct pages for every block and seat; page 0 belongs to nobody."""
    generator = torch.Generator().manual_seed(seed)
    lines = len(blocks.sizes)
    count = (1 + lines * seats * pages) * page_size * heads * blocks.places
    rows = torch.randn(count, 2, dim, generator=generator).to(dtype)
    table = 1 + torch.randperm(lines * seats * pages, generator=generator).view(lines, seats, pages)
    on_device = rows.pin_memory() if pinned else rows.to(DEVICE)
    return Pages(on_device, table.to(DEVICE), page_size, heads, places_of(blocks, DEVICE))


def row_of(at: Pages, layer: int, seat: int, entry: int, head: int) -> int:
    line, place = at.layers.homes[layer]
    page = int(at.table[line, seat, entry // at.size])
    return ((page * at.size + entry % at.size) * at.heads + head) * at.layers.count + place


def expected(source: Pages, target: Pages, head_map: list[list[int]], layers: list[int], copies: Copies) -> Tensor:
    """The target's rows after a loop over everything that is copied."""
    found = target.rows.clone()
    for layer in layers:
        for head, group in enumerate(head_map[layer]):
            for r, seat in enumerate(copies.seats.tolist()):
                for i in range(int(copies.counts[r, group])):
                    a = row_of(source, layer, seat, int(copies.source[r, group, i]), head)
                    found[row_of(target, layer, seat, int(copies.target[r, group, i]), head)] = source.rows[a]
    return found


def some_copies(seats: list[int], groups: int, most: tuple[int, int], width: int, generator: torch.Generator) -> Copies:
    lists = [torch.rand(len(seats), groups, n, generator=generator).argsort(-1)[..., :width].int().to(DEVICE) for n in most]
    counts = torch.randint(0, width + 1, (len(seats), groups), generator=generator, dtype=torch.int32)
    return Copies(torch.tensor(seats, device=DEVICE), lists[0], lists[1], counts.to(DEVICE))


def map_of(rng: random.Random, layers: int, heads: int, groups: int) -> list[list[int]]:
    """Mostly the same for neighbouring layers, as measured maps are."""
    rows = [[rng.randrange(groups) for _ in range(heads)]]
    for _ in range(layers - 1):
        rows.append([group if rng.random() < 0.8 else rng.randrange(groups) for group in rows[-1]])
    return rows


@both
@QUICK
@given(
    st.integers(0, 2**31), st.sampled_from([(1, 1), (1, 3), (3, 2), (4, 4)]), st.sampled_from(["in", "out", "beside", "single"])
)
def test_pieces_of_all_layers(module: Any, seed: int, heads: tuple[int, int], way: str) -> None:
    """From blocks into layers, back, from blocks into blocks, and single layers out of blocks; some layers are passed over."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    (kv_heads, groups), layers = heads, rng.randint(1, 7)
    head_map = map_of(rng, layers, kv_heads, groups)
    blocks, single = divide_layers(head_map, rng.choice([512, 700, 1024, 2048])), one_by_one(layers)
    kinds = {"in": (blocks, single), "out": (single, blocks), "beside": (blocks, blocks), "single": (blocks, single)}[way]
    sizes = [(rng.randint(1, 5), rng.randint(2, 4)) for _ in kinds]  # of a page, pages
    source, target = (
        pool(kind, pages, size, kv_heads, 3, torch.float32, seed + i)
        for i, (kind, (size, pages)) in enumerate(zip(kinds, sizes, strict=True))
    )
    most = [size * pages for size, pages in sizes]
    seats = rng.sample(range(SEATS), rng.randint(1, SEATS))
    copies = some_copies(seats, groups, (most[0], most[1]), rng.randint(1, min(most)), generator)
    skipped = torch.rand(layers, generator=generator) < rng.choice([0.0, 0.3, 1.0])
    parts = BlockParts.of_map(single if way == "single" else blocks, head_map, DEVICE)
    asked = rng.randrange(len(parts.bounds) - 1)
    chosen = parts.of(asked) if rng.random() < 0.5 else parts.all
    copied = sorted({layer for layer in chosen.layers.flatten().tolist() if layer >= 0 and not skipped[layer]})
    after = expected(source, target, head_map, copied, copies)
    sizes = (
        {"programs": rng.choice([1, 3, 16]), "tile_bytes": rng.choice([16, 256, 600, 4096, 5041])}
        if module is triton_rows
        else {}
    )
    function_of(module, "copy_pieces")(source, target, chosen, skipped.to(DEVICE), copies, **sizes)
    assert torch.equal(target.rows, after)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(("dim", "width"), [(64, 90), (80, 33), (128, 70), (256, 21)])
def test_long_lists(dim: int, width: int, dtype: torch.dtype) -> None:
    """Lists of several tiles split over several programs, in the formats and widths of models."""
    generator = torch.Generator().manual_seed(3)
    head_map = [[1, 0], [1, 0], [1, 1], [1, 0], [1, 0]]
    blocks = divide_layers(head_map, 2 * dim * dtype.itemsize)
    source, target = pool(blocks, 8, 16, 2, dim, dtype, 0), pool(one_by_one(5), 6, 16, 2, dim, dtype, 1)
    copies = some_copies([2, 0], 2, (128, 96), width, generator)
    skipped = torch.tensor([False, True, False, False, False], device=DEVICE)
    parts, before = BlockParts.of_map(blocks, head_map, DEVICE).all, target.rows.clone()
    reference_of(rows.copy_pieces)(source, target, parts, skipped, copies)
    after = target.rows.clone()
    assert not torch.equal(before, after)
    target.rows.copy_(before)
    triton_rows.copy_pieces(source, target, parts, skipped, copies, programs=4, tile_bytes=1 << 14)
    assert torch.equal(target.rows, after)


@pytest.mark.parametrize("requests", [9, 13, *(pytest.param(count, marks=pytest.mark.slow) for count in (12, 23, 27, 31))])
def test_programs_for_any_number_of_requests(requests: int) -> None:
    """As many programs as requests by default, each with a part of what is under way: no number of them is special."""
    head_map, dim, dtype = [[1, 0], [0, 0], [1, 1]], 128, torch.bfloat16
    blocks = divide_layers(head_map, 2 * dim * dtype.itemsize)
    source, target = (pool(kind, 5, 4, 2, dim, dtype, seed, seats=40) for seed, kind in enumerate((blocks, one_by_one(3))))
    copies = some_copies(list(range(3, 3 + requests)), 2, (20, 12), 9, torch.Generator().manual_seed(1))
    parts, before = BlockParts.of_map(blocks, head_map, DEVICE).all, target.rows.clone()
    skipped = torch.tensor([False, True, False], device=DEVICE)
    reference_of(rows.copy_pieces)(source, target, parts, skipped, copies)
    after = target.rows.clone()
    target.rows.copy_(before)
    triton_rows.copy_pieces(source, target, parts, skipped, copies)
    assert not torch.equal(before, after) and torch.equal(target.rows, after)


@pytest.mark.parametrize("listed", [triton_slot_plan.listed, reference_of(slot_plan.listed)], ids=["triton", "reference"])
@QUICK
@given(st.integers(0, 2**31))
def test_lists_of_what_is_wanted(listed: Callable[..., Copies], seed: int) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shape = (rng.randint(0, 3), rng.randint(1, 4), rng.choice([1, 7, 1500]))
    source, target = torch.randint(-1, 1 << 20, (2, *shape), generator=generator).to(DEVICE)
    wanted = (torch.rand(shape, generator=generator) < rng.choice([0.0, 0.2, 1.0])).to(DEVICE)
    seats = torch.arange(shape[0], device=DEVICE)
    found = listed(seats, source, target, wanted)
    assert found.seats is seats and found.counts.tolist() == wanted.sum(-1).tolist()
    for r in range(shape[0]):
        for g in range(shape[1]):
            for packed, entries in ((found.source, source), (found.target, target)):
                assert packed[r, g, : found.counts[r, g]].tolist() == entries[r, g][wanted[r, g]].tolist()


@both
def test_nothing_to_copy(module: Any) -> None:
    blocks = divide_layers([[0], [0]], 512)
    parts = BlockParts.of_map(blocks, [[0], [0]], DEVICE).all
    source, target = (pool(kind, 1, 2, 1, 3, torch.float32, seed) for seed, kind in enumerate((blocks, one_by_one(2))))
    before = target.rows.clone()
    none, some = torch.zeros((1, 1, 0), dtype=torch.int64, device=DEVICE), torch.ones((1, 1, 1), dtype=torch.int64, device=DEVICE)
    seat, skipped = torch.tensor([0], device=DEVICE), torch.ones(2, dtype=torch.bool, device=DEVICE)
    copy = function_of(module, "copy_pieces")
    copy(source, target, parts, ~skipped, Copies.of_all(seat, none, none))
    copy(source, target, parts, ~skipped, Copies.of_all(seat[:0], some[:0], some[:0]))
    copy(source, target, parts, skipped, Copies.of_all(seat, some, some))
    assert torch.equal(target.rows, before)


@both
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("dim", "kv_heads", "places", "page_size"), [(3, 1, 1, 1), (64, 5, 3, 3), (80, 2, 4, 16), (128, 1, 7, 4)]
)
@pytest.mark.parametrize("all_places", [True, False])
def test_new_tokens_as_pieces(
    module: Any, dim: int, kv_heads: int, places: int, page_size: int, all_places: bool, dtype: torch.dtype
) -> None:
    """Chunks of two requests and a padded row, of all layers of a block or of those that live on the host."""
    generator = torch.Generator().manual_seed(6)
    blocks = LayerBlocks((places,), places, tuple(range(places)))
    at = pool(blocks, 12, page_size, kv_heads, dim, dtype, 0)
    tokens = [(2, p) for p in range(9)] + [(0, 12 * page_size - 1), (1, -1)]
    seats, positions = (torch.tensor(x, device=DEVICE) for x in zip(*tokens, strict=True))
    new = torch.randn(len(tokens), kv_heads, places, 2, dim, generator=generator).to(dtype).to(DEVICE)
    wanted = torch.tensor([all_places or place % 2 == 0 for place in range(places)], device=DEVICE)
    after = at.rows.clone()
    for t, (seat, position) in enumerate(tokens[:-1]):
        for head in range(kv_heads):
            for place in range(places):
                if wanted[place]:
                    after[row_of(at, place, seat, position, head)] = new[t, head, place]
    append = function_of(module, "append_pieces")
    append(at, 0, seats, positions, new, wanted)
    assert torch.equal(at.rows, after)
    append(at, 0, seats[:0], positions[:0], new[:0], wanted)
    assert torch.equal(at.rows, after)


def test_parts_have_every_layer_and_head_once() -> None:
    rng = random.Random(0)
    for _ in range(50):
        layers, heads, groups = rng.randint(1, 12), rng.randint(1, 4), rng.randint(1, 5)
        head_map = map_of(rng, layers, heads, groups)
        blocks = divide_layers(head_map, rng.choice([256, 512, 1024]))
        found = BlockParts.of_map(blocks, head_map, torch.device("cpu"))
        seen = []
        for block, members in enumerate(blocks.members):
            part = found.of(block)
            for read, head, group in zip(part.layers.tolist(), part.heads.tolist(), part.groups.tolist(), strict=True):
                those = [layer for layer in read if layer >= 0]
                assert those and set(those) <= set(members) and {head_map[layer][head] for layer in those} == {group}
                seen += [(layer, head) for layer in those]
            alike = {tuple(head_map[layer]) for layer in members}
            assert len(part) == heads if len(alike) == 1 else len(part) > heads
        assert len(found.all) == blocks.reads(head_map)
        assert sorted(seen) == [(layer, head) for layer in range(layers) for head in range(heads)]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="only a GPU reads pinned memory in place")
@pytest.mark.parametrize(
    ("layers", "dim", "away", "programs"),
    [(4, 64, {0, 1, 2, 3}, None), (5, 128, {1, 4}, 3), (3, 8, {2}, None), (2, 512, {0, 1}, 1)],
)
def test_pieces_in_host_memory(layers: int, dim: int, away: set[int], programs: int | None) -> None:
    generator = torch.Generator().manual_seed(8)
    head_map = [[0, 1]] * layers
    blocks = divide_layers(head_map, 4 * dim)
    host, plain = (pool(blocks, 8, 4, 2, dim, torch.bfloat16, 0, pinned=pinned) for pinned in (True, False))
    arena, right = (pool(one_by_one(layers), 8, 4, 2, dim, torch.bfloat16, 1) for _ in range(2))
    copies = some_copies([2, 0], 2, (32, 32), 20, generator)
    parts = BlockParts.of_map(blocks, head_map, DEVICE).all
    skipped = torch.tensor([layer not in away for layer in range(layers)], device=DEVICE)
    reference = reference_of(rows.copy_pieces)
    rows.copy_pieces(host, arena, parts, skipped, copies, programs=programs)
    reference(plain, right, parts, skipped, copies)
    assert torch.equal(arena.rows, right.rows)
    back = Copies(copies.seats, copies.target, copies.source, copies.counts)
    arena.rows.neg_()
    right.rows.neg_()
    rows.copy_pieces(arena, host, parts, skipped, back)
    reference(right, plain, parts, skipped, back)
    torch.cuda.synchronize()
    assert torch.equal(host.rows.to(DEVICE), plain.rows)

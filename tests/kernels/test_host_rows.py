"""A host in 8 bits beside a device that is not: codes become numbers on the way, and numbers codes once."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from specontext.kernels.dispatch import reference_of
from specontext.kernels.quantised_rows import FORMATS, dequantised, quantise
from specontext.kernels.spans import read_rows
from specontext.kernels.tables import Copies, NewTokens, Pages, Slots, Tiers
from specontext.kv.layout import BlockParts, places_of
from specontext.memory.layer_blocks import LayerBlocks, one_by_one
from tests.kernels.test_quantised_rows import in_spans

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUMBERS = (torch.float32, torch.float16, torch.bfloat16)
LAYERS, SEATS = 3, 3
BLOCK = LayerBlocks((LAYERS,), 4, tuple(range(LAYERS)))

both = pytest.mark.parametrize("kind", ["reference", "triton"])
codes_of_all = pytest.mark.parametrize("codes", list(FORMATS.values()), ids=list(FORMATS))
SIZES = [(2, 1, 4), (6, 2, 3), (80, 2, 16), (128, 3, 5)]
sizes = pytest.mark.parametrize(("dim", "heads", "page_size"), SIZES)
# Every size with every number, and every two of all the others somewhere.
PAIRS = [
    (*size, number, list(FORMATS.values())[(i + j) % 2], (i // 2 + j) % 2 == 0)
    for i, size in enumerate(SIZES)
    for j, number in enumerate(NUMBERS)
]


def function_of(name: str, kind: str) -> Any:
    if kind == "triton":
        pytest.importorskip("triton")
        return getattr(importlib.import_module("specontext.kernels.triton.rows"), name)
    return reference_of(getattr(importlib.import_module("specontext.kernels.rows"), name))


def numbers_of(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows that differ by powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 10 ** torch.randn(*shape[:-1], 1, generator=generator)).to(dtype)


def tiers_of(codes: torch.dtype, dtype: torch.dtype, dim: int, heads: int, page_size: int) -> Tiers:
    """Three layers, the middle one on the device; on the host they lie side by side."""
    generator = torch.Generator().manual_seed(9)
    arena = numbers_of(60 * page_size * heads, 2, dim, seed=5, dtype=dtype).to(DEVICE)
    host = quantise(numbers_of(30 * page_size * heads * 4, 2, dim, seed=6), codes).to(DEVICE)
    host = in_spans(host, page_size * heads * 4)
    pages = 1 + torch.randperm(54, generator=generator).to(DEVICE)
    at_host = 1 + torch.randperm(12, generator=generator)[:9].view(1, SEATS, 3).to(DEVICE)
    alone = places_of(one_by_one(LAYERS), DEVICE)
    return Tiers(
        Pages(arena, pages[:27].view(LAYERS, SEATS, 3).contiguous(), page_size, heads, alone),
        Slots(arena, pages[27:45].view(LAYERS, SEATS, 2).contiguous(), page_size, heads, alone, 2, 3),
        Pages(host, at_host, page_size, heads, places_of(BLOCK, DEVICE)),
        torch.tensor([False, True, False], device=DEVICE),
    )


def assert_same(found: Tensor, expected: Tensor, kind: str) -> None:
    """To the bit; Triton's interpreter cuts bfloat16 off, where a GPU rounds."""
    if kind == "triton" and DEVICE.type == "cpu" and found.dtype == torch.bfloat16:
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(found, expected)


@both
@codes_of_all
@sizes
@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_loads_bring_the_numbers_of_codes(
    dim: int, heads: int, page_size: int, dtype: torch.dtype, codes: torch.dtype, kind: str
) -> None:
    tiers = tiers_of(codes, dtype, dim, heads, page_size)
    assert tiers.slots is not None
    before = tiers.slots.rows.clone()
    seats, source = torch.tensor([2, 0], device=DEVICE), torch.tensor([[[7, 0, 3]], [[1, 2, 5]]], device=DEVICE)
    target = torch.tensor([[[1, 2, 0]]], device=DEVICE).expand(2, 1, 3)
    groups = [[0] * heads] * LAYERS
    parts = BlockParts.of_map(BLOCK, groups, DEVICE).all
    function_of("copy_pieces", kind)(tiers.host, tiers.slots, parts, tiers.resident, Copies.of_all(seats, source, target))
    written = torch.zeros(len(before), dtype=torch.bool, device=DEVICE)
    for layer in (0, 2):
        there, here = tiers.host.rows_of(layer, seats, source), tiers.slots.rows_of(layer, seats, target)
        assert_same(tiers.slots.rows[here], dequantised(read_rows(tiers.host.rows, there), before), kind)
        written[here] = True
    assert torch.equal(tiers.slots.rows[~written], before[~written])


@both
@pytest.mark.parametrize(("dim", "heads", "page_size", "dtype", "codes", "to_host"), PAIRS, ids=str)
def test_new_tokens_are_quantised_once(
    to_host: bool, dim: int, heads: int, page_size: int, dtype: torch.dtype, codes: torch.dtype, kind: str
) -> None:
    """The host has codes, its slots the numbers that these mean, and a layer on the device the numbers that came."""
    tiers = tiers_of(codes, dtype, dim, heads, page_size)
    tokens = [(2, p, 9) for p in range(9)] + [(1, -1, 0), (0, 0, 1)]
    seats, positions, lengths = (torch.tensor(x, device=DEVICE) for x in zip(*tokens, strict=True))
    key, value = numbers_of(2, len(tokens), heads, dim, seed=7, dtype=dtype).to(DEVICE)
    numbers, before = torch.stack((key, value), dim=2), tiers.host.rows.clone()
    expected = quantise(numbers, codes)
    for layer in (0, 1):
        function_of("append_layer", kind)(tiers, layer, NewTokens(seats, positions, lengths, key, value), to_host=to_host)
    assert tiers.slots is not None
    for seat in (0, 2):
        mine = (seats == seat).nonzero().squeeze(1)
        here = tiers.tokens.rows_of(1, seats[mine[:1]], positions[mine][None, None])[0]  # [Hkv, T]
        assert torch.equal(tiers.tokens.rows[here.T], numbers[mine])
        there = tiers.host.rows_of(0, seats[mine[:1]], positions[mine][None, None])[0]
        stored = read_rows(tiers.host.rows, there.T).view(torch.uint8)
        assert torch.equal(stored, (expected[mine] if to_host else read_rows(before, there.T)).view(torch.uint8))
    ring = tiers.slots.rows_of(0, seats[:1], torch.tensor([[[0, 1, 2, 3, 4]]], device=DEVICE))[0]  # tokens 0, 1, 6, 7, 8
    kept = expected[torch.tensor([0, 1, 6, 7, 8], device=DEVICE)]
    assert_same(tiers.slots.rows[ring.T], dequantised(kept, tiers.slots.rows), kind)

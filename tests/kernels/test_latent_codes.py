"""Latents in 8 bits: rows [D + 4] that are key and value at once, of PyTorch and of Triton."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specontext.kernels.attention_logits import attention_logits_reference
from specontext.kernels.paged_attention import paged_attention_reference
from specontext.kernels.quantised_rows import dequantise, dequantised, keys_of, quantise
from specontext.kernels.rows import as_stored, row_of
from specontext.kernels.spans import read_rows, vectors_in
from specontext.kernels.tables import Copies, NewTokens, Pages, Parts, Slots, Tiers
from specontext.kv.layout import places_of
from specontext.memory.layer_blocks import LayerBlocks, one_by_one
from tests.kernels.test_quantised_rows import (
    DEVICE,
    NUMBERS,
    both,
    bytes_at,
    close,
    codes_of_all,
    exact,
    function_of,
    in_spans,
    rand,
)

PAGE = 4


def pool(rows: int, dim: int, codes: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Rows in 8 bits of some latents, and what they mean, as keys and values: [N, D + 4] and [N, 2, D] float32."""
    kept = quantise(rand(rows, 1, dim, seed=seed, spread=0.3), codes)
    numbers = dequantised(kept, torch.empty(0, 1, dim))
    return kept.to(DEVICE), numbers.expand(-1, 2, -1).to(DEVICE)


@codes_of_all
def test_a_row_is_codes_and_a_scale(codes: torch.dtype) -> None:
    numbers = rand(300, 1, 40, seed=0, spread=4.0)
    rows = quantise(numbers, codes)
    assert rows.shape == (300, 44) and rows.dtype == codes and vectors_in(rows, 40) == 1
    read = dequantised(rows, numbers)
    most = numbers.abs().amax(-1, keepdim=True)
    bound = most / 127 * 0.51 if codes == torch.int8 else numbers.abs() / 16 + most * 2.0**-17
    assert read.shape == numbers.shape and ((read - numbers).abs() <= bound).all()
    assert torch.equal(keys_of(rows, 40, torch.float32), read[:, 0])
    twice = dequantise(quantise(numbers.expand(-1, 2, -1), codes), torch.empty(300, 2, 40))
    assert torch.equal(twice[:, :1], read), "as a key that is the value too"
    latent = numbers[:, 0].view(150, 2, 40)
    assert torch.equal(row_of(latent, latent, rows).flatten(0, 1).view(torch.uint8), rows.view(torch.uint8))
    assert torch.equal(as_stored(latent, latent, rows)[0].flatten(0, 1), read[:, 0])


@both
@codes_of_all
@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
@pytest.mark.parametrize(
    ("heads", "width", "dim"), [(5, 33, 40), (40, 70, 64), pytest.param(16, 100, 576, marks=pytest.mark.slow)]
)
def test_attention_and_logits_over_rows(
    heads: int, width: int, dim: int, dtype: torch.dtype, codes: torch.dtype, kind: str
) -> None:
    arena, numbers = pool(3 * width, dim, codes)
    arena = in_spans(arena, 16) if heads % 2 else arena
    query = torch.randn(2, heads, dim, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    generator = torch.Generator().manual_seed(2)
    rows = torch.stack([torch.randperm(3 * width, generator=generator)[:width] for _ in range(2)])[:, None]
    rows = rows.masked_fill(torch.rand(2, 1, width, generator=generator) < 0.3, -1).to(DEVICE)
    logits, expected = exact(query, numbers, rows, 0.1)
    output, lse = function_of("sparse_attention", kind, "sparse_attention")(query, arena, rows, 0.1)
    assert output.dtype == dtype
    close(output, expected, dtype, numbers)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 5e-2)
    of_rows = (attention_logits_reference if kind == "reference" else function_of("attention_logits", kind, "attention_logits"))(
        query, arena, rows, 0.1
    )
    seen = torch.isfinite(logits)
    assert torch.equal(torch.isfinite(of_rows), seen)
    torch.testing.assert_close(of_rows[seen].double(), logits[seen], rtol=1e-5, atol=1e-4)


@both
@codes_of_all
def test_attention_over_pages(codes: torch.dtype, kind: str) -> None:
    width, dim, page_size = 37, 24, 16
    arena, numbers = pool(10 * page_size, dim, codes)
    arena = in_spans(arena, page_size)
    pages = torch.randperm(10, generator=torch.Generator().manual_seed(3))[:9].view(3, 3).to(DEVICE)
    lengths, token = torch.tensor([width, 11, 0], device=DEVICE), torch.arange(width, device=DEVICE)
    rows = (pages[:, token // page_size] * page_size + token % page_size)[:, None]
    rows = torch.where(token < lengths[:, None, None], rows, -1)
    query = torch.randn(3, 5, dim, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    if kind == "triton":
        sizes = {"page_size": page_size, "kv_heads": 1}
        output, _ = function_of("paged_attention", kind, "paged_attention")(query, arena, pages, lengths, 0.2, **sizes)
    else:
        alone = places_of(one_by_one(1), DEVICE)
        by_page = Pages(arena, pages[None], page_size, 1, alone).by_page(0)
        output, _ = paged_attention_reference(query, by_page, pages, lengths, 0.2, tile=16)
    close(output, exact(query, numbers, rows, 0.2)[1], torch.float32, numbers)


def tiers_of(codes: torch.dtype, dim: int, *, resident: bool, numbers: torch.dtype | None = None) -> Tiers:
    """Three layers, which lie side by side on the host, of three seats; on the device in 8 bits too, or as numbers."""
    alone, together = places_of(one_by_one(3), DEVICE), places_of(LayerBlocks((3,), 4, (0, 1, 2)), DEVICE)
    arena, meaning = pool(60 * PAGE, dim, codes, seed=5)
    arena = in_spans(arena, PAGE) if numbers is None else meaning[:, :1].to(numbers).contiguous()
    host = in_spans(pool(120 * PAGE, dim, codes, seed=6)[0], PAGE * 4)
    pages = 1 + torch.randperm(54, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    tokens, slots = pages[:27].view(3, 3, 3).contiguous(), pages[27:45].view(3, 3, 2).contiguous()
    at_host = (1 + torch.randperm(12)[:9]).view(1, 3, 3).to(DEVICE)
    return Tiers(
        Pages(arena, tokens, PAGE, 1, alone),
        Slots(arena, slots, PAGE, 1, alone, 2, 3),
        Pages(host, at_host, PAGE, 1, together),
        torch.tensor([False, resident, False], device=DEVICE),
    )


@both
@codes_of_all
@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
@pytest.mark.parametrize(("dim", "resident"), [(12, False), (40, True), pytest.param(576, False, marks=pytest.mark.slow)])
def test_new_tokens_are_quantised_to_the_bit_alike(
    dim: int, resident: bool, dtype: torch.dtype, codes: torch.dtype, kind: str
) -> None:
    tiers = tiers_of(codes, dim, resident=resident)
    positions = torch.tensor([0, 1, 2, -1, 5, 6], device=DEVICE)
    lengths, seats = torch.full_like(positions, 7), torch.full_like(positions, 2)
    row = rand(len(positions), 1, dim, seed=7, spread=1.5).to(DEVICE, dtype)
    expected = quantise(row[:, :, None], codes)  # [T, 1, D + 4]
    function_of("append_layer", kind)(tiers, 1, NewTokens(seats, positions, lengths, row, row))
    home, there = tiers.tokens if resident else tiers.host, (positions >= 0).nonzero().squeeze(1)
    rows = home.rows_of(1, seats[:1], positions[there][None, None])[0, 0]
    assert torch.equal(bytes_at(home.rows, rows), expected[there, 0].view(torch.uint8))
    if not resident:
        assert tiers.slots is not None
        ring = tiers.slots.rows_of(1, seats[:1], torch.tensor([[[0, 1, 2 + 5 % 3, 2 + 6 % 3]]], device=DEVICE))[0, 0]
        kept = expected[torch.tensor([0, 1, 4, 5], device=DEVICE), 0]
        assert torch.equal(bytes_at(tiers.slots.rows, ring), kept.view(torch.uint8))


@both
@codes_of_all
@pytest.mark.parametrize("dim", [12, 40, pytest.param(576, marks=pytest.mark.slow)])
def test_where_the_host_alone_has_codes_slots_hold_what_they_stand_for(dim: int, codes: torch.dtype, kind: str) -> None:
    tiers = tiers_of(codes, dim, resident=False, numbers=torch.float32)
    assert tiers.slots is not None
    positions = torch.tensor([0, 5, 6], device=DEVICE)
    seats, lengths = torch.zeros_like(positions), torch.full_like(positions, 7)
    row = rand(3, 1, dim, seed=7, spread=1.5).to(DEVICE)
    function_of("append_layer", kind)(tiers, 1, NewTokens(seats, positions, lengths, row, row))
    ring = tiers.slots.rows_of(1, seats[:1], torch.tensor([[[0, 2 + 5 % 3, 2 + 6 % 3]]], device=DEVICE))[0, 0]
    assert torch.equal(tiers.slots.rows[ring], dequantised(quantise(row, codes), row))
    source, target = torch.tensor([[[5, 0]]], device=DEVICE), torch.tensor([[[6, 5]]], device=DEVICE)
    parts = Parts(*(torch.tensor(x, device=DEVICE) for x in ([[0, 1, 2, -1]], [0], [0])))
    skipped = torch.zeros(3, dtype=torch.bool, device=DEVICE)
    function_of("copy_pieces", kind)(tiers.host, tiers.slots, parts, skipped, Copies.of_all(seats[:1], source, target))
    for layer in range(3):
        there, here = tiers.host.rows_of(layer, seats[:1], source)[0, 0], tiers.slots.rows_of(layer, seats[:1], target)[0, 0]
        stored = dequantised(read_rows(tiers.host.rows, there), tiers.slots.rows)
        assert torch.equal(tiers.slots.rows[here], stored)


@both
@codes_of_all
def test_copies_are_exact(codes: torch.dtype, kind: str) -> None:
    tiers = tiers_of(codes, 40, resident=True)
    assert tiers.slots is not None
    seats, source = torch.tensor([2, 0], device=DEVICE), torch.tensor([[[7, 0, 3]]], device=DEVICE).expand(2, 1, 3)
    target = torch.tensor([[[1, 2, 0]]], device=DEVICE).expand(2, 1, 3)
    parts = Parts(*(torch.tensor(x, device=DEVICE) for x in ([[0, 1, 2, -1]], [0], [0])))
    function_of("copy_pieces", kind)(tiers.host, tiers.slots, parts, tiers.resident, Copies.of_all(seats, source, target))
    for layer in (0, 2):
        there, here = tiers.host.rows_of(layer, seats, source), tiers.slots.rows_of(layer, seats, target)
        assert torch.equal(bytes_at(tiers.slots.rows, here), bytes_at(tiers.host.rows, there))
    new, wanted = pool(8, 40, codes, seed=8)[0].view(2, 1, 4, -1), torch.tensor([True, False, True, False], device=DEVICE)
    positions, before = torch.tensor([6, 1], device=DEVICE), tiers.host.rows.clone()
    function_of("append_pieces", kind)(tiers.host, 0, seats, positions, new, wanted)
    for layer in range(3):
        there = tiers.host.rows_of(layer, seats, positions[:, None, None])[..., 0]
        right = read_rows(before, there) if layer == 1 else new[:, :, layer]
        assert torch.equal(bytes_at(tiers.host.rows, there), right.contiguous().view(torch.uint8))

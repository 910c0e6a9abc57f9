"""Rows in 8 bits: what is lost, the kernels that read them against float64, and Triton against the reference."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from specontext.kernels.attention_logits import attention_logits_reference
from specontext.kernels.dense_attention import ChunkAttention, causal_attention
from specontext.kernels.dispatch import reference_of
from specontext.kernels.paged_attention import paged_attention_reference
from specontext.kernels.quantised_rows import FORMATS, dequantise, keys_of, quantise
from specontext.kernels.rows import as_stored
from specontext.kernels.spans import read_rows, rows_like, write_rows
from specontext.kernels.sparse_attention import sparse_attention
from specontext.kernels.tables import Copies, NewTokens, Pages, Parts, Slots, Tiers
from specontext.kv.layout import places_of
from specontext.memory.layer_blocks import LayerBlocks, one_by_one

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CODES = list(FORMATS.values())
NUMBERS = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}

codes_of_all = pytest.mark.parametrize("codes", CODES, ids=list(FORMATS))
both = pytest.mark.parametrize("kind", ["reference", "triton"])


def function_of(name: str, kind: str, module: str = "rows") -> Any:
    """An operation as its PyTorch reference or its Triton kernel."""
    if kind == "triton":
        pytest.importorskip("triton")
        return getattr(importlib.import_module(f"specontext.kernels.triton.{module}"), name)
    return reference_of(getattr(importlib.import_module(f"specontext.kernels.{module}"), name))


def rand(*shape: int, seed: int, spread: float = 2.0) -> Tensor:
    """Numbers of many magnitudes: rows differ by powers of ten, as keys and values of layers do."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * 10 ** (spread * torch.randn(*shape[:-1], 1, generator=generator))


def pool(rows: int, dim: int, codes: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Rows in 8 bits of some numbers, and what they mean: [N, 2 * D + 4] and [N, 2, D] float32."""
    kept = quantise(rand(rows, 2, dim, seed=seed, spread=0.3), codes)
    return kept.to(DEVICE), dequantise(kept, torch.empty(rows, 2, dim)).to(DEVICE)


def in_spans(rows: Tensor, span: int) -> Tensor:
    """A pool of the same rows [N, row], `span` of them in a span, and further ones that hold anything in the last."""
    spans = -(-len(rows) // span)
    filled = torch.cat((rows.view(torch.int8), rows.view(torch.int8)[: spans * span - len(rows)])).view(rows.dtype)
    held = rows_like(filled, spans * span).view(spans, span, -1)
    write_rows(held, torch.arange(spans * span, device=rows.device), filled)
    return held


def bytes_at(pool: Tensor, numbers: Tensor) -> Tensor:
    """Rows with these numbers, as bytes."""
    return read_rows(pool, numbers).view(torch.uint8)


# What is lost ---------------------------------------------------------------------------------------------------------


@codes_of_all
@pytest.mark.parametrize("dim", [2, 64, 80, 128])
def test_a_row_keeps_its_numbers_to_the_precision_of_its_codes(dim: int, codes: torch.dtype) -> None:
    numbers = rand(300, 2, dim, seed=0, spread=4.0)
    rows = quantise(numbers, codes)
    assert rows.shape == (300, 2 * dim + 4) and rows.dtype == codes
    read = dequantise(rows, torch.empty_like(numbers))
    most = numbers.abs().amax(-1, keepdim=True)
    bound = most / 127 * 0.51 if codes == torch.int8 else numbers.abs() / 16 + most * 2.0**-17
    assert ((read - numbers).abs() <= bound).all()
    assert torch.equal(keys_of(rows, dim, torch.float32), read[:, 0])


@codes_of_all
def test_rows_of_zeros_and_of_extremes(codes: torch.dtype) -> None:
    numbers = torch.tensor([[0.0, 0.0], [1e30, -1e30], [1e-30, 0.0], [448.0, 447.0], [1.0, 2.0**-40]])[:, None].expand(-1, 2, -1)
    read = dequantise(quantise(numbers, codes), torch.empty(numbers.shape))
    assert torch.isfinite(read).all() and not read[0].any()
    torch.testing.assert_close(read[1:4, :, 0], numbers[1:4, :, 0], rtol=0.07, atol=0)


@both
@codes_of_all
def test_what_is_no_number_stays_none(codes: torch.dtype, kind: str) -> None:
    """A broken model must not seem whole."""
    numbers = torch.ones(3, 1, 2, 4, device=DEVICE)
    numbers[0, 0, 0, 1], numbers[1, 0, 1, 2], numbers[2, 0, 0, 0] = math.nan, math.inf, -math.inf
    tiers = tiers_of(codes, 4, 1, 4, resident=True)
    seats, positions = torch.zeros(3, dtype=torch.int64, device=DEVICE), torch.arange(3, device=DEVICE)
    new = NewTokens(seats, positions, positions + 1, *numbers.unbind(2))
    function_of("append_layer", kind)(tiers, 1, new)
    rows = tiers.tokens.rows_of(1, seats[:1], positions[None, None])[0, 0]
    read = dequantise(read_rows(tiers.tokens.rows, rows), torch.empty(3, 2, 4, device=DEVICE))
    broken = torch.tensor([[True, False], [False, True], [True, False]], device=DEVICE)
    assert read[broken].isnan().all() and ((read[~broken] - 1).abs() < 0.01).all()


def test_scales_of_fp8_are_chosen_for_the_greatest_numbers() -> None:
    """Where one channel is far greater than the others, as keys have it, its error is that of a scale."""
    numbers = torch.randn(200, 2, 64, generator=torch.Generator().manual_seed(0))
    numbers[..., 5] += 30
    read = dequantise(quantise(numbers, torch.float8_e4m3fn), torch.empty_like(numbers))
    assert ((read - numbers)[..., 5].abs() / numbers[..., 5] < 2.0**-6).all(), "of at most 2^-4"


@codes_of_all
def test_numbers_in_16_bits(codes: torch.dtype) -> None:
    key, value = rand(2, 50, 3, 16, seed=3, spread=0.5).bfloat16()
    read = as_stored(key, value, torch.empty(0, dtype=codes))
    exact = as_stored(key.float(), value.float(), torch.empty(0, dtype=codes))
    for a, b in zip(read, exact, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b, rtol=2.0**-8, atol=0)
    assert as_stored(key, value, torch.empty(0))[0] is key


# Attention ------------------------------------------------------------------------------------------------------------


def exact(query: Tensor, arena: Tensor, rows: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Logits [R, Hq, B] and attention [R, Hq, D] in float64."""
    ratio = query.shape[1] // rows.shape[1]
    keys, values = (arena[rows.clamp(min=0), i].double().repeat_interleave(ratio, 1) for i in (0, 1))
    logits = torch.einsum("rhd,rhbd->rhb", query.double(), keys) * scale
    logits = logits.masked_fill((rows < 0).repeat_interleave(ratio, 1), -math.inf)
    return logits, torch.einsum("rhb,rhbd->rhd", torch.softmax(logits, -1).nan_to_num(0.0), values)


def close(output: Tensor, expected: Tensor, dtype: torch.dtype, most: Tensor) -> None:
    torch.testing.assert_close(output.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * float(most.abs().max()))


@both
@codes_of_all
@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
@pytest.mark.parametrize(
    ("kv_heads", "ratio", "width", "dim", "span"),
    [(2, 3, 17, 80, 1), (1, 8, 130, 128, 16), (2, 1, 40, 64, 24), (3, 2, 5, 18, 5)],
)
def test_attention_and_logits_over_rows(
    kv_heads: int, ratio: int, width: int, dim: int, span: int, dtype: torch.dtype, codes: torch.dtype, kind: str
) -> None:
    arena, numbers = pool(3 * width, dim, codes)
    query = torch.randn(2, kv_heads * ratio, dim, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    generator = torch.Generator().manual_seed(2)
    rows = torch.stack([torch.randperm(len(arena), generator=generator)[:width] for _ in range(2 * kv_heads)])
    rows = rows.view(2, kv_heads, width).masked_fill(torch.rand(2, kv_heads, width, generator=generator) < 0.3, -1)
    rows[-1, -1] = -1
    rows = rows.to(DEVICE)
    logits, expected = exact(query, numbers, rows, 0.1)
    arena = in_spans(arena, span) if span > 1 else arena
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
@pytest.mark.parametrize("page_size", [3, 16])
def test_attention_over_pages(page_size: int, codes: torch.dtype, kind: str) -> None:
    kv_heads, width, dim = 2, 37, 24
    count = -(-width // page_size)
    arena, numbers = pool((3 * count + 1) * page_size * kv_heads, dim, codes)
    pages = torch.randperm(3 * count + 1, generator=torch.Generator().manual_seed(3))[: 3 * count].view(3, count).to(DEVICE)
    lengths, token = torch.tensor([width, 11, 0], device=DEVICE), torch.arange(width, device=DEVICE)
    rows = ((pages[:, token // page_size] * page_size + token % page_size) * kv_heads)[:, None]
    rows = rows + torch.arange(kv_heads, device=DEVICE)[:, None]
    rows = torch.where(token < lengths[:, None, None], rows, -1)
    query = torch.randn(3, kv_heads * 2, dim, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    if kind == "triton":
        sizes = {"page_size": page_size, "kv_heads": kv_heads}
        held = in_spans(arena, page_size * kv_heads)
        output, _ = function_of("paged_attention", kind, "paged_attention")(query, held, pages, lengths, 0.2, **sizes)
    else:
        held = in_spans(arena, page_size * kv_heads)
        by_page = Pages(held, pages[None], page_size, kv_heads, places_of(one_by_one(1), DEVICE)).by_page(0)
        output, _ = paged_attention_reference(query, by_page, pages, lengths, 0.2, tile=16)
    close(output, exact(query, numbers, rows, 0.2)[1], torch.float32, numbers)


@codes_of_all
def test_a_chunk_attends_to_stored_rows(codes: torch.dtype) -> None:
    kv_heads, dim, stored, chunk = 2, 16, 21, 5
    rows, numbers = pool(stored * kv_heads, dim, codes)
    new = torch.randn(3, chunk, 4, dim, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    query, key, value = new[0], new[1][:, :kv_heads], new[2][:, :kv_heads]
    attention = ChunkAttention(query, key, value, 0.3)
    for part in rows.view(stored, kv_heads, -1).split(8):
        attention.add(part)
    keys, values = numbers.view(stored, kv_heads, 2, dim).unbind(2)
    padding = torch.zeros(stored, 4, dim, device=DEVICE)
    whole = causal_attention(torch.cat((padding, query)), torch.cat((keys, key)), torch.cat((values, value)), 0.3)[stored:]
    torch.testing.assert_close(attention.result(), whole, rtol=1e-4, atol=1e-4)


# Writing and copying ----------------------------------------------------------------------------------------------------


def tiers_of(codes: torch.dtype, dim: int, heads: int, page_size: int, *, resident: bool) -> Tiers:
    """Three layers, which lie side by side on the host, of three seats; rows hold anything."""
    block = LayerBlocks((3,), 4, (0, 1, 2))
    alone, together = places_of(one_by_one(3), DEVICE), places_of(block, DEVICE)
    generator = torch.Generator().manual_seed(9)
    arena = in_spans(pool(60 * page_size * heads, dim, codes, seed=5)[0], page_size * heads)
    host = in_spans(pool(30 * page_size * heads * 4, dim, codes, seed=6)[0], page_size * heads * 4)
    pages = 1 + torch.randperm(54, generator=generator).to(DEVICE)
    tokens, slots = pages[:27].view(3, 3, 3).contiguous(), pages[27:45].view(3, 3, 2).contiguous()
    at_host = 1 + torch.randperm(12, generator=generator)[:9].view(1, 3, 3).to(DEVICE)
    return Tiers(
        Pages(arena, tokens, page_size, heads, alone),
        Slots(arena, slots, page_size, heads, alone, 2, 3),
        Pages(host, at_host, page_size, heads, together),
        torch.tensor([False, resident, False], device=DEVICE),
    )


@both
@codes_of_all
@pytest.mark.parametrize(("dim", "heads", "page_size"), [(2, 1, 4), (80, 2, 16), (128, 3, 5)])
@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
@pytest.mark.parametrize("resident", [False, True], ids=["offloaded", "resident"])
def test_new_tokens_are_quantised_to_the_bit_alike(
    dim: int, heads: int, page_size: int, dtype: torch.dtype, resident: bool, codes: torch.dtype, kind: str
) -> None:
    tiers = tiers_of(codes, dim, heads, page_size, resident=resident)
    tokens = [(2, p, 9) for p in range(9)] + [(1, -1, 0), (0, 0, 1)]
    seats, positions, lengths = (torch.tensor(x, device=DEVICE) for x in zip(*tokens, strict=True))
    numbers = rand(2, len(tokens), heads, dim, seed=7, spread=1.5).to(dtype)
    numbers[:, 3] = 0
    key, value = numbers.to(DEVICE)
    new = NewTokens(seats, positions, lengths, key, value)
    expected = quantise(torch.stack((key, value), dim=2), codes)
    before = tiers.host.rows.clone()
    function_of("append_layer", kind)(tiers, 1, new)
    home = tiers.tokens if resident else tiers.host
    for seat in (0, 2):
        mine = (seats == seat).nonzero().squeeze(1)
        rows = home.rows_of(1, seats[mine[:1]], positions[mine][None, None])[0]  # [Hkv, T]
        assert torch.equal(bytes_at(home.rows, rows.T), expected[mine].view(torch.uint8))
    if resident:
        assert torch.equal(tiers.host.rows.view(torch.uint8), before.view(torch.uint8))
        return
    assert tiers.slots is not None
    ring = tiers.slots.rows_of(1, seats[:1], torch.tensor([[[0, 1, 2, 3, 4]]], device=DEVICE))[0]  # tokens 0, 1, 6, 7, 8
    kept = expected[torch.tensor([0, 1, 6, 7, 8], device=DEVICE)]
    assert torch.equal(bytes_at(tiers.slots.rows, ring.T), kept.view(torch.uint8))


@both
@codes_of_all
@pytest.mark.parametrize(("dim", "heads", "page_size"), [(2, 1, 4), (80, 2, 16), (128, 3, 5)])
def test_copies_are_exact(dim: int, heads: int, page_size: int, codes: torch.dtype, kind: str) -> None:
    """Pieces from the host to slots, rows between pools, and pieces of new rows to the host."""
    tiers = tiers_of(codes, dim, heads, page_size, resident=True)
    assert tiers.slots is not None
    seats, source = torch.tensor([2, 0], device=DEVICE), torch.tensor([[[7, 0, 3]]], device=DEVICE).expand(2, 1, 3)
    target = torch.tensor([[[1, 2, 0]]], device=DEVICE).expand(2, 1, 3)
    parts = Parts(torch.tensor([[0, 1, 2, -1]] * heads), torch.arange(heads), torch.zeros(heads, dtype=torch.int64))
    parts = Parts(*(x.to(DEVICE) for x in (parts.layers, parts.heads, parts.groups)))
    function_of("copy_pieces", kind)(tiers.host, tiers.slots, parts, tiers.resident, Copies.of_all(seats, source, target))
    for layer in (0, 2):
        there, here = tiers.host.rows_of(layer, seats, source), tiers.slots.rows_of(layer, seats, target)
        assert torch.equal(bytes_at(tiers.slots.rows, here), bytes_at(tiers.host.rows, there))
    rows, _ = pool(2 * heads * 4, dim, codes, seed=8)
    new, wanted = rows.view(2, heads, 4, -1), torch.tensor([True, False, True, False], device=DEVICE)
    positions, before = torch.tensor([6, 1], device=DEVICE), tiers.host.rows.clone()
    function_of("append_pieces", kind)(tiers.host, 0, seats, positions, new, wanted)
    for layer in range(3):
        there = tiers.host.rows_of(layer, seats, positions[:, None, None])[..., 0]
        right = read_rows(before, there) if layer == 1 else new[:, :, layer]
        assert torch.equal(bytes_at(tiers.host.rows, there), right.contiguous().view(torch.uint8))
    some, places = torch.tensor([3, -1, 0], device=DEVICE), torch.tensor([5, 6, 7], device=DEVICE)
    untouched = read_rows(tiers.tokens.rows, places[1:2])
    function_of("gather_rows", kind)(rows, some, tiers.tokens.rows, places)
    assert torch.equal(bytes_at(tiers.tokens.rows, places[[0, 2]]), rows[[3, 0]].view(torch.uint8))
    assert torch.equal(bytes_at(tiers.tokens.rows, places[1:2]), untouched.view(torch.uint8))
    layer, seat, start = 2, 1, 3
    tokens = rows.new_empty((5, heads, rows.shape[1]))
    function_of("gather_tokens", kind)(tiers.tokens, layer, seat, start, tokens)
    along = torch.arange(start, start + 5, device=DEVICE)[None, None]
    there = tiers.tokens.rows_of(layer, torch.tensor([seat], device=DEVICE), along)[0]
    assert torch.equal(tokens.view(torch.uint8), bytes_at(tiers.tokens.rows, there.T))


def test_the_operations_choose_triton_where_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("SPECONTEXT_KERNELS", "triton")
    arena, numbers = pool(9, 16, torch.int8)
    rows = torch.arange(9, device=DEVICE)[None, None]
    query = torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    close(sparse_attention(query, arena, rows, 0.2)[0], exact(query, numbers, rows, 0.2)[1], torch.float32, numbers)

"""Decode attention over rows in 8 bits, whose products are made in float16: sizes that float16 has no numbers for, splits, tiles,
what is no number, and what is not read."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from specontext.kernels.quantised_rows import dequantise, quantise
from specontext.kernels.tables import is_quantised
from specontext.kernels.triton.coded_attention import Tile
from specontext.kernels.triton.paged_attention import paged_attention
from specontext.kernels.triton.sparse_attention import sparse_attention
from tests.kernels.test_quantised_rows import DEVICE, codes_of_all, exact, in_spans

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
WIDTH, DIM, HEADS = 50, 32, 2
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def random(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def case(codes: torch.dtype, keys: Tensor | float = 1.0, values: Tensor | float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in 8 bits of keys and values of these sizes, what they mean, and [1, Hkv, B] of them."""
    numbers = random(WIDTH * HEADS, 2, DIM, seed=1)
    numbers[:, 0] *= keys
    numbers[:, 1] *= values
    kept = quantise(numbers, codes)
    assert is_quantised(kept)
    means = dequantise(kept, torch.empty(numbers.shape)).to(DEVICE)
    return in_spans(kept.to(DEVICE), 16 * HEADS), means, torch.randperm(WIDTH * HEADS, device=DEVICE).view(1, HEADS, WIDTH)


def require(output: Tensor, lse: Tensor, query: Tensor, means: Tensor, rows: Tensor, scale: float) -> None:
    logits, expected = exact(query, means, rows, scale)
    most = float(expected.abs().max())
    torch.testing.assert_close(output.double() / most, expected / most, rtol=0, atol=TOLERANCE[query.dtype])
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)


@codes_of_all
@dtypes
@pytest.mark.parametrize("size", [1e-30, 1e-4, 3e4, 1e30])
def test_queries_keys_and_values_of_any_size(size: float, dtype: torch.dtype, codes: torch.dtype) -> None:
    """Float16 ends at 65504, and is coarse from 6e-5 down. What a result cannot be in the model's format is left out."""
    query = random(1, 4 * HEADS, DIM, seed=0)
    if dtype != torch.float16:
        arena, means, rows = case(codes, keys=1 / size)
        large = (query * size).to(DEVICE, dtype)
        require(*sparse_attention(large, arena, rows, 0.2), large, means, rows, 0.2)
        arena, means, rows = case(codes, values=size)
    else:
        arena, means, rows = case(codes, values=min(max(size, 1e-4), 1e4))
    query = query.to(DEVICE, dtype)
    require(*sparse_attention(query, arena, rows, 0.2), query, means, rows, 0.2)


@codes_of_all
@pytest.mark.parametrize("splits", [1, 3])
def test_rows_whose_sizes_differ_by_many_powers_of_ten(splits: int, codes: torch.dtype) -> None:
    """As those of first tokens do, whose values are small, and whose weights are large."""
    spread = 10 ** (3 * random(WIDTH * HEADS, 1, seed=3))
    arena, means, rows = case(codes, values=spread)
    query = random(1, 4 * HEADS, DIM, seed=0).to(DEVICE)
    require(*sparse_attention(query, arena, rows, 0.5, splits=splits), query, means, rows, 0.5)
    arena, means, rows = case(codes, values=(spread > 1) * spread)
    require(*sparse_attention(query, arena, rows, 0.5, splits=splits), query, means, rows, 0.5)


@codes_of_all
@pytest.mark.parametrize(("group", "tile"), [(1, Tile(16)), (5, Tile(32, 2, 3)), (8, Tile(64, 8)), (16, Tile(128))])
def test_tiles_and_groups(tile: Tile, group: int, codes: torch.dtype) -> None:
    arena, means, rows = case(codes)
    query = random(1, group * HEADS, DIM, seed=0).to(DEVICE)
    require(*sparse_attention(query, arena, rows, 0.3, splits=2, tile=tile), query, means, rows, 0.3)


@codes_of_all
def test_zeros_everywhere(codes: torch.dtype) -> None:
    arena, _, rows = case(codes, keys=0.0, values=0.0)
    output, lse = sparse_attention(torch.zeros(1, 4 * HEADS, DIM, device=DEVICE), arena, rows, 0.3)
    assert output.count_nonzero() == 0
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(WIDTH)))


@codes_of_all
@pytest.mark.parametrize("where", [0, 1], ids=["key", "value"])
def test_what_is_no_number_is_seen_by_those_who_read_it(where: int, codes: torch.dtype) -> None:
    numbers = random(WIDTH * HEADS, 2, DIM, seed=1)
    numbers[7, where, 3] = math.inf
    arena = quantise(numbers, codes).to(DEVICE)
    rows = torch.arange(WIDTH * HEADS, device=DEVICE).view(1, HEADS, WIDTH)
    query = random(1, 4 * HEADS, DIM, seed=0).to(DEVICE)
    output, _ = sparse_attention(query, arena, rows, 0.3)
    assert output[:, :4].isnan().all() and output[:, 4:].isfinite().all()
    rows = rows.masked_fill(rows == 7, -1)
    assert sparse_attention(query, arena, rows, 0.3)[0].isfinite().all()


@codes_of_all
@dtypes
def test_a_page_may_hold_anything_beyond_a_length(dtype: torch.dtype, codes: torch.dtype) -> None:
    """And so may pages that others have, and page 0, which stands where there is none."""
    size, length = 8, 29
    kept = quantise(random(6 * size * HEADS, 2, DIM, seed=1), codes).view(6, size, HEADS, -1)
    pages = torch.tensor([[4, 1, 5, 2, 0, 0]], device=DEVICE)
    nothing = quantise(torch.full((2, DIM), math.nan), codes)
    nothing.view(torch.int8)[: 2 * DIM] = 0x7F  # no number in either format of scales, and in fp8 neither
    kept.view(torch.int8)[[0, 3]] = nothing.view(torch.int8)
    kept.view(torch.int8)[2, length % size :] = nothing.view(torch.int8)
    held = in_spans(kept.view(-1, kept.shape[-1]).to(DEVICE), size * HEADS)
    means = dequantise(kept.view(-1, kept.shape[-1]), torch.empty(6 * size * HEADS, 2, DIM)).to(DEVICE)
    token = torch.arange(length, device=DEVICE)
    rows = (pages[:, token // size] * size + token % size)[:, None] * HEADS + torch.arange(HEADS, device=DEVICE)[:, None]
    query = random(1, 3 * HEADS, DIM, seed=0).to(DEVICE, dtype)
    for splits in (1, 2, 5):
        found = paged_attention(
            query, held, pages, torch.tensor([length], device=DEVICE), 0.3, page_size=size, kv_heads=HEADS, splits=splits
        )
        require(*found, query, means, rows, 0.3)


@codes_of_all
def test_a_soft_cap(codes: torch.dtype) -> None:
    arena, means, rows = case(codes)
    query = random(1, 4 * HEADS, DIM, seed=0).to(DEVICE)
    output, lse = sparse_attention(query, arena, rows, 0.5, 3.0)
    logits, _ = exact(query, means, rows, 0.5)
    logits = 3.0 * torch.tanh(logits / 3.0)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
    values = means[rows[0], 1].double().repeat_interleave(4, 0)[None]
    expected = torch.einsum("rhb,rhbd->rhd", logits.softmax(-1), values)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)

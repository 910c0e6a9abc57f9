"""Attention kernels against naive float64 loops: odd shapes, GQA ratios, head dims and number formats."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from specontext.kernels.attention_logits import attention_logits
from specontext.kernels.dense_attention import dense_attention_tile
from specontext.kernels.sparse_attention import merge_partials, sparse_attention

# Relative and absolute error of an output in each format: float32 accumulation, one rounding at the end.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
FORMATS = list(TOLERANCE)
# R, Hkv, Hq / Hkv, entries, D
SHAPES = [(1, 1, 1, 1, 64), (2, 2, 3, 17, 80), (3, 1, 16, 33, 96), (1, 4, 2, 130, 128), (2, 2, 8, 7, 256), (5, 3, 5, 31, 64)]


def rand(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows_with_gaps(requests: int, kv_heads: int, width: int, arena: int, seed: int) -> Tensor:
    """Distinct rows of an arena in random order, a third of them skipped."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.stack([torch.randperm(arena, generator=generator)[:width] for _ in range(requests * kv_heads)])
    rows = rows.view(requests, kv_heads, width)
    gaps = torch.rand(rows.shape, generator=generator) < 0.33
    gaps[..., 0] = False
    return rows.masked_fill(gaps, -1)


def naive_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, float]:
    """Softmax attention of one query [D] over keys and values [S, D], in float64."""
    if not len(keys):
        return torch.zeros_like(query, dtype=torch.float64), -math.inf
    logits = keys.double() @ query.double() * scale
    return torch.softmax(logits, 0) @ values.double(), logits.logsumexp(0).item()


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(("requests", "kv_heads", "ratio", "width", "dim"), SHAPES)
def test_sparse_attention(requests: int, kv_heads: int, ratio: int, width: int, dim: int, dtype: torch.dtype) -> None:
    query = rand(requests, kv_heads * ratio, dim, dtype=dtype, seed=0)
    arena = rand(width * 3 + 2, 2, dim, dtype=dtype, seed=1)
    rows = rows_with_gaps(requests, kv_heads, width, len(arena), seed=2)
    scale = 0.7 * dim**-0.5
    output, lse = sparse_attention(query, arena, rows, scale)
    assert output.dtype == dtype and lse.dtype == torch.float32
    for r in range(requests):
        for head in range(kv_heads * ratio):
            read = rows[r, head // ratio]
            read = read[read >= 0]
            expected, expected_lse = naive_attention(query[r, head], arena[read, 0], arena[read, 1], scale)
            close(output[r, head], expected, dtype)
            assert lse[r, head].item() == pytest.approx(expected_lse, abs=1e-4)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(("requests", "kv_heads", "ratio", "width", "dim"), SHAPES)
def test_attention_logits(requests: int, kv_heads: int, ratio: int, width: int, dim: int, dtype: torch.dtype) -> None:
    query = rand(requests, kv_heads * ratio, dim, dtype=dtype, seed=0)
    arena = rand(width * 3 + 2, 2, dim, dtype=dtype, seed=1)
    rows = rows_with_gaps(requests, kv_heads, width, len(arena), seed=2)
    logits = attention_logits(query, arena, rows, 0.3)
    keys = arena[rows.clamp(min=0), 0].double().repeat_interleave(ratio, 1)  # [R, Hq, B, D]
    expected = torch.einsum("rhd,rhbd->rhb", query.double(), keys) * 0.3
    absent = (rows < 0).repeat_interleave(ratio, 1)
    torch.testing.assert_close(logits.double(), expected.masked_fill(absent, -math.inf), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(("chunk", "kv_heads", "ratio", "span", "dim"), SHAPES)
@pytest.mark.parametrize("past", [None, 0, 5])
def test_dense_attention_tile(
    chunk: int, kv_heads: int, ratio: int, span: int, dim: int, past: int | None, dtype: torch.dtype
) -> None:
    query = rand(chunk, kv_heads * ratio, dim, dtype=dtype, seed=0)
    tile = rand(span, kv_heads, 2, dim, dtype=dtype, seed=1)
    output, lse = dense_attention_tile(query, tile, dim**-0.5, past)
    assert output.dtype == lse.dtype == torch.float32
    for i in range(chunk):
        end = span if past is None else past + i + 1
        for head in range(kv_heads * ratio):
            seen = tile[:end, head // ratio]
            expected, expected_lse = naive_attention(query[i, head], seen[:, 0], seen[:, 1], dim**-0.5)
            close(output[i, head], expected, torch.float32)
            assert lse[i, head].item() == pytest.approx(expected_lse, abs=1e-4)


def test_a_query_that_sees_nothing_gives_zeros_and_minus_infinity() -> None:
    query, arena = rand(2, 4, 8, dtype=torch.float32, seed=0), rand(6, 2, 8, dtype=torch.float32, seed=1)
    rows = torch.tensor([[[-1, -1], [3, -1]], [[-1, -1], [-1, -1]]])
    output, lse = sparse_attention(query, arena, rows, 1.0)
    nothing = torch.tensor([[True, True, False, False], [True] * 4])
    assert torch.equal(lse.isneginf(), nothing) and not output[nothing].any()
    torch.testing.assert_close(output[0, 2:], arena[3, 1].expand(2, -1))
    dense, dense_lse = dense_attention_tile(query, rand(3, 2, 2, 8, dtype=torch.float32, seed=2), 1.0, past=-1)
    assert dense_lse[0].isneginf().all() and not dense[0].any() and dense_lse[1].isfinite().all()


def test_large_logits_do_not_overflow() -> None:
    query, arena = torch.full((1, 1, 4), 300.0), torch.full((2, 2, 4), 300.0)
    arena[1, 0] = -300.0
    output, lse = sparse_attention(query, arena, torch.tensor([[[0, 1]]]), 1.0)
    assert torch.equal(output[0, 0], arena[0, 1]) and lse.item() == pytest.approx(360000.0)


@pytest.mark.parametrize("parts", [1, 2, 7])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_merged_parts_equal_the_whole(parts: int, dtype: torch.dtype) -> None:
    query, arena = rand(2, 6, 16, dtype=dtype, seed=0), rand(80, 2, 16, dtype=dtype, seed=1)
    rows = rows_with_gaps(2, 3, 37, len(arena), seed=2)
    owner = torch.randint(parts, rows.shape, generator=torch.Generator().manual_seed(3))
    pieces = [sparse_attention(query.float(), arena, rows.masked_fill(owner != part, -1), 0.25) for part in range(parts)]
    pieces.append(sparse_attention(query.float(), arena, torch.full_like(rows, -1), 0.25))  # a part without entries
    outputs, lses = zip(*pieces, strict=True)
    whole, _ = sparse_attention(query.float(), arena, rows, 0.25)
    torch.testing.assert_close(merge_partials(torch.stack(outputs), torch.stack(lses)), whole, rtol=1e-5, atol=1e-6)


def test_merging_only_empty_parts_gives_zeros() -> None:
    merged = merge_partials(torch.zeros(3, 2, 4, 8, dtype=torch.bfloat16), torch.full((3, 2, 4), -math.inf))
    assert merged.dtype == torch.bfloat16 and not merged.any()

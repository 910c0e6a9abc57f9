"""Attention kernels against naive float64 loops: odd shapes, GQA ratios, head dims and number formats."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from specontext.kernels.attention_logits import attention_logits
from specontext.kernels.dense_attention import ChunkAttention, causal_attention
from specontext.kernels.fused_attention import attention_with_lse
from specontext.kernels.paged_attention import paged_attention, tokens_of_pages
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


def chunk_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, past: Sequence[Tensor] = ()) -> Tensor:
    if not past:
        return causal_attention(query, key, value, scale)
    attention = ChunkAttention(query, key, value, scale)
    for tile in past:
        attention.add(tile)
    return attention.result()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(("chunk", "kv_heads", "ratio", "span", "dim"), SHAPES)
@pytest.mark.parametrize("tiles", [(), (1,), (7, 16, 3)])
def test_chunk_attention(
    chunk: int, kv_heads: int, ratio: int, span: int, dim: int, tiles: tuple[int, ...], dtype: torch.dtype
) -> None:
    chunk = min(span, 40) if chunk == 1 else chunk
    query = rand(kv_heads * ratio, chunk, dim, dtype=dtype, seed=0).transpose(0, 1)
    tokens = rand(sum(tiles) + chunk, kv_heads, 2, dim, dtype=dtype, seed=1)
    *past, fresh = tokens.split((*tiles, chunk))
    output = chunk_attention(query, fresh[:, :, 0], fresh[:, :, 1], dim**-0.5, past)
    assert output.dtype == dtype and output.shape == query.shape
    for i in range(chunk):
        for head in range(kv_heads * ratio):
            seen = tokens[: sum(tiles) + i + 1, head // ratio]
            expected, _ = naive_attention(query[i, head], seen[:, 0], seen[:, 1], dim**-0.5)
            close(output[i, head], expected, dtype)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("cut", [1, 30, 64, 99])
def test_cutting_a_chunk_in_two_changes_rounding_only(cut: int, dtype: torch.dtype) -> None:
    query, tokens = rand(100, 6, 64, dtype=dtype, seed=0), rand(100, 2, 2, 64, dtype=dtype, seed=1)
    key, value = tokens.unbind(2)
    whole = chunk_attention(query, key, value, 0.2)
    first = chunk_attention(query[:cut], key[:cut], value[:cut], 0.2)
    second = chunk_attention(query[cut:], key[cut:], value[cut:], 0.2, [tokens[:cut]])
    close(torch.cat((first, second)), whole.double(), dtype)


def in_pages(tokens: Tensor, pages: Tensor, page_size: int) -> Tensor:
    """Pages [N, page_size, Hkv, 2, D] that hold tokens [S, Hkv, 2, D]; all else is NaN."""
    count = len(tokens)
    arena = tokens.new_full((int(pages.max()) + 1, page_size, *tokens.shape[1:]), math.nan)
    at = torch.arange(count)
    arena[pages[at // page_size], at % page_size] = tokens
    return arena


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("page_size", [1, 7, 16])
@pytest.mark.parametrize(("requests", "kv_heads", "ratio", "width", "dim"), SHAPES)
def test_paged_attention(
    requests: int, kv_heads: int, ratio: int, width: int, dim: int, page_size: int, dtype: torch.dtype
) -> None:
    query = rand(requests, kv_heads * ratio, dim, dtype=dtype, seed=0)
    tokens = rand(requests * width, kv_heads, 2, dim, dtype=dtype, seed=1).view(requests, width, kv_heads, 2, dim)
    count, scale = -(-width // page_size), dim**-0.5
    numbers = torch.randperm(requests * count + 3, generator=torch.Generator().manual_seed(2))[: requests * count]
    pages = numbers.view(requests, count)
    padded = torch.nn.functional.pad(tokens, (0, 0, 0, 0, 0, 0, 0, count * page_size - width))
    arena = in_pages(padded.flatten(0, 1), numbers, page_size)
    lengths = torch.tensor([max(width - 5 * r, 0) for r in range(requests)])
    output, lse = paged_attention(query, arena, pages, lengths, scale, tile=13)
    assert output.dtype == dtype and lse.dtype == torch.float32
    for r, length in enumerate(lengths.tolist()):
        for head in range(kv_heads * ratio):
            seen = tokens[r, :length, head // ratio]
            expected, expected_lse = naive_attention(query[r, head], seen[:, 0], seen[:, 1], scale)
            close(output[r, head], expected, dtype)
            assert lse[r, head].item() == pytest.approx(expected_lse, abs=1e-4)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_layers_that_lie_between_change_nothing(dtype: torch.dtype) -> None:
    """Rows of one layer out of pieces with those of two others, which are not numbers: bit for bit the same result."""
    query, pages = rand(1, 6, 64, dtype=dtype, seed=0), torch.tensor([5, 6, 7, 8, 2, 0, 1, 3, 12, 10, 11, 9, 4])
    alone = in_pages(rand(100, 3, 2, 64, dtype=dtype, seed=1), pages, 8)
    between = torch.full((*alone.shape[:3], 3, *alone.shape[3:]), math.nan, dtype=dtype)
    between[:, :, :, 1] = alone
    for of_request, length in ((pages, 100), (pages[:4], 30)):  # and pages that follow one another
        assert torch.equal(
            tokens_of_pages(between[:, :, :, 1], of_request, 3, length), tokens_of_pages(alone, of_request, 3, length)
        )
        one, other = (
            paged_attention(query, rows, of_request[None], torch.tensor([length]), 0.2, tile=32)
            for rows in (alone, between[:, :, :, 1])
        )
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_where_pages_lie_changes_nothing(dtype: torch.dtype) -> None:
    """Pages in a row are read in place, others copied: bit for bit the same result."""
    query, tokens = rand(1, 6, 64, dtype=dtype, seed=0), rand(100, 3, 2, 64, dtype=dtype, seed=1)
    results = []
    for pages in (
        torch.arange(4, 17),
        torch.arange(16, 3, -1),
        torch.cat((torch.arange(3, 9), torch.arange(0, 3), torch.arange(9, 13))),
    ):
        arena = in_pages(tokens, pages, 8)
        assert torch.equal(tokens_of_pages(arena, pages, 9, 77), tokens[9:77])
        results.append(paged_attention(query, arena, pages[None], torch.tensor([100]), 0.2, tile=32))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))
    in_place = tokens_of_pages(in_pages(tokens, torch.arange(4, 17), 8), torch.arange(4, 17), 9, 77)
    assert in_place.untyped_storage().nbytes() > in_place.nbytes  # a view of the arena


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mixed", [False, True], ids=["fused", "products"])
def test_attention_with_lse(causal: bool, mixed: bool, dtype: torch.dtype) -> None:
    query, tokens = rand(2, 6, 9, 40, dtype=dtype, seed=0), rand(2, 9, 3, 2, 40, dtype=dtype, seed=1)
    key, value = tokens.permute(3, 0, 2, 1, 4).unbind(0)
    query = query.double() if mixed else query  # no fused kernel takes formats that differ
    output, lse = attention_with_lse(query, key, value, 0.2, causal=causal)
    for n in range(2):
        for head in range(6):
            for i in range(9):
                end = i + 1 if causal else 9
                expected, expected_lse = naive_attention(
                    query[n, head, i], key[n, head // 2, :end], value[n, head // 2, :end], 0.2
                )
                close(output[n, head, i], expected, torch.float32 if mixed else dtype)
                assert lse[n, head, i].item() == pytest.approx(expected_lse, abs=1e-4)


def test_a_query_that_sees_nothing_gives_zeros_and_minus_infinity() -> None:
    query, arena = rand(2, 4, 8, dtype=torch.float32, seed=0), rand(6, 2, 8, dtype=torch.float32, seed=1)
    rows = torch.tensor([[[-1, -1], [3, -1]], [[-1, -1], [-1, -1]]])
    output, lse = sparse_attention(query, arena, rows, 1.0)
    nothing = torch.tensor([[True, True, False, False], [True] * 4])
    assert torch.equal(lse.isneginf(), nothing) and not output[nothing].any()
    torch.testing.assert_close(output[0, 2:], arena[3, 1].expand(2, -1))
    pages, lengths = torch.tensor([[0], [1]]), torch.tensor([0, 1])
    output, lse = paged_attention(query, arena.view(-1, 1, 2, *arena.shape[1:]), pages, lengths, 1.0)
    assert lse[0].isneginf().all() and not output[0].any() and lse[1].isfinite().all()


def test_large_logits_do_not_overflow() -> None:
    query, arena = torch.full((1, 1, 4), 300.0), torch.full((2, 2, 4), 300.0)
    arena[1, 0] = -300.0
    output, lse = sparse_attention(query, arena, torch.tensor([[[0, 1]]]), 1.0)
    assert torch.equal(output[0, 0], arena[0, 1]) and lse.item() == pytest.approx(360000.0)


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("kv_heads", [1, 5])
def test_a_request_gets_the_same_bits_alone_and_among_others(kv_heads: int, ratio: int) -> None:
    """Requests that read much, little and nothing, in every place of the batch."""
    query, dim, size = rand(5, kv_heads * ratio, 80, dtype=torch.float32, seed=0), 80, 8
    lengths = torch.tensor([700, 3, 90, 0, 1100])
    pages = torch.randperm(5 * 138, generator=torch.Generator().manual_seed(1)).view(5, -1)
    arena = rand(pages.numel() * size * kv_heads, 2, dim, dtype=torch.float32, seed=2)
    rows = rows_with_gaps(5, kv_heads, 1100, len(arena), seed=3)
    rows.masked_fill_(torch.arange(1100) >= lengths[:, None, None], -1)
    for kernel, numbers in (
        (lambda n: sparse_attention(query[n], arena, rows[n], 0.2), torch.arange(5)),
        (
            lambda n: paged_attention(query[n], arena.view(-1, size, kv_heads, 2, dim), pages[n], lengths[n], 0.2),
            torch.arange(5),
        ),
    ):
        together = kernel(numbers)
        for order in (numbers.flip(0), *numbers.split(1), *numbers.split(2)):
            for alone, among in zip(kernel(order), together, strict=True):
                assert torch.equal(alone, among[order])


def test_where_skipped_entries_stand_changes_nothing() -> None:
    query, arena = rand(1, 6, 64, dtype=torch.float32, seed=0), rand(400, 2, 64, dtype=torch.float32, seed=1)
    rows = torch.randperm(400, generator=torch.Generator().manual_seed(2))[:300].view(1, 3, 100)
    gap = torch.full((1, 3, 60), -1)
    spread = torch.cat((rows[..., :30], gap, rows[..., 30:], gap), dim=-1)
    last = torch.cat((rows, gap, gap), dim=-1)
    for one, other in zip(sparse_attention(query, arena, spread, 0.2), sparse_attention(query, arena, last, 0.2), strict=True):
        assert torch.equal(one, other)


def test_what_lies_beyond_a_context_is_not_read() -> None:
    """Other requests make the tile wider than a short one's context, whose last page holds no numbers after it."""
    tokens = rand(30, 2, 2, 64, dtype=torch.float32, seed=1)
    arena = torch.full((5, 8, 2, 2, 64), math.nan)
    arena[:4].view(-1, 2, 2, 64)[:30], arena[4, :3] = tokens, tokens[:3]
    pages, lengths = torch.tensor([[0, 1, 2, 3], [4, 0, 0, 0]]), torch.tensor([30, 3])
    query = rand(1, 4, 64, dtype=torch.float32, seed=0).expand(2, -1, -1)
    output, _ = paged_attention(query, arena.view(-1, 8, 2, 2, 64), pages, lengths, 0.2)
    for head in range(4):
        seen = tokens[:3, head // 2]
        close(output[1, head], naive_attention(query[1, head], seen[:, 0], seen[:, 1], 0.2)[0], torch.float32)


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

"""A chunk's attention by few long calls: which numbers go to which kernel, and what the merge gives, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from specontext.kernels import gpu_chunk
from specontext.kernels.dense_attention import causal_attention, chunk_attention
from specontext.kernels.dispatch import reference_of
from specontext.kernels.gpu_chunk import GpuChunk, as_if_alone, cuts, merge_part, packed_attention, serves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def exact(query: Tensor, tokens: Tensor, scale: float) -> Tensor:
    """Attention of the last Q of some tokens [T, Hkv, 2, D] in float64: [Q, Hq, D]."""
    keys, values = tokens.double().repeat_interleave(query.shape[1] // tokens.shape[1], 1).unbind(2)
    logits = torch.einsum("qhd,thd->hqt", query.double(), keys) * scale
    seen = torch.ones(len(query), len(tokens), dtype=torch.bool, device=query.device).tril(len(tokens) - len(query))
    return torch.einsum("hqt,thd->qhd", logits.masked_fill(~seen, -torch.inf).softmax(-1), values)


def kernel(calls: list[tuple[int, int, bool]]) -> Callable[..., Any]:
    """A kernel that notes numbers of queries and keys, and whether it is causal; in the query's format, as those of a GPU."""

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        (count, keys), ratio = (query.shape[2], key.shape[2]), query.shape[1] // key.shape[1]
        calls.append((count, keys, causal))
        logits = query.float() @ key.float().repeat_interleave(ratio, 1).mT * scale
        if causal:
            logits.masked_fill_(~torch.ones(count, keys, dtype=torch.bool).tril(keys - count), -torch.inf)
        return (logits.softmax(-1) @ value.float().repeat_interleave(ratio, 1)).to(query.dtype), logits.logsumexp(-1)

    return attend


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_chunk, "QUERIES", 8)
    monkeypatch.setattr(gpu_chunk, "KEYS", 4)


def test_tokens_are_cut_into_few_powers_of_two(small_units: None) -> None:
    assert cuts(16) == [(0, 16)] and cuts(3) == [(0, 3)] and cuts(0) == []
    assert cuts(31) == [(0, 16), (16, 24), (24, 28), (28, 31)]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("chunk", [1, 8, 21])
@pytest.mark.parametrize("tiles", [(), (1,), (20, 7, 16)])
@pytest.mark.parametrize("with_regular", [False, True])
def test_any_chunk(with_regular: bool, tiles: tuple[int, ...], chunk: int, dtype: torch.dtype, small_units: None) -> None:
    query, tokens = rand(chunk, 6, 16, dtype=dtype, seed=0).cpu(), rand(sum(tiles) + chunk, 2, 2, 16, dtype=dtype, seed=1).cpu()
    *past, own = tokens.split((*tiles, chunk))
    found: tuple[list[tuple[int, int, bool]], ...] = ([], [])
    regular, other = map(kernel, found)
    attention = GpuChunk(query, *own.unbind(2), 0.3, regular=regular if with_regular else None, any_number=other)
    for tile in past:
        attention.add(tile)
    result = attention.result()
    assert result.dtype == dtype and result.shape == query.shape
    torch.testing.assert_close(result.double(), exact(query, tokens, 0.3), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for queries, keys, causal in found[0]:
        assert queries % 8 == 0 and (keys == queries if causal else keys >= 4 and keys.bit_count() == 1)
    assert bool(found[0]) == (with_regular and chunk >= 8)
    assert not any(queries >= 8 and keys >= 8 for queries, keys, _ in found[1]) or not with_regular or chunk % 8


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(
    "layout",
    [
        lambda tokens, heads, start, stop: rand(tokens, heads, 16, seed=0)[None, start:stop].transpose(1, 2),
        lambda tokens, heads, start, stop: rand(1, heads, tokens, 16, seed=0)[:, :, start:stop],
        lambda tokens, heads, start, stop: rand(tokens, heads, 2, 16, seed=0)[start:stop, :, 1][None].transpose(1, 2),
        lambda tokens, heads, start, stop: (
            rand(tokens, 9 * 16, seed=0)[start:stop, 16 : (1 + heads) * 16].view(1, stop - start, heads, 16).transpose(1, 2)
        ),
    ],
    ids=["token by token", "head by head", "with values between", "beside others"],
)
def test_plans_are_made_for_numbers_of_tokens_only(layout: Callable[..., Tensor], heads: int) -> None:
    """Strides are part of what a plan is made for, and must not say of how many tokens the eight are a part."""
    seen = set()
    for tokens, start in ((8, 0), (13, 0), (13, 5), (40, 7)):
        numbers = layout(tokens, heads, start, start + 8)
        alike = as_if_alone(numbers)
        assert alike.shape == numbers.shape and torch.equal(alike, numbers)
        seen.add(alike.stride())
    [(batch, _, token, width)] = seen
    assert batch == 8 * token and width == 1


def merges() -> list[Any]:
    found = [pytest.param(reference_of(merge_part), id="reference")]
    try:
        from specontext.kernels.triton.gpu_chunk import merge_part as on_gpu
    except ImportError:
        return found
    return [*found, pytest.param(on_gpu, id="triton")]


@pytest.mark.parametrize("merge", merges())
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("queries", "heads", "dim"), [(1, 1, 16), (21, 3, 24), (40, 2, 128)])
def test_merge_of_parts(merge: Callable[..., None], queries: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    """Parts of very different weight, and a part that is a view of heads first, as kernels return it."""
    total, lse = rand(queries, heads, dim, seed=0), 30 * rand(heads, queries, seed=1)
    part, part_lse = rand(heads, queries, dim, dtype=dtype, seed=2).transpose(0, 1), 30 * rand(heads, queries, seed=3)
    both = torch.logaddexp(lse.double(), part_lse.double())
    weights = [(one.double() - both).exp().T[..., None] for one in (lse, part_lse)]
    expected = total.double() * weights[0] + part.double() * weights[1]
    merge(total, lse, part, part_lse)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), both, rtol=1e-5, atol=1e-5)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kv_heads", "ratio", "dim"), [(2, 4, 128), (1, 1, 64), (2, 3, 80)])
@pytest.mark.parametrize(("chunk", "tiles"), [(300, ()), (4096, ()), (5000, (2048, 300)), (2100, (7000,)), (1, (5000,))])
def test_the_kernels_of_this_gpu(
    chunk: int, tiles: tuple[int, ...], kv_heads: int, ratio: int, dim: int, dtype: torch.dtype
) -> None:
    query = rand(chunk, kv_heads * ratio, dim, dtype=dtype, seed=0)
    tokens = rand(sum(tiles) + chunk, kv_heads, 2, dim, dtype=dtype, seed=1)
    assert serves(query)
    *past, own = tokens.split((*tiles, chunk))
    attention = chunk_attention(query, *own.unbind(2), dim**-0.5)
    for tile in past:
        attention.add(tile)
    some = slice(max(0, chunk - 70), None)
    right = exact(query[some], tokens, dim**-0.5)
    torch.testing.assert_close(attention.result()[some].double(), right, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@on_gpu
def test_cudnn_s_kernel_takes_parts_of_all_layouts() -> None:
    query, tokens = rand(2100, 8, 64, dtype=torch.bfloat16, seed=0), rand(6200, 2, 2, 64, dtype=torch.bfloat16, seed=1)
    right = exact(query[-60:], tokens[: 4096 + 2100], 0.125)
    if gpu_chunk.regular_kernel(query, tokens[:, :, 0]) is None:
        pytest.skip("PyTorch does not take cuDNN's kernel here")
    for laid in (lambda x: x, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)):
        own = [laid(part) for part in tokens[4096 : 4096 + 2100].unbind(2)]
        attention = chunk_attention(laid(query), *own, 0.125)
        attention.add(tokens[:4096])
        torch.testing.assert_close(attention.result()[-60:].double(), right, rtol=0.016, atol=0.016)


@on_gpu
def test_packed_sequences() -> None:
    lengths = (3, 1, 200, 64)
    query, key, value = (rand(sum(lengths), heads, 64, dtype=torch.bfloat16, seed=heads) for heads in (6, 2, 2))
    bounds = torch.tensor([0, 3, 4, 204, 268], dtype=torch.int32, device=DEVICE)
    found = packed_attention(query, key, value, bounds, 200, 0.2)
    parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
    expected = torch.cat([causal_attention(*part, 0.2) for part in parts])
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.016, atol=0.016)

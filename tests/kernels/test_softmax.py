"""Soft caps on logits and sinks beside them, in every kernel that attends, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specontext.kernels import fused_attention
from specontext.kernels import paged_attention as paged
from specontext.kernels.dense_attention import ChunkAttention, causal_attention
from specontext.kernels.dispatch import reference_of
from specontext.kernels.paged_attention import paged_attention_reference
from specontext.kernels.softmax import Softmax, with_sinks
from specontext.kernels.sparse_attention import sparse_attention
from specontext.kernels.window_attention import window_attention
from specontext.layer_sizes import Window

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
FORMATS = list(TOLERANCE)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def naive(query: Tensor, keys: Tensor, values: Tensor, scale: float, softmax: Softmax) -> tuple[Tensor, Tensor]:
    """Attention of queries [Hq, D] over what each of them sees, [Hq, S, D]; and log-sum-exp without sinks."""
    logits = torch.einsum("hd,hsd->hs", query.double(), keys.double()) * scale
    if softmax.cap is not None:
        logits = softmax.cap * torch.tanh(logits / softmax.cap)
    lse = logits.logsumexp(-1)
    if softmax.sinks is not None:
        logits = torch.cat((logits, softmax.sinks.double()[:, None]), dim=-1)
        values = torch.nn.functional.pad(values, (0, 0, 0, 1))
    return torch.einsum("hs,hsd->hd", logits.softmax(-1), values.double()), lse


def softmaxes(heads: int) -> list[Softmax]:
    sinks = rand(heads, seed=9) * 2
    return [Softmax(1.5), Softmax(None, sinks), Softmax(4.0, sinks.bfloat16())]


@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(("ratio", "width", "dim", "splits"), [(1, 17, 24, 1), (8, 70, 64, 3), (2, 130, 128, None)])
@pytest.mark.parametrize("which", range(3))
def test_rows(kernel: str, dtype: torch.dtype, ratio: int, width: int, dim: int, splits: int | None, which: int) -> None:
    query, arena = rand(2, 2 * ratio, dim, dtype=dtype, seed=0), rand(width * 5, 2, dim, dtype=dtype, seed=1)
    rows = torch.stack([torch.randperm(len(arena))[:width] for _ in range(4)]).view(2, 2, width).to(DEVICE)
    rows[:, :, ::3] = -1
    softmax, scale = softmaxes(2 * ratio)[which], 3 * dim**-0.5
    if kernel == "reference":
        output, lse = reference_of(sparse_attention)(query, arena, rows, scale, softmax.cap)
    else:
        triton = pytest.importorskip("specontext.kernels.triton.sparse_attention")
        output, lse = triton.sparse_attention(query, arena, rows, scale, softmax.cap, splits=splits)
    output = with_sinks(output, lse, softmax)
    for request in range(2):
        of_heads = [rows[request, head // ratio] for head in range(2 * ratio)]
        read = torch.stack([arena[row[row >= 0]] for row in of_heads])  # [Hq, S, 2, D]
        right, right_lse = naive(query[request], read[:, :, 0], read[:, :, 1], scale, softmax)
        torch.testing.assert_close(output[request].double(), right, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        torch.testing.assert_close(lse[request].double(), right_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_pages(kernel: str) -> None:
    query, arena = rand(2, 4, 32, seed=0), rand(5 * 8 * 2, 2, 32, seed=1)  # pages of 8 tokens, 2 KV heads
    pages, lengths = torch.tensor([[3, 1], [4, 2]], device=DEVICE), torch.tensor([13, 8], device=DEVICE)
    by_page = arena.view(5, 8, 2, 2, 32)
    if kernel == "reference":
        output, _ = paged_attention_reference(query, by_page, pages, lengths, 0.5, 1.5, tile=5)
    else:
        triton = pytest.importorskip("specontext.kernels.triton.paged_attention")
        output, _ = triton.paged_attention(query, arena, pages, lengths, 0.5, 1.5, page_size=8, kv_heads=2)
    for request, length in enumerate(lengths.tolist()):
        tokens = by_page[pages[request]].flatten(0, 1)[:length].repeat_interleave(2, 1)  # [S, Hq, 2, D]
        right, _ = naive(query[request], tokens[:, :, 0].transpose(0, 1), tokens[:, :, 1].transpose(0, 1), 0.5, Softmax(1.5))
        torch.testing.assert_close(output[request].double(), right, rtol=1e-5, atol=1e-5)


def test_requests_without_tokens_where_the_host_knows_no_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where all requests of a tile are taken to reach its end."""
    monkeypatch.setattr(paged, "of_like_width", lambda counts, width: [(range(len(counts)), width)])
    monkeypatch.setattr(fused_attention, "FLASH_ON_CPU", False)
    query, by_page = rand(3, 4, 32, seed=0), rand(5, 8, 2, 2, 32, seed=1)
    pages, lengths = torch.tensor([[3, 1], [4, 2], [0, 0]], device=DEVICE), torch.tensor([13, 8, 0], device=DEVICE)
    output, lse = paged_attention_reference(query, by_page, pages, lengths, 0.5, tile=5)
    assert not output[2].any() and torch.equal(lse[2], torch.full_like(lse[2], -torch.inf))
    alone, _ = paged_attention_reference(query[:2], by_page, pages[:2], lengths[:2], 0.5, tile=5)
    torch.testing.assert_close(output[:2], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("way", ["causal", "tiles", "window"])
def test_chunks(dtype: torch.dtype, which: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specontext.kernels.fused_attention.MOST_LOGITS", 500)
    softmax, size = softmaxes(6)[which], 9 if way == "window" else 1000
    before = 0 if way == "causal" else 25
    query, tokens = rand(20, 6, 32, dtype=dtype, seed=0), rand(before + 20, 2, 2, 32, dtype=dtype, seed=1)
    key, value = tokens[before:].unbind(2)
    if way == "causal":
        output = causal_attention(query, key, value, 0.6, softmax)
    elif way == "window":
        output = window_attention(query, *tokens.unbind(2), 0.6, Window(size), 0, softmax)
    else:
        attention = ChunkAttention(query, key, value, 0.6, softmax)
        attention.add(tokens[:16])
        attention.add(tokens[16:before])
        output = attention.result()
    assert output.dtype == dtype
    for i in range(20):
        seen = tokens[max(0, before + i + 1 - size) : before + i + 1].repeat_interleave(3, 1).transpose(0, 1)
        right, _ = naive(query[i], seen[:, :, 0], seen[:, :, 1], 0.6, softmax)
        torch.testing.assert_close(output[i].double(), right, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])

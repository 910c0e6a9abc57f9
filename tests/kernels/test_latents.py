"""Attention in latent space, and to keys and values that are made of latents, are one attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specontext.kernels.dense_attention import chunk_attention
from specontext.kernels.latents import Latents, made_attention
from specontext.kernels.softmax import Softmax

# T, Hq, rank, rotated, nope, V
SHAPES = [(1, 1, 16, 4, 8, 8), (7, 3, 20, 6, 10, 5), (33, 5, 32, 8, 16, 24)]


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize(("tokens", "heads", "rank", "rotated", "nope", "value"), SHAPES)
def test_both_forms_are_the_attention_of_expanded_heads(
    tokens: int, heads: int, rank: int, rotated: int, nope: int, value: int, cap: float | None, dtype: torch.dtype
) -> None:
    a, b = rand(heads, nope, rank, seed=0), rand(heads, value, rank, seed=1)
    rows, query = rand(tokens + 9, 1, rank + rotated, seed=2), rand(tokens, heads, nope + rotated, seed=3)
    latent, turned = rows[:, 0, :rank], rows[:, 0, rank:]
    keys = torch.cat((torch.einsum("hnr,tr->thn", a, latent), turned[:, None].expand(-1, heads, -1)), -1)
    values = torch.einsum("hvr,tr->thv", b, latent)
    logits = torch.einsum("chk,thk->hct", query, keys) * 0.3
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    seen = torch.arange(tokens + 9) <= torch.arange(tokens)[:, None] + 9
    right = torch.einsum("hct,thv->chv", logits.masked_fill(~seen, -torch.inf).softmax(-1), values)

    latents, given = Latents(a.to(dtype), b.to(dtype)), (query.to(dtype), rows.to(dtype))
    made = latents.made(given[1])
    torch.testing.assert_close(made[:, :, 0].double(), keys, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made[:, :, 1, :value].double(), values, atol=1e-5, rtol=1e-5)
    assert not made[:, :, 1, value:].any()
    softmax = Softmax(cap)

    def to_rows(absorbed: Tensor) -> Tensor:
        attention = chunk_attention(absorbed, given[1][9:], given[1][9:], 0.3, softmax)
        attention.add(given[1][:9, :, None])
        return attention.result()

    torch.testing.assert_close(latents.attention(given[0], to_rows).double(), right, atol=2e-5, rtol=1e-5)
    attention = chunk_attention(given[0], *made[9:].unbind(2), 0.3, softmax)
    attention.add(latents.made(given[1][:9, :, None]))
    torch.testing.assert_close(attention.result()[..., :value].double(), right, atol=2e-5, rtol=1e-5)
    alone = made_attention(latents, given[0], given[1][:tokens], 0.3, softmax)
    beginning = torch.einsum(
        "hct,thv->chv",
        logits[:, :, :tokens].masked_fill(~(torch.arange(tokens) <= torch.arange(tokens)[:, None]), -torch.inf).softmax(-1),
        values[:tokens],
    )
    torch.testing.assert_close(alone.double(), beginning, atol=2e-5, rtol=1e-5)


def test_keys_and_values_are_made_for_many_queries() -> None:
    """With DeepSeek-V3's sizes from 158 queries on: 832 operations more for each pair, and 131,072 for making a token's."""
    latents = Latents(torch.empty(2, 128, 512), torch.empty(2, 128, 512))
    assert not latents.making_pays(157, 576) and latents.making_pays(158, 576)

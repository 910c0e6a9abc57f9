"""Packed masks over logits, in Triton and in PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specontext.kernels import token_masks as dispatched
from specontext.kernels.dispatch import reference_of
from specontext.kernels.triton import token_masks as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EACH = pytest.mark.parametrize(
    "mask_tokens", [kernels.mask_tokens, reference_of(dispatched.mask_tokens)], ids=["triton", "torch"]
)


@EACH
@pytest.mark.parametrize("size", [1, 31, 32, 33, 300])
@pytest.mark.parametrize("rows", [[0, 1, 2], [1], [0, 2], []])
def test_only_tokens_that_are_not_allowed_lose_their_logits(
    mask_tokens: Any, size: int, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 64)
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(3, size, generator=generator)
    allowed = torch.rand(len(rows), size, generator=generator) < 0.5
    words = -(-size // 32) + 1  # vocabularies of tokenizers may be larger than the model's
    masks = torch.zeros(len(rows), words, dtype=torch.int64)
    for number, token in allowed.nonzero().tolist():
        masks[number, token // 32] |= 1 << token % 32
    expected = logits.clone()
    for number, row in enumerate(rows):
        expected[row, ~allowed[number]] = -torch.inf
    found = logits.to(DEVICE)
    mask_tokens(found, masks.to(torch.int32).to(DEVICE), rows)
    assert torch.equal(found.cpu(), expected)

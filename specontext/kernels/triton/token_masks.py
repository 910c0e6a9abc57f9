# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Packed masks over logits: one launch for all rows that have one, and writes where a token is not allowed alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from specontext.kernels.dispatch import upload

BLOCK = 4096  # tokens of a program


def mask_tokens(logits: Tensor, masks: Tensor, rows: Sequence[int]) -> None:
    """See `specontext.kernels.token_masks.mask_tokens`. Reads a bit a token, writes the logits of those not allowed."""
    assert logits.is_contiguous() and masks.is_contiguous() and masks.dtype == torch.int32
    size = logits.shape[1]
    assert masks.shape[1] * 32 >= size
    if rows:
        index = upload(rows, torch.int64, logits.device)
        _mask[(len(rows), triton.cdiv(size, BLOCK))](logits, masks, index, size, masks.shape[1], BLOCK=BLOCK)


@triton.jit
def _mask(logits, masks, rows, size, words, BLOCK: tl.constexpr):
    number = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + number)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(masks + number * words + token // 32, mask=token < size, other=-1)
    forbidden = ((word >> (token % 32)) & 1) == 0
    tl.store(logits + row * size + token, float("-inf"), mask=forbidden & (token < size))

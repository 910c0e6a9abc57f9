"""Tokens that may not come next: packed masks over logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from specontext.kernels.dispatch import operation, upload

# What each byte of a mask adds to the logits of its eight tokens: looking them up takes a third of the time of unpacking bits.
_ADDED = numpy.where(numpy.unpackbits(numpy.arange(256, dtype=numpy.uint8)[:, None], axis=1, bitorder="little"), 0.0, -math.inf)
_ADDED = _ADDED.astype(numpy.float32)  # [256, 8]


@operation(decided_by="logits")
def mask_tokens(logits: Tensor, masks: Tensor, rows: Sequence[int]) -> None:
    """Set the logits of tokens that are not allowed to minus infinity; rows without a mask are not touched.

    Args:
        logits: floating [R, V], contiguous; written in place. What comes of infinite ones is not said.
        masks: int32 [M, words], bit t % 32 of word t // 32 says whether token t is allowed; at least V bits a row.
        rows: row of the logits that each mask is for, ascending, each once.
    """
    added = _added(masks)[:, : logits.shape[1]]
    if len(rows) == len(logits):
        logits.add_(added)
    else:
        logits.index_add_(0, upload(rows, torch.int64, logits.device), added.to(logits.dtype))


def _added(masks: Tensor) -> Tensor:
    """0 for allowed tokens and minus infinity for others, float32 [M, 32 * words]."""
    if masks.device.type == "cpu":
        return torch.from_numpy(_ADDED.take(masks.numpy().view(numpy.uint8), axis=0)).flatten(1)
    places = torch.arange(32, dtype=torch.int32, device=masks.device)
    allowed = ((masks.unsqueeze(2) >> places) & 1).flatten(1).bool()
    return torch.zeros(allowed.shape, device=masks.device).masked_fill_(~allowed, -math.inf)

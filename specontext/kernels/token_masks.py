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
    logits.copy_(with_masks(logits, expanded(masks), rows))


def with_masks(logits: Tensor, added: Tensor, rows: Sequence[int]) -> Tensor:
    """What `mask_tokens` makes of logits, in memory of its own, from masks that are expanded: float32 [M, at least V]."""
    added = added[:, : logits.shape[1]]
    if len(rows) == len(logits):
        return logits + added
    return logits.index_add(0, upload(rows, torch.int64, logits.device), added.to(logits.dtype))


def expanded(masks: Tensor, out: Tensor | None = None) -> Tensor:
    """0 for allowed tokens and minus infinity for others, float32 [M, 32 * words].

    Args:
        out: of that shape, on a CPU: it is written instead of new memory.
    """
    if masks.device.type == "cpu":
        found = torch.empty((len(masks), 32 * masks.shape[1]), dtype=torch.float32) if out is None else out
        octets = masks.numpy().view(numpy.uint8)
        _ADDED.take(octets, axis=0, out=found.numpy().reshape(*octets.shape, 8), mode="clip")
        return found
    places = torch.arange(32, dtype=torch.int32, device=masks.device)
    allowed = ((masks.unsqueeze(2) >> places) & 1).flatten(1).bool()
    return torch.zeros(allowed.shape, dtype=torch.float32, device=masks.device).masked_fill_(~allowed, -math.inf)

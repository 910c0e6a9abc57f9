"""The head map: which retrieval group every KV head of the target reads.

Nothing in a draft's training ties its head h to the target's head h, so the map is measured. At run time it only changes which
group's selection a KV head reads; selections and load plans stay one for each group.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from specontext.errors import HeadError
from specontext.retrieval.head import RetrievalHead


def band_map(layers: int, kv_heads: int, bands: int) -> tuple[tuple[int, ...], ...]:
    """The map of a head with `bands` groups for each KV head: group kv_head * bands + band serves it in a band of layers.

    Bands are neighbouring layers, as many in each as can be.

    Raises:
        HeadError: more bands than layers, or none.
    """
    if not 1 <= bands <= layers:
        raise HeadError(f"{layers} layers do not divide into {bands} bands: choose from 1 to {layers}")
    return tuple(tuple(head * bands + layer * bands // layers for head in range(kv_heads)) for layer in range(layers))


def best_map(coverage: Tensor) -> tuple[tuple[int, ...], ...]:
    """The group that covers each KV head best; the head's own number wins ties.

    Args:
        coverage: [L, Hkv, G], the attention recall of KV head h of layer l when it reads group g.
    """
    layers, kv_heads, groups = coverage.shape
    best = coverage.argmax(-1)
    if kv_heads == groups:
        own = torch.arange(kv_heads, device=coverage.device).expand(layers, -1)
        tied = coverage.gather(-1, own[..., None])[..., 0] >= coverage.amax(-1)
        best = torch.where(tied, own, best)
    return tuple(tuple(row) for row in best.tolist())


def with_map(head: RetrievalHead, head_map: tuple[tuple[int, ...], ...] | None) -> RetrievalHead:
    """The same head, sharing its weights, with another head map."""
    other = copy.copy(head)
    other._buffers = {name: None if buffer is None else buffer.clone() for name, buffer in head._buffers.items()}  # its own RoPE
    other.config = replace(head.config, head_map=head_map)
    return other

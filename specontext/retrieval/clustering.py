"""k-means by cosine similarity, the same result for the same keys."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

ITERATIONS = 10  # at most
TILE_BYTES = 64 << 20  # of similarities that are computed at a time


def cosine_clusters(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cluster keys by their directions.

    The first means are evenly spaced keys. Keys go to the mean they are most similar to, the first of equal ones; a mean
    that no key is nearest to stays what it was. It ends when no key moves, or after 10 rounds.

    Args:
        keys: float32 [H, n, D], clustered for each H by itself.
        count: number of clusters, at most n.

    Returns:
        float32 [H, count, D], the means of the keys of each cluster, and int64 [H, n], the cluster of each key.
    """
    total = keys.shape[1]
    means = keys[:, torch.arange(count, device=keys.device) * total // count]
    unit = normalize(keys, dim=-1)
    numbers = _nearest(unit, means)
    for _ in range(ITERATIONS):
        means = _means(keys, numbers, means)
        moved = _nearest(unit, means)
        if torch.equal(moved, numbers):
            break
        numbers = moved
    return _means(keys, numbers, means), numbers


def _tile(keys: Tensor, count: int) -> int:
    """Keys that are compared with `count` means at a time."""
    return max(1, TILE_BYTES // (4 * len(keys) * count))


def _nearest(unit: Tensor, means: Tensor) -> Tensor:
    """The mean that each key of length 1 is most similar to: int64 [H, n]."""
    directions, tile = normalize(means, dim=-1).mT, _tile(unit, means.shape[1])
    return torch.cat([(unit[:, at : at + tile] @ directions).argmax(-1) for at in range(0, unit.shape[1], tile)], dim=1)


def _means(keys: Tensor, numbers: Tensor, before: Tensor) -> Tensor:
    """Means of the keys of each cluster, by products, whose sums have a fixed order on a GPU too: float32 [H, count, D]."""
    count, tile = before.shape[1], _tile(keys, before.shape[1])
    number = torch.arange(count, device=keys.device)[:, None]
    sums, sizes = torch.zeros_like(before), torch.zeros_like(before[..., :1])
    for at in range(0, keys.shape[1], tile):
        members = (numbers[:, None, at : at + tile] == number).float()  # [H, count, tile]
        sums += members @ keys[:, at : at + tile]
        sizes += members.sum(-1, keepdim=True)
    return torch.where(sizes > 0, sums / sizes.clamp(min=1), before)

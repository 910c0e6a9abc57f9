"""Attention distillation: a retrieval head learns which tokens its target attends to.

Teacher of retrieval group g at query t: the target's attention probabilities, pooled over the query heads of each KV head that
reads g, then over these KV heads and all layers: their maximum, which keeps what a single layer looks up, or their mean. Sinks
and the recent window are kept whatever the head says, so both distributions are restricted to the tokens between them, and every
query counts by the teacher's mass there.
Shapes: N sequences, S tokens, Q sampled queries, L layers, Hq query heads, G groups, D head dim.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from specontext.distill.target import Observation, grouped_scores
from specontext.retrieval.head import RetrievalHead
from specontext.retrieval.head_config import HeadConfig

LOWEST = -1e30  # a finite stand-in for -inf: rows without any candidate stay free of NaN
Pool = Literal["max", "mean"]
HeadMap = tuple[tuple[int, ...], ...]


def map_of(config: HeadConfig, layers: int, kv_heads: int) -> HeadMap:
    """The head's own map, or the identity."""
    return config.head_map or tuple(tuple(range(kv_heads)) for _ in range(layers))


def pooled(weights: Tensor, groups: int, how: Pool) -> Tensor:
    """Weights [..., Hq, Q, S] pooled over the query heads of each group: [..., G, Q, S]."""
    split = weights.unflatten(-3, (groups, -1))
    return split.amax(-3) if how == "max" else split.mean(-3)


class Teacher:
    """Pools the target's attention, layer after layer, for each retrieval group; a listener of `Target.observe`.

    Args:
        how: over the query heads of a KV head.
        layers: over the layers and KV heads that read a group.
    """

    def __init__(self, head_map: HeadMap, groups: int, how: Pool = "max", layers: Pool = "mean") -> None:
        self.head_map, self.groups, self.how, self.layers = head_map, groups, how, layers
        self._sums: list[Tensor | None] = [None] * groups
        self._counts = [1] * groups

    def __call__(self, layer: int, weights: Tensor) -> None:
        row = self.head_map[layer]
        for kv_head, each in enumerate(pooled(weights, len(row), self.how).unbind(-3)):
            group = row[kv_head]
            so_far = self._sums[group]
            if so_far is None:
                self._sums[group] = each.clone()
            elif self.layers == "mean":
                so_far.add_(each)
                self._counts[group] += 1
            else:
                torch.maximum(so_far, each, out=so_far)

    @property
    def weights(self) -> Tensor:
        """float32 [N, G, Q, S]; zero for a group that no KV head reads."""
        some = next(total for total in self._sums if total is not None)
        means = [
            torch.zeros_like(some) if total is None else total / count
            for total, count in zip(self._sums, self._counts, strict=True)
        ]
        return torch.stack(means, dim=-3)


def head_log_weights(head: RetrievalHead, seen: Observation, rows: Tensor, far: Tensor, pool: Pool = "max") -> Tensor:
    """Log of the head's weights among `far` [N, 1, Q, S], pooled over each group up to a constant: float32 [N, G, Q, S]."""
    config = head.config
    positions = torch.arange(seen.embeddings.shape[1], device=rows.device)
    features = seen.features if config.variant == "features" else None
    queries, keys = head(seen.embedded(head), features, positions, rows)
    scores = grouped_scores(queries.transpose(1, 2), keys.transpose(1, 2)).float() / math.sqrt(config.head_dim)
    split = scores.masked_fill(~far, LOWEST).log_softmax(-1).unflatten(1, (config.kv_heads, -1))
    return split.amax(2) if pool == "max" else split.logsumexp(2)


def attention_loss(student: Tensor, teacher: Tensor, far: Tensor, real: Tensor) -> Tensor:
    """KL(teacher || student) over the candidates, averaged over queries by the teacher's mass among them.

    Args:
        student: log weights [N, G, Q, S]; teacher: weights [N, G, Q, S]; both are renormalised here.
        far: bool [N, 1, Q, S], the candidates; real: bool [N, Q], the queries that count.
    """
    teacher = teacher * far
    mass = teacher.sum(-1)
    wanted = teacher / mass[..., None].clamp_min(1e-9)
    divergence = torch.xlogy(wanted, wanted).sum(-1) - (wanted * student.log_softmax(-1)).sum(-1)
    weight = mass * real[:, None]
    return (weight * divergence).sum() / weight.sum().clamp_min(1e-9)

"""Calibrate a head on text: the head map, and its RoPE base, by measured attention recall."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specontext.distill.attention import HeadMap, head_log_weights
from specontext.distill.queries import candidates, sample_rows, scored
from specontext.distill.recall import Coverage, keep
from specontext.distill.target import Target
from specontext.retrieval.head import RetrievalHead
from specontext.retrieval.head_map import best_map


@dataclass(frozen=True)
class Calibration:
    """What a RoPE base reaches.

    Attributes:
        theta: RoPE base.
        coverage: float64 [L, Hkv, G], attention recall of KV head h of layer l when it reads group g.
    """

    theta: float
    coverage: Tensor

    @property
    def head_map(self) -> HeadMap:
        return best_map(self.coverage)

    @property
    def recall(self) -> float:
        """Mean recall with the best map."""
        return self.coverage.amax(-1).mean().item()

    @property
    def identity_recall(self) -> float | None:
        """Mean recall when head h reads group h; None where the numbers of heads differ."""
        _, kv_heads, groups = self.coverage.shape
        return self.coverage.diagonal(dim1=1, dim2=2).mean().item() if kv_heads == groups else None


def calibrate(
    head: RetrievalHead,
    target: Target,
    batches: Iterable[tuple[Tensor, Tensor]],
    budget: int,
    *,
    thetas: Sequence[float] = (),
    queries: int = 64,
    sink: int = 4,
    recent: int = 16,
    seed: int = 0,
) -> list[Calibration]:
    """Measure every retrieval group against every KV head, for each RoPE base.

    The head's RoPE is as it was when this returns.

    Args:
        batches: token ids [N, S] and the mask [N, S] of positions whose next token the model has to say.
        budget: tokens that a selection keeps, sinks and recent ones among them.
        thetas: RoPE bases to try; none means the head's own.

    Raises:
        ConfigError: a budget that leaves nothing to choose.
    """
    own, factor = head.config.rope_theta, head.yarn_factor
    tried = list(dict.fromkeys(thetas)) or [own]
    groups, count = head.config.kv_heads, scored(budget, sink, recent)
    coverages = {theta: Coverage(target.layers, target.groups) for theta in tried}
    generator = torch.Generator().manual_seed(seed)
    try:
        for batch in batches:
            ids, wanted = (tensor.to(target.device) for tensor in batch)
            rows, real = sample_rows(wanted, queries, 0.0, generator)
            far, always = candidates(rows, ids.shape[1], sink, recent)
            seen = target.observe(ids)
            counts = {str(group): count for group in range(groups)}
            for theta, coverage in coverages.items():
                head.set_rope(theta=theta, yarn_factor=factor)
                with torch.no_grad():
                    kept = keep(head_log_weights(head, seen, rows, far).exp(), far, always, count)
                selections = {str(group): (kept[:, [group]], None) for group in range(groups)}
                coverage.watch(selections, counts=counts, far=far, always=always, real=real)
            target.observe(ids, rows, *coverages.values())
    finally:
        head.set_rope(theta=own, yarn_factor=factor)
    return [
        Calibration(theta, torch.stack([c.recall[str(group)] for group in range(groups)], -1) / max(1, c.queries))
        for theta, c in coverages.items()
    ]

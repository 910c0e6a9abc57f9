"""What a selection covers of the target's true attention: attention recall and hit rate, for every layer and KV head.

Recall is the mass of a head's attention probabilities that the kept tokens hold. Hit rate is the share of the tokens that the
layer's own attention would choose (oracle top-k at the same budget, sinks and recent tokens left out) that are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specontext.distill.attention import HeadMap, Teacher, head_log_weights, map_of, pooled
from specontext.distill.queries import candidates, sample_rows, scored
from specontext.distill.target import Target
from specontext.kernels.top_k import choose
from specontext.retrieval.head import RetrievalHead


def keep(scores: Tensor, far: Tensor, always: Tensor, count: int, granularity: str = "head") -> Tensor:
    """The tokens that a selection reads: `always`, and `count` candidates chosen as the engine chooses them.

    Args:
        scores: weights [N, G, Q, S], none negative; far, always: bool [N, 1, Q, S].

    Returns:
        bool [N, G or 1, Q, S].
    """
    weights = torch.where(far, scores.float(), -1.0)
    chosen = choose(weights.transpose(1, 2), granularity, count).transpose(1, 2)  # [N, G', Q, count]
    span = scores.shape[-1]
    mask = torch.zeros((*chosen.shape[:3], span + 1), dtype=torch.bool, device=scores.device)
    mask.scatter_(-1, torch.where(chosen >= 0, chosen, span), True)
    return mask[..., :span] | always


@dataclass
class Coverage:
    """Sums over the queries seen so far; a listener of `Target.observe`, once `watch` has said what to judge.

    Attributes:
        recall, hits: float64 [L, Hkv] by the name of a selection, summed over queries.
        queries: number of queries in these sums.
    """

    layers: int
    kv_heads: int
    recall: dict[str, Tensor] = field(default_factory=dict)
    hits: dict[str, Tensor] = field(default_factory=dict)
    queries: int = 0

    def watch(
        self,
        selections: Mapping[str, tuple[Tensor, HeadMap | None]],
        *,
        counts: Mapping[str, int],
        far: Tensor,
        always: Tensor,
        real: Tensor,
        oracle: str | None = None,
    ) -> None:
        """Judge these selections in the passes to come.

        Args:
            selections: by name, kept tokens bool [N, G', Q, S] and the group that each layer's KV heads read (None where G' is
                1 or the KV heads' own).
            counts: by name, how many tokens were chosen by score; the layer's own best tokens are taken at the same number.
            real: bool [N, Q], the queries that count.
            oracle: also judge each layer's own best tokens, under this name and a slash and the count.
        """
        self._selections, self._counts, self._oracle = selections, counts, oracle
        self._far, self._always, self._real = far, always, real
        self.queries += int(real.sum())

    def __call__(self, layer: int, weights: Tensor) -> None:
        own = pooled(weights, self.kv_heads, "max")
        best = {count: keep(own, self._far, self._always, count) for count in sorted(set(self._counts.values()))}
        far = self._far & self._real[:, None, :, None]
        for name, (mask, head_map) in self._selections.items():
            kept = mask[:, list(head_map[layer])] if head_map is not None else mask.expand_as(own)
            self._add(self.recall, name, layer, self._mass(weights, kept))
            oracle = best[self._counts[name]] & far
            share = (oracle & kept).sum(-1) / oracle.sum(-1).clamp_min(1)
            self._add(self.hits, name, layer, torch.where(oracle.any(-1), share, 1.0))
        if self._oracle is not None:
            for count, kept in best.items():
                self._add(self.recall, f"{self._oracle}/{count}", layer, self._mass(weights, kept))

    def _mass(self, weights: Tensor, kept: Tensor) -> Tensor:
        """Mean over a group's query heads of the mass that `kept` [N, Hkv, Q, S] holds: [N, Hkv, Q]."""
        each = weights.unflatten(1, (self.kv_heads, -1))
        return (each * kept[:, :, None]).sum(-1).mean(2)

    def _add(self, sums: dict[str, Tensor], name: str, layer: int, values: Tensor) -> None:
        """Add values [N, Hkv, Q] of the real queries."""
        total = sums.setdefault(name, torch.zeros(self.layers, self.kv_heads, dtype=torch.float64))
        total[layer] += (values * self._real[:, None]).double().sum((0, 2)).cpu()

    def mean_recall(self, name: str) -> float:
        return (self.recall[name].mean() / max(1, self.queries)).item()


def measure(
    head: RetrievalHead,
    target: Target,
    batches: Iterable[tuple[Tensor, Tensor]],
    budgets: Iterable[int],
    *,
    queries: int = 64,
    sink: int = 4,
    recent: int = 16,
    seed: int = 0,
) -> dict[int, dict[str, float]]:
    """Attention recall, mean over layers, heads and queries, of selections at equal budgets.

    Args:
        batches: token ids [N, S] and the mask [N, S] of positions whose next token the model has to say.
        budgets: tokens, sinks and recent ones among them.

    Returns:
        for every budget the recall of `head`, of `shared` (best single set by the mean of all layers), of `layer` (best set of
        each layer and KV head) and of `window` (sinks and recent tokens).
    """
    budgets = list(budgets)
    coverage = Coverage(target.layers, target.groups)
    generator = torch.Generator().manual_seed(seed)
    identity = tuple(tuple(range(target.groups)) for _ in range(target.layers))
    for batch in batches:
        ids, wanted = (tensor.to(target.device) for tensor in batch)
        rows, real = sample_rows(wanted, queries, 0.0, generator)
        far, always = candidates(rows, ids.shape[1], sink, recent)
        teacher = Teacher(identity, target.groups)
        seen = target.observe(ids, rows, teacher)
        with torch.no_grad():
            weights = head_log_weights(head, seen, rows, far).exp()
        selections: dict[str, tuple[Tensor, HeadMap | None]] = {}
        counts: dict[str, int] = {}
        for budget in budgets:
            count = scored(budget, sink, recent)
            selections[f"head/{count}"] = keep(weights, far, always, count), map_of(head.config, target.layers, target.groups)
            selections[f"shared/{count}"] = keep(teacher.weights, far, always, count), identity
            selections[f"window/{count}"] = candidates(rows, ids.shape[1], sink, budget - sink)[1], None
            counts |= {f"{name}/{count}": count for name in ("head", "shared", "window")}
        coverage.watch(selections, counts=counts, far=far, always=always, real=real, oracle="layer")
        target.observe(ids, rows, coverage)
    names = ("head", "shared", "layer", "window")
    return {b: {name: coverage.mean_recall(f"{name}/{b - sink - recent}") for name in names} for b in budgets}

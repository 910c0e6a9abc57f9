"""What the model loses with a selection: its output under the selection against its output with everything read.

The last tokens of held-out sequences are forced, as in the evaluation suite `fidelity`: everything before them is computed
densely, then each of them reads only what is selected for it, and the keys and values that the tokens after it find are those of
that sparse computation. Selections are made at all positions at once, from the features that dense attention gives; those of an
engine, which decodes one token after another, drift a little from them.

Shapes: N sequences, S tokens, Q positions, G retrieval groups, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specontext.distill.attention import HeadMap, Teacher, head_log_weights, map_of
from specontext.distill.effects import grouped
from specontext.distill.queries import candidates, scored
from specontext.distill.recall import keep
from specontext.distill.replay import Gates, Replay
from specontext.distill.target import Observation, Target
from specontext.retrieval.head import RetrievalHead

COMPARED = ("head", "shared", "window")


@dataclass(frozen=True)
class Loss:
    """What is lost with a selection, means over windows.

    Attributes:
        kl_divergence: KL(everything read || selection) in nats.
        perplexity_ratio: perplexity of the text under the selection over that with everything read.
        agreement: share of positions with the same most likely token.
    """

    kl_divergence: float
    perplexity_ratio: float
    agreement: float


@dataclass(eq=False)
class Losses:
    """Sums over windows by the name of a selection."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    windows: int = 0

    @torch.no_grad()
    def add(self, target: Target, seen: Observation, window: Window, selections: Mapping[str, Gates]) -> None:
        """Add sequences.

        Args:
            seen: with keys and values.
            selections: by name, what the KV heads of each layer read, bool [N, Hkv or 1, Q, S].
        """
        replay = Replay(target, seen, window.rows, chained=True)
        dense = replay.hidden()
        following = seen.ids.gather(1, window.rows + 1)
        self.windows += len(window.rows)
        for name, gates in selections.items():
            sparse = replay.hidden(gates)
            total = self.sums.setdefault(name, torch.zeros(3, dtype=torch.float64, device=dense.device))
            for n, real in enumerate(window.real):
                full, mine = target.logits(dense[n][real]), target.logits(sparse[n][real])
                found = measures(full, mine, following[n][real])
                found[:, 2] -= measures(full, full, following[n][real])[:, 2]
                total += found.mean(0)

    def mean(self, name: str) -> Loss:
        agreement, divergence, excess = (self.sums[name] / max(1, self.windows)).tolist()
        return Loss(divergence, math.exp(excess), agreement)


@dataclass(frozen=True, eq=False)
class Window:
    """The last positions of sequences.

    Attributes:
        rows: int64 [N, Q], one after another up to the last whose next token the model has to say.
        real: bool [N, Q], those whose next token it has to say.
    """

    rows: Tensor
    real: Tensor


def last_positions(ids: Tensor, wanted: Tensor, queries: int) -> tuple[Tensor, Window]:
    """The sequences that have `queries` positions up to the last wanted one, ids [M, S], and these positions."""
    place = torch.arange(ids.shape[1], device=ids.device)
    last = torch.where(wanted, place, -1).amax(1)
    long = last >= queries
    rows = last[long, None] - torch.arange(queries - 1, -1, -1, device=ids.device)
    return ids[long], Window(rows, wanted[long].gather(1, rows))


def measures(full: Tensor, logits: Tensor, target: Tensor | int) -> Tensor:
    """Agreement, KL(full || row) and cross-entropy of rows, float64 [R, 3].

    Args:
        full: logits of full attention, [V] for all rows or [R, V]; logits: [R, V]; target: the token that follows, int64 [R] or
            one for all.
    """
    expected, found = full.double().log_softmax(-1), logits.double().log_softmax(-1)
    same = logits.argmax(-1) == full.argmax(-1)
    divergence = torch.where(expected > -torch.inf, expected.exp() * (expected - found), 0.0).sum(-1)
    following = torch.as_tensor(target, device=logits.device).expand(logits.shape[:-1])
    return torch.stack((same.double(), divergence, -found.gather(-1, following[..., None])[..., 0]), dim=-1)


def measure_losses(
    head: RetrievalHead,
    target: Target,
    batches: Iterable[tuple[Tensor, Tensor]],
    budgets: Sequence[int],
    *,
    queries: int = 64,
    sink: int = 4,
    recent: int = 16,
    compared: Sequence[str] = COMPARED,
) -> dict[int, dict[str, Loss]]:
    """What the target loses with selections at equal budgets.

    Args:
        batches: token ids [N, S] and the mask [N, S] of positions whose next token the model has to say; sequences that have
            fewer than `queries` positions before the last such one are left out.
        budgets: tokens, sinks and recent ones among them.
        compared: `head`; `shared`, the best single set of each KV head by the mean attention of all layers; `window`, sinks and
            recent tokens.

    Returns:
        the losses by budget and selection; empty where no sequence was long enough.
    """
    losses = Losses()
    identity = tuple(tuple(range(target.groups)) for _ in range(target.layers))
    for batch in batches:
        all_ids, wanted = (tensor.to(target.device) for tensor in batch)
        ids, window = last_positions(all_ids, wanted, queries)
        if not len(ids):
            continue
        far, always = candidates(window.rows, ids.shape[1], sink, recent)
        teacher = Teacher(identity, target.groups)
        seen = target.observe(ids, window.rows, *([teacher] if "shared" in compared else []), keep=True)
        weights: dict[str, tuple[Tensor, HeadMap]] = {}
        if "head" in compared:
            with torch.no_grad():
                scores = head_log_weights(head, seen, window.rows, far).exp()
            weights["head"] = scores, map_of(head.config, target.layers, target.groups)
        if "shared" in compared:
            weights["shared"] = teacher.weights, identity
        selections: dict[str, Gates] = {}
        for budget in budgets:
            for name, (each, head_map) in weights.items():
                selections[f"{name}/{budget}"] = grouped(keep(each, far, always, scored(budget, sink, recent)), head_map)
            if "window" in compared:
                kept = candidates(window.rows, ids.shape[1], sink, budget - sink)[1]
                selections[f"window/{budget}"] = grouped(kept, None)
        losses.add(target, seen, window, selections)
    if not losses.windows:
        return {}
    return {budget: {name: losses.mean(f"{name}/{budget}") for name in compared} for budget in budgets}

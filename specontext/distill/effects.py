"""What a selection does to what the target says: the effect of single tokens, and selections inside the model.

The effect of a token on a query row is how much the log odds of what the model says there change with the token's weight in the
attention of all layers and KV heads that read a group: one gate, 1 for everything, multiplies its softmax terms in all of them,
and |d log odds(y) / d gate| is taken at y drawn from the model itself. So it weighs tokens by what their loss would do, where
attention weighs them by how much they are looked at. While y is one of many possible tokens this is the slope of log p(y), whose
mean square is the Fisher information of the gate and twice what a small change of it costs in KL divergence. Where the model is
sure, log p(y) is flat, though all may rest on one token: the odds are not.

Shapes: N sequences, S tokens, Q rows, G retrieval groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.distill.attention import HeadMap
from specontext.distill.recall import keep
from specontext.distill.replay import Gates, Replay, divergence, log_odds, sampled


def grouped(gates: Tensor | tuple[Tensor, ...], head_map: HeadMap | None) -> Gates:
    """Gates by layer from those of each group, [N, G, Q, S] or G tensors [N, Q, S]; no map: of all KV heads, or one for all."""
    if head_map is None:
        assert isinstance(gates, Tensor)
        return lambda layer: gates
    parts = gates.unbind(1) if isinstance(gates, Tensor) else gates
    return lambda layer: torch.stack([parts[group] for group in head_map[layer]], 1)


def token_effects(replay: Replay, head_map: HeadMap, groups: int, real: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
    """|d log odds(y) / d gate| of every token, and the states that the rows have when everything is read.

    Args:
        real: bool [N, Q], the rows that count.
        chance: [N, Q] in 0 .. 1, which decide the tokens y.

    Returns:
        float32 [N, G, Q, S], zero for a group that no KV head reads, and [N, Q, H].
    """
    shape, device = (*replay.rows.shape, replay.seen.ids.shape[1]), replay.rows.device
    with torch.enable_grad():
        gates = tuple(torch.ones(shape, dtype=torch.float32, device=device, requires_grad=True) for _ in range(groups))
        hidden = replay.hidden(grouped(gates, head_map))
        said = sampled(replay.target, hidden, chance)
        total = (log_odds(replay.target, hidden, said) * real).sum()
        changes = torch.autograd.grad(total, gates, materialize_grads=True)
    return torch.stack(changes, 1).abs(), hidden.detach()


def straight_through(weights: Tensor, far: Tensor, always: Tensor, count: int, temperature: float) -> Tensor:
    """Gates [N, G, Q, S] of the hard selection, whose gradient is that of a soft one around the selection's edge.

    Args:
        weights: log weights float32 [N, G, Q, S]; the `count` best candidates `far` are read, and `always` in any case.
        temperature: width of the soft edge in nats; the gradient is that of sigmoid((weight - least chosen one) / temperature).
    """
    scores = weights.detach()
    hard = keep(scores.exp(), far, always, count)
    edge = scores.masked_fill(~(hard & far), torch.inf).amin(-1, keepdim=True)
    soft = torch.sigmoid((weights - edge) / temperature)
    return hard.float() + torch.where(far, soft - soft.detach(), 0.0)


def selection_loss(replay: Replay, head_map: HeadMap, gates: Tensor, reference: Tensor, real: Tensor, highest: float) -> Tensor:
    """KL of what the model says with everything read against what it says with a selection, mean over the rows that count.

    Args:
        gates: [N, G, Q, S]; reference: [N, Q, H], states of the rows with everything read.
        highest: bound of one row's loss in nats, so that a few rows do not decide a step.
    """
    losses = divergence(replay.target, replay.hidden(grouped(gates, head_map)), reference).clamp(max=highest)
    return (losses * real).sum() / real.sum().clamp_min(1)

"""What methods have in common that drop entries for good."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.top_k import top_k_positions
from specontext.retrieval.selector import LaneTokens, LayerView
from specontext.retrieval.stateful import StatefulSelector

DROPPED = -1.0
TILE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # of attention weights that are computed at a time


class EvictingSelector(StatefulSelector):
    """Chooses by a table `scores`, float32 [Hkv, tokens] for each layer and seat, and marks as DROPPED what it has not chosen.

    So every choice is a part of the one before and of the tokens that have left the recent window since.
    """

    def choose(self, layer: int, lane: LaneTokens, view: LayerView, ends: Tensor) -> Tensor:
        table = self.tables["scores"][layer][:, :, : lane.span]
        scores = table.index_select(0, lane.seats)
        position = torch.arange(scores.shape[-1], device=scores.device)
        candidate = ((position >= self.budget.sink) & (position < ends[:, None]))[:, None]  # [R, 1, S]
        chosen = top_k_positions(torch.where(candidate, scores, DROPPED), self.budget.scored)
        kept = torch.zeros((*scores.shape[:2], scores.shape[-1] + 1), dtype=torch.bool, device=scores.device)
        kept.scatter_(-1, torch.where(chosen >= 0, chosen, scores.shape[-1]), True)  # the last column takes what is no token
        table.index_copy_(0, lane.seats, scores.masked_fill_(candidate & ~kept[..., :-1], DROPPED))
        return chosen


def chunk_weights(query: Tensor, keys: Tensor, start: int, scale: float, alive: Tensor | None = None) -> Tensor:
    """Sums of the causal attention weights of consecutive queries, of each the greatest in a group of query heads.

    Args:
        query: [T, Hq, D] at the positions start .. start + T - 1.
        keys: [S, Hkv, D] of the positions 0 .. S - 1, S = start + T.
        alive: bool [Hkv, S], entries that attention may read besides the queries' own; default all.

    Returns:
        float32 [Hkv, S].
    """
    heads, span = keys.shape[1], len(keys)
    keys = keys.float().permute(1, 2, 0)  # [Hkv, D, S]
    total = torch.zeros((heads, span), dtype=torch.float32, device=keys.device)
    tile = max(1, TILE_BYTES[keys.device.type] // (4 * query.shape[1] * span))
    for first in range(0, len(query), tile):
        part = (query[first : first + tile].float() * scale).unflatten(1, (heads, -1)).permute(1, 2, 0, 3)  # [Hkv, group, t, D]
        seen = start + first + part.shape[2]  # by the last of these queries
        logits = (part.flatten(1, 2) @ keys[..., :seen]).view(*part.shape[:3], seen)
        later = torch.ones(part.shape[2], part.shape[2], dtype=torch.bool, device=keys.device).triu(1)
        logits[..., start + first :].masked_fill_(later, -torch.inf)
        if alive is not None:
            logits.masked_fill_(~alive[:, None, None, :seen], -torch.inf)
        total[:, :seen] += torch.softmax(logits, dim=-1).amax(1).sum(1)
    return total

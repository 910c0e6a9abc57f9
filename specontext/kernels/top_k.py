"""Exact top-k of long rows in a reproducible order, the token sets that the scores of several groups become (paper, C1), and what
is read with them; and the most likely token of a row of logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specontext.kernels.dispatch import operation

ALWAYS = 1 << 62  # tokens: contexts of all lengths are read as far as they can be


@operation(decided_by="scores")
def top_k_positions(scores: Tensor, k: int) -> Tensor:
    """Positions of the k greatest scores of each row, ascending; equal scores are won by the later position.

    On a CPU, rows whose k-th and next scores differ, which is nearly all, need no pass over the row after `topk`: for 32 rows of
    32K scores and k = 1024 one core takes 12 ms instead of 20 to 30.

    Args:
        scores: float [..., S], no NaN; negative scores are never chosen, and -0.0 is equal to 0.0.
        k: at least 1.

    Returns:
        int64 [..., k], padded with -1 at the end where fewer than k scores are not negative.
    """
    if scores.device.type != "cpu":
        return _with_ties(scores, k)
    span = scores.shape[-1]
    values, positions = scores.topk(min(k + 1, span), dim=-1)
    taken, last = values[..., :k], values[..., k - 1 : k]
    chosen = torch.where(taken >= 0, positions[..., :k], span).sort(dim=-1).values
    chosen = torch.nn.functional.pad(chosen, (0, k - chosen.shape[-1]), value=span)
    chosen.masked_fill_(chosen == span, -1)
    if k < span:
        unsettled = ((last == values[..., k:]) & (last >= 0)).squeeze(-1)
        if unsettled.any():
            chosen[unsettled] = _with_ties(scores[unsettled], k)
    return chosen


def _with_ties(scores: Tensor, k: int) -> Tensor:
    """The same by passes over whole rows, which never ask the device for a number."""
    span = scores.shape[-1]
    taken = min(k, span)
    least = scores.topk(taken, dim=-1, sorted=True).values[..., -1:].clamp(min=0.0)
    above = scores > least
    equal = scores == least
    room = taken - above.sum(-1, keepdim=True)
    later = equal.flip(-1).cumsum(-1).flip(-1)  # how many equal scores stand here or later
    chosen = above | (equal & (later <= room))
    place = chosen.cumsum(-1) - 1
    out = scores.new_full((*scores.shape[:-1], k + 1), -1, dtype=torch.int64)
    position = torch.arange(span, device=scores.device).expand_as(place)
    # Positions that were not chosen all go to a column beyond the result.
    return out.scatter_(-1, torch.where(chosen, place, k), position)[..., :k]


def groups_of(granularity: str, groups: int) -> int:
    """Number of token sets that `choose` returns for scores of `groups` groups."""
    return groups if granularity == "head" else 1


def choose(scores: Tensor, granularity: str, k: int) -> Tensor:
    """The tokens of highest score.

    'head': the k best of every group. 'batch': the k best by the greatest score that any group gives. 'union': the best k' of
    every group, k' being the greatest share for which all of them together are at most k tokens; places that are left over
    go to tokens of rank k'.

    Args:
        scores: float [..., G, S]; negative scores are never chosen.

    Returns:
        int64 [..., groups_of(granularity, G), k], ascending positions, padded with -1 at the end.
    """
    if granularity == "head":
        return top_k_positions(scores, k)
    if granularity == "batch":
        return top_k_positions(scores.amax(-2, keepdim=True), k)
    best = top_k_by_rank(scores, k)
    return top_k_positions(best.amax(-2, keepdim=True), k)


def top_k_by_rank(scores: Tensor, k: int) -> Tensor:
    """k for the best token of each row, k - 1 for the next and so on, -1 for tokens beyond the k best.

    Args:
        scores: float [..., S]; among equal scores the later position ranks first, and negative ones are among no best.

    Returns:
        float32 [..., S].
    """
    span = scores.shape[-1]
    chosen = top_k_positions(scores, k).flip(-1)
    present = chosen >= 0
    # A stable sort of the few that were chosen, in reverse order, keeps the later of two equal scores first.
    best = torch.where(present, scores.gather(-1, chosen.clamp(min=0)), -1.0)
    order = chosen.gather(-1, best.argsort(dim=-1, descending=True, stable=True))
    value = torch.arange(k, 0, -1, device=scores.device, dtype=torch.float32).expand(order.shape)
    # What is not there goes to a column beyond the result.
    ranks = torch.full((*scores.shape[:-1], span + 1), -1.0, dtype=torch.float32, device=scores.device)
    return ranks.scatter_(-1, torch.where(order >= 0, order, span), value)[..., :span]


@operation(decided_by="lengths")
def selected_tokens(
    scored: Tensor, lengths: Tensor, ends: Tensor | None, *, sink: int, width: int, whole: int = 0
) -> tuple[Tensor, Tensor]:
    """Tokens that are read, and which of them were chosen by a score.

    Args:
        scored: int64 [R, G, K], ascending candidates, then -1 where there is none.
        lengths: int64 [R], tokens in context; 0 for padding.
        ends: int64 [R], the ends of the candidates, which begin behind the sinks; None: all tokens but the last `width`.
        sink: first tokens that are read in any case.
        width: tokens from the end of the candidates on that are, too, as far as there are.
        whole: of contexts of up to so many tokens the last K candidates are read, whatever was chosen.

    Returns:
        int64 [R, G, sink + K + width], each part ascending and then padded with -1; bool of the same shape.
    """
    device, (requests, groups, count) = lengths.device, scored.shape
    length = lengths[:, None]
    end = (length - width).clamp(min=sink) if ends is None else ends[:, None]
    if whole:
        window = (end - count).clamp(min=sink) + torch.arange(count, device=device)
        last = torch.where(window < end, window, -1)[:, None].expand(-1, groups, -1)
        scored = last if whole == ALWAYS else torch.where((length <= whole)[:, None], last, scored)
    sinks, recents = torch.arange(sink, device=device).expand(requests, -1), end + torch.arange(width, device=device)
    fixed = [torch.where(tokens < length, tokens, -1)[:, None].expand(-1, groups, -1) for tokens in (sinks, recents)]
    tokens = torch.cat((fixed[0], scored, fixed[1]), dim=-1)
    by_score = torch.zeros_like(tokens, dtype=torch.bool)
    by_score[..., sink : sink + count] = scored >= 0
    return tokens, by_score


@operation(decided_by="logits")
def best_tokens(logits: Tensor) -> Tensor:
    """The most likely token of each row, the lowest id among equals.

    Args:
        logits: floating [R, V], rows contiguous.

    Returns:
        int64 [3, R]: the token; whether a NaN or infinity breaks the row, and then it may be any; whether all logits are minus
        infinity.
    """
    logits = logits.float()
    token = logits.argmax(dim=1)
    best = logits.gather(1, token.unsqueeze(1)).squeeze(1)
    nothing, broken = best == -math.inf, ~(best < math.inf)  # what is no number is taken for the largest
    return torch.stack((token, broken.long(), nothing.long()))

"""Tokens by their logits: draws among the candidates that a request leaves.

Candidates are ranked by their logits, the lowest id first among equals. The mass of `top_p` is summed in integers, and random
numbers are hashes of (seed, output index, position, token id): neither the batch nor the order of a sum changes a token.

Shapes use R rows of logits, V vocabulary size, N draws, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specontext.kernels.counter_random import combine_keys, counter_uniform
from specontext.kernels.dispatch import operation, upload
from specontext.kernels.top_k import best_tokens

UNIT = 2.0**40  # mass of the most likely token
LEAST_TEMPERATURE = 1e-12
_NARROW = 256  # a row with top_k up to this is ranked only so far
_FEW = 1024  # so far a CPU ranks a row with top_p first: that is enough unless its distribution is flat
_CHUNK = 1 << 22  # float64 scores worked on at once, so that a full batch with a large vocabulary needs little memory
_LOW_32_BITS = (1 << 32) - 1


class Draw(NamedTuple):
    """How a token is drawn, and what its random numbers depend on.

    Attributes:
        row: of the logits, each once.
        temperature: above 0.
        min_p: candidates have at least this share of the greatest probability; 0 for all.
        top_p: candidates are the most likely ones that together have this share of the mass; 1 for all.
        top_k: candidates are so many of the most likely ones; 0 or below for all.
    """

    row: int
    temperature: float
    min_p: float
    top_p: float
    top_k: int
    seed: int
    output: int
    position: int

    @property
    def floor(self) -> float:
        """The least score of a candidate: its logit less the greatest, over the temperature."""
        return math.log(self.min_p) if self.min_p else -math.inf

    def numbers(self) -> tuple[float, float, float]:
        """Temperature, floor, top_p."""
        return max(self.temperature, LEAST_TEMPERATURE), self.floor, self.top_p

    def limit(self, vocab_size: int) -> int:
        """How many candidates there are at most."""
        return min(self.top_k, vocab_size) if self.top_k > 0 else vocab_size


@operation(decided_by="logits")
def draw_tokens(logits: Tensor, tokens: Tensor, draws: Sequence[Draw]) -> None:
    """Replace the most likely tokens of some rows by draws among their candidates.

    A draw is the candidate with the greatest sum of its score and Gumbel noise: a sample of their softmax.

    Args:
        logits: floating [R, V], rows contiguous.
        tokens: int64 [R], contiguous: the most likely token of every row; those of the draws' rows are written.
    """
    vocab_size = logits.shape[1]
    by_width: dict[int, list[Draw]] = {}
    for draw in draws:
        by_width.setdefault(_ranks_needed(draw, vocab_size, logits.device), []).append(draw)
    for width, members in by_width.items():
        for start in range(0, len(members), step := rows_at_once(vocab_size)):
            part = members[start : start + step]
            rows = upload([draw.row for draw in part], torch.int64, logits.device)
            tokens[rows] = _drawn(logits[rows].float(), part, width)


def choose_in_every_way(vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Choose tokens of a row with all limits, by logits as a model gives them and in float32: what compiles is compiled then."""
    for form in dict.fromkeys((dtype, torch.float32)):
        logits = torch.zeros((1, vocab_size), dtype=form, device=device)
        draw_tokens(logits, best_tokens(logits)[0], [Draw(0, 1.0, 0.0, 0.5, 1, 0, 0, 0)])


def _ranks_needed(draw: Draw, vocab_size: int, device: torch.device) -> int:
    """How many of the most likely tokens are put in order, 0 for none; whether few are enough only a CPU can ask at once."""
    limit = draw.limit(vocab_size)
    if limit < vocab_size and limit <= _NARROW:
        return min(_NARROW, vocab_size)
    if limit < vocab_size:
        return vocab_size
    if draw.top_p == 1:
        return 0
    return min(_FEW, vocab_size) if device.type == "cpu" else vocab_size


def _drawn(rows: Tensor, draws: Sequence[Draw], width: int) -> Tensor:
    """A token for each row of logits float32 [N, V], of which so many ranks are needed: int64 [N]."""
    device, vocab_size = rows.device, rows.shape[1]
    numbers = upload([draw.numbers() for draw in draws], torch.float64, device)
    temperature, floor, top_p = numbers.T.unsqueeze(2)  # each [N, 1]
    scores = rows.double().sub_(rows.amax(dim=1, keepdim=True)).div_(temperature)  # [N, V], at most 0
    scores.masked_fill_(scores < floor, -math.inf)
    if width:
        limits = [draw.limit(vocab_size) for draw in draws]
        limit = upload(limits, torch.int64, device).unsqueeze(1)  # [N, 1]
        ids = ranked(rows, width)  # [N, C]
        likely = scores.gather(1, ids).masked_fill_(torch.arange(width, device=device) >= limit, -math.inf)
        mass = _masses(likely)
        few = max(limits) > width
        scores, total = likely, (_masses(scores) if few else mass).sum(dim=1, keepdim=True)
        enough, reached = (top_p * total).ceil().long(), mass.cumsum(dim=1)
        if few and (reached[:, -1:] < enough).any():
            return _drawn(rows, draws, vocab_size)
        scores.masked_fill_((top_p < 1) & (reached - mass >= enough), -math.inf)
    else:
        ids = torch.arange(vocab_size, device=device).unsqueeze(0)  # [1, V]
    best = (scores + gumbel(_keys(draws, device), ids)).argmax(dim=1, keepdim=True)
    return ids.expand_as(scores).gather(1, best).squeeze(1)


def _masses(scores: Tensor) -> Tensor:
    """Integer shares of the mass for scores."""
    return scores.exp().mul_(UNIT).long()


def ranked(rows: Tensor, width: int) -> Tensor:
    """Ids [R, width] of the largest of `rows` float32 [R, V], descending, the lowest id first among equals."""
    bits = (rows + 0.0).view(torch.int32)  # adding zero turns -0.0 into 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # integers in the order of the floats
    ids = torch.arange(rows.shape[1], device=rows.device)
    keys = (ordered << 32) | (_LOW_32_BITS - ids)
    largest = keys.sort(dim=1, descending=True).values if width == rows.shape[1] else keys.topk(width, dim=1).values
    return _LOW_32_BITS - (largest & _LOW_32_BITS)


def _keys(draws: Sequence[Draw], device: torch.device) -> Tensor:
    """Key of the random numbers of each draw, int64 [N, 1]."""
    parts = upload([(draw.seed, draw.output, draw.position) for draw in draws], torch.int64, device)
    return combine_keys(parts.split(1, dim=1))


def gumbel(keys: Tensor, ids: Tensor) -> Tensor:
    """Gumbel noise, float64 [R, C], for keys [R, 1] and token ids [R or 1, C].

    The argmax of scores plus noise is a sample of their softmax.
    """
    return counter_uniform(keys, ids).neg_().log1p_().neg_().log_().neg_()


def rows_at_once(vocab_size: int) -> int:
    """How many rows of logits are worked on together."""
    return max(1, _CHUNK // vocab_size)

"""From logits to tokens: penalties, restrictions of the candidates and random numbers that only the request decides.

Everything a choice depends on is exact: candidates are ranked by unique integer keys, the mass of `top_p` is summed in integers
and random numbers are hashes of (seed, output index, position, token id). So neither the batch nor its order changes a token.

Shapes use R requests, V vocabulary size, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from specontext.core import Request
from specontext.engine.failures import NOBODYS, Failures
from specontext.engine.restrictions import restricted
from specontext.errors import LogitsError, NoTokenLeftError
from specontext.kernels.counter_random import combine_keys, counter_uniform
from specontext.kernels.dispatch import upload

_NARROW = 256  # a row with top_k up to this is ranked only so far
_CHUNK = 1 << 22  # float64 scores worked on at once, so that a full batch with a large vocabulary needs little memory
_LOW_32_BITS = (1 << 32) - 1


@dataclass(frozen=True)
class Sampled:
    """One token for each request; log-probabilities for those that asked for them."""

    token_ids: list[int]
    logprobs: list[dict[int, float] | None]


class NextToken(NamedTuple):
    """A request's next token; `row` is that of its logits."""

    row: int
    request: Request
    token: int
    logprobs: dict[int, float] | None


def next_tokens(
    logits: Tensor, ready: list[tuple[int, Request]], failures: Failures, *, end_token_ids: Collection[int]
) -> list[NextToken]:
    """Sample for (row of the logits, request) pairs; those for which no token can be chosen are among the failures.

    Args:
        logits: [requests, V]; rows of requests that are not ready are ignored.
    """
    try:
        return _draw(logits, ready, end_token_ids)
    except LogitsError as error:
        failures.add(error, *error.request_ids)
        left = [(row, request) for row, request in ready if request.request_id not in failures.found]
        return next_tokens(logits, left, failures, end_token_ids=end_token_ids)
    except NOBODYS:
        raise
    except Exception:
        # A row's token does not depend on the other rows, so each one alone tells whose the trouble is.
        found: list[NextToken] = []
        for pair in ready:
            with failures.of(pair[1].request_id):
                found += _draw(logits, [pair], end_token_ids)
        if not found and len(ready) > 1:
            raise
        return found


def _draw(logits: Tensor, ready: list[tuple[int, Request]], end_token_ids: Collection[int]) -> list[NextToken]:
    if not ready:
        return []
    if len(ready) < len(logits):
        logits = logits[upload([row for row, _ in ready], torch.int64, logits.device)]
    sampled = sample(logits, [request for _, request in ready], end_token_ids=end_token_ids)
    made = zip(sampled.token_ids, sampled.logprobs, strict=True)
    return [NextToken(*pair, *token) for pair, token in zip(ready, made, strict=True)]


@torch.no_grad()
def sample(logits: Tensor, requests: Sequence[Request], *, end_token_ids: Collection[int]) -> Sampled:
    """Chooses the next token of every request; meanings and order of the parameters are vLLM's.

    Args:
        logits: floating [R, V], row r belongs to requests[r]; not changed.
        end_token_ids: the model's end tokens, which `min_tokens` forbids.

    Raises:
        LogitsError: a row holds NaN or infinity, or nothing but minus infinity.
        NoTokenLeftError: a request allows no token.
    """
    if logits.dim() != 2 or len(logits) != len(requests):
        raise ValueError(f"logits must be [{len(requests)}, V], got {list(logits.shape)}")
    if not requests:
        return Sampled([], [])
    raw = logits.float()
    plain = all(request.params.plain for request in requests)
    adjusted = raw if plain else restricted(raw, requests, end_token_ids)
    chosen = adjusted.argmax(dim=1)  # [R], the lowest id among equals
    if not plain:
        _sample_random_rows(adjusted, requests, chosen)
    broken = ~raw.amax(dim=1).isfinite()
    stuck = ~adjusted.amax(dim=1).isfinite() if adjusted is not raw else broken
    token_ids, flags, ends = torch.stack((chosen, broken.long(), stuck.long())).tolist()
    if any(flags):
        raise LogitsError([request.request_id for request, flag in zip(requests, flags, strict=True) if flag])
    if any(ends):
        raise NoTokenLeftError([request.request_id for request, end in zip(requests, ends, strict=True) if end])
    return Sampled(token_ids, [None] * len(requests) if plain else _logprobs(raw, chosen, requests))


class Drawn:
    """Tokens of unrestricted requests that a device has chosen, on their way to the host.

    Args:
        logits: floating [R, V], row r belongs to requests[r]; they may be overwritten afterwards.

    Attributes:
        token_ids: int64 [R] on the device; anything where logits are broken.
    """

    def __init__(self, logits: Tensor, requests: Sequence[Request]) -> None:
        raw = logits.float()
        self.token_ids = raw.argmax(dim=1)
        _sample_random_rows(raw, requests, self.token_ids)
        found = torch.stack((self.token_ids, (~raw.amax(dim=1).isfinite()).long()))
        self._found = torch.empty(found.shape, dtype=found.dtype, pin_memory=found.is_cuda).copy_(found, non_blocking=True)
        self._copied = torch.cuda.current_stream(found.device).record_event() if found.is_cuda else None

    def read(self) -> tuple[list[int], list[bool]]:
        """The tokens, once the device has chosen them, and whose logits are broken."""
        if self._copied is not None:
            self._copied.synchronize()
        token_ids, broken = self._found.tolist()
        return token_ids, [bool(flag) for flag in broken]


def _sample_random_rows(adjusted: Tensor, requests: Sequence[Request], chosen: Tensor) -> None:
    """Overwrites in `chosen` [R] the tokens of the requests with a temperature."""
    vocab_size = adjusted.shape[1]
    by_width: dict[int, list[int]] = {}
    for row, request in enumerate(requests):
        if request.params.temperature > 0:
            by_width.setdefault(_ranks_needed(request, vocab_size), []).append(row)
    for width, members in by_width.items():
        for start in range(0, len(members), step := rows_at_once(vocab_size)):
            part = members[start : start + step]
            rows = upload(part, torch.int64, adjusted.device)
            chosen[rows] = _sample_rows(adjusted[rows], [requests[row] for row in part], width)


def _ranks_needed(request: Request, vocab_size: int) -> int:
    """How many of the most likely tokens must be put in order, 0 for none; a function of this request alone."""
    params = request.params
    if 0 < params.top_k <= _NARROW:
        return min(_NARROW, vocab_size)
    return vocab_size if params.top_p < 1 or 0 < params.top_k < vocab_size else 0


def _sample_rows(rows: Tensor, requests: Sequence[Request], width: int) -> Tensor:
    """Draws a token for each row of logits [R, V] among the `width` most likely ones, 0 meaning all. Returns int64 [R]."""
    device, vocab_size = rows.device, rows.shape[1]
    everyone = [request.params for request in requests]
    floors = [math.log(params.min_p) if params.min_p else -math.inf for params in everyone]
    numbers = [(max(p.temperature, 1e-12), floor, p.top_p) for p, floor in zip(everyone, floors, strict=True)]
    temperature, floor, top_p = upload(numbers, torch.float64, device).T.unsqueeze(2)  # each [R, 1]
    scores = rows.double().sub_(rows.amax(dim=1, keepdim=True)).div_(temperature)  # [R, V], at most 0
    if width:
        ids = _ranked(rows, width)  # [R, C]
        scores = scores.gather(1, ids)
    else:
        ids = torch.arange(vocab_size, device=device).unsqueeze(0)  # [1, V]
    scores.masked_fill_(scores < floor, -math.inf)
    if width:
        limits = [params.top_k or vocab_size for params in everyone]
        limit = upload([min(limit, vocab_size) for limit in limits], torch.int64, device).unsqueeze(1)  # [R, 1]
        scores.masked_fill_(torch.arange(width, device=device) >= limit, -math.inf)
        mass = (scores.exp() * 2.0**40).long()
        before = mass.cumsum(dim=1) - mass
        total = mass.sum(dim=1, keepdim=True)
        scores.masked_fill_((top_p < 1) & (before.double() >= top_p * total.double()), -math.inf)
    best = (scores + _gumbel(_keys(requests, device), ids)).argmax(dim=1, keepdim=True)
    return ids.expand_as(scores).gather(1, best).squeeze(1)


def _ranked(rows: Tensor, width: int) -> Tensor:
    """Ids [R, width] of the largest of `rows` float32 [R, V], descending, the lowest id first among equals."""
    bits = (rows + 0.0).view(torch.int32)  # adding zero turns -0.0 into 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # integers in the order of the floats
    ids = torch.arange(rows.shape[1], device=rows.device)
    keys = (ordered << 32) | (_LOW_32_BITS - ids)
    largest = keys.sort(dim=1, descending=True).values if width == rows.shape[1] else keys.topk(width, dim=1).values
    return _LOW_32_BITS - (largest & _LOW_32_BITS)


def _keys(requests: Sequence[Request], device: torch.device) -> Tensor:
    """Key of the random numbers of each request's next token, int64 [R, 1]."""
    numbers = [(request.seed, request.index, len(request.token_ids) + request.unread) for request in requests]
    parts = upload(numbers, torch.int64, device)
    return combine_keys(parts.split(1, dim=1))


def _gumbel(keys: Tensor, ids: Tensor) -> Tensor:
    """Gumbel noise, float64 [R, C], for keys [R, 1] and token ids [R or 1, C].

    The argmax of scores plus noise is a sample of their softmax.
    """
    return counter_uniform(keys, ids).neg_().log1p_().neg_().log_().neg_()


def rows_at_once(vocab_size: int) -> int:
    """How many rows of logits are worked on together."""
    return max(1, _CHUNK // vocab_size)


def ranked_logprobs(logits: Tensor, tokens: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a token and of the `width` most likely ones of each row.

    Args:
        logits: float32 [R, V].
        tokens: int64 [R].

    Returns:
        Ids, int64 [R, 1 + width], first those of `tokens`, and their log-probabilities, float32 of the same shape.
    """
    ids = torch.cat((tokens.unsqueeze(1), _ranked(logits, width)), dim=1) if width else tokens.unsqueeze(1)
    return ids, logits.log_softmax(dim=1).gather(1, ids)


def logprob_table(ids: Sequence[int], values: Sequence[float], top: int) -> dict[int, float]:
    """A row of `ranked_logprobs` by token id: the `top` most likely tokens, and the row's own."""
    table = dict(zip(ids[1 : 1 + top], values[1 : 1 + top], strict=True))
    table.setdefault(ids[0], values[0])  # not among the most likely, so it comes last
    return table


def _logprobs(raw: Tensor, chosen: Tensor, requests: Sequence[Request]) -> list[dict[int, float] | None]:
    """Log-probabilities of the chosen and the most likely tokens under the model itself: no temperature, no penalties."""
    found: list[dict[int, float] | None] = [None] * len(requests)
    vocab_size = raw.shape[1]
    wanted = {row: min(r.params.logprobs, vocab_size) for row, r in enumerate(requests) if r.params.logprobs is not None}
    members = list(wanted)
    for start in range(0, len(members), step := rows_at_once(vocab_size)):
        part = members[start : start + step]
        rows = torch.tensor(part, device=raw.device)
        ids, values = ranked_logprobs(raw[rows], chosen[rows], max(wanted[row] for row in part))
        for row, row_ids, row_values in zip(part, ids.tolist(), values.tolist(), strict=True):
            found[row] = logprob_table(row_ids, row_values, wanted[row])
    return found

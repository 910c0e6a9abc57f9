"""From logits to tokens: penalties, restrictions of the candidates and random numbers that only the request decides.

Everything a choice depends on is exact: candidates are ranked by unique integer keys, the mass of `top_p` is summed in integers
and random numbers are hashes of (seed, output index, position, token id). So neither the batch nor its order changes a token.

Shapes use R requests, V vocabulary size, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
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


class NextToken(NamedTuple):
    """A request's next token; `row` is that of its logits."""

    row: int
    request: Request
    token: int
    logprobs: dict[int, float] | None


def next_tokens(
    logits: Tensor, ready: Sequence[tuple[int, Request]], failures: Failures, *, end_token_ids: Collection[int]
) -> list[NextToken]:
    """Choose tokens for (row of the logits, request) pairs and wait for them; those for which none can be chosen are among the
    failures.

    Args:
        logits: [requests, V]; rows of requests that are not ready are ignored.
    """
    if not ready:
        return []
    try:
        return Drawn(logits, ready, end_token_ids).read(failures)
    except NOBODYS:
        raise
    except Exception:
        # A row's token does not depend on the other rows, so each one alone tells whose the trouble is.
        found: list[NextToken] = []
        for pair in ready:
            with failures.of(pair[1].request_id):
                found += Drawn(logits, [pair], end_token_ids).read(failures)
        if not found and len(ready) > 1:
            raise
        return found


class Drawn:
    """Tokens that a device chooses, on their way to the host; nothing here waits for it before `read`.

    Meanings and order of the sampling parameters are vLLM's.

    Args:
        logits: floating [requests, V]; not changed, and they may be overwritten afterwards.
        ready: (row of the logits, request) pairs. The host knows all of their tokens, where more than the logits decides.
        end_token_ids: the model's end tokens, which `min_tokens` forbids.

    Attributes:
        token_ids: int64 [ready requests] on the device; anything where logits are broken.
    """

    @torch.no_grad()
    def __init__(self, logits: Tensor, ready: Sequence[tuple[int, Request]], end_token_ids: Collection[int]) -> None:
        self.ready = ready
        requests = [request for _, request in ready]
        if len(ready) < len(logits):
            logits = logits[upload([row for row, _ in ready], torch.int64, logits.device)]
        raw = logits.float()
        free = all(request.params.unrestricted for request in requests)
        adjusted = raw if free else restricted(raw, requests, end_token_ids)
        self.token_ids = adjusted.argmax(dim=1)  # the lowest id among equals
        best = adjusted.gather(1, self.token_ids.unsqueeze(1)).squeeze(1)
        nothing, broken = best == -math.inf, ~(best < math.inf)  # what is no number is taken for the largest
        if not all(request.params.plain for request in requests):
            _sample_random_rows(adjusted, requests, self.token_ids)
        found = torch.stack((self.token_ids, broken.long(), nothing.long()))
        self._found = _on_its_way(found) if found.is_cuda else found
        self._ranked = [] if free else _ranked_tokens(raw, self.token_ids, requests)
        self._copied = torch.cuda.current_stream(found.device).record_event() if found.is_cuda else None

    def read(self, failures: Failures) -> list[NextToken]:
        """The tokens of those that have not ended meanwhile, once the device has chosen them; those whose logits are broken, or
        that allow no token, are among the failures."""
        if self._copied is not None:
            self._copied.synchronize()
        tables = {place: table for ranked in self._ranked for place, table in ranked.read()}
        found: list[NextToken] = []
        broken: list[str] = []
        stuck: list[str] = []
        for place, numbers in enumerate(zip(self.ready, *self._found.tolist(), strict=True)):
            (row, request), token, is_broken, nothing = numbers
            if request.finish_reason is not None:
                continue
            table = tables.get(place)
            if is_broken or (table is not None and math.isnan(table[token])):
                broken.append(request.request_id)
            elif nothing:
                (broken if request.params.unrestricted else stuck).append(request.request_id)
            else:
                found.append(NextToken(row, request, token, table))
        for error, names in ((LogitsError, broken), (NoTokenLeftError, stuck)):
            if names:
                failures.add(error(names), *names)
        return found


def _on_its_way(numbers: Tensor) -> Tensor:
    """A copy in the host's memory that is there once the device has come so far."""
    return torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=numbers.is_cuda).copy_(numbers, non_blocking=True)


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


class _Ranked(NamedTuple):
    """What `ranked_logprobs` found for some rows, on its way to the host: [rows, 1 + width] each.

    Attributes:
        wanted: of the most likely tokens, by place among the ready requests.
    """

    ids: Tensor
    values: Tensor
    wanted: dict[int, int]

    def read(self) -> Iterator[tuple[int, dict[int, float]]]:
        """The tables of these rows with their places."""
        for (place, top), ids, values in zip(self.wanted.items(), self.ids.tolist(), self.values.tolist(), strict=True):
            yield place, logprob_table(ids, values, top)


def _ranked_tokens(raw: Tensor, chosen: Tensor, requests: Sequence[Request]) -> list[_Ranked]:
    """The chosen and the most likely tokens of those who ask, under the model itself: no temperature, no penalties."""
    vocab_size = raw.shape[1]
    wanted = {row: min(r.params.logprobs, vocab_size) for row, r in enumerate(requests) if r.params.logprobs is not None}
    members, found = list(wanted), []
    for start in range(0, len(members), step := rows_at_once(vocab_size)):
        part = {row: wanted[row] for row in members[start : start + step]}
        rows = upload([*part], torch.int64, raw.device)
        ids, values = ranked_logprobs(raw[rows], chosen[rows], max(part.values()))
        found.append(_Ranked(_on_its_way(ids), _on_its_way(values), part))
    return found

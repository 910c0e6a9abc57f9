"""From logits to tokens: what requests ask of them, the choice on the device, and log-probabilities, on their way to the host.

Shapes use R requests, V vocabulary size.
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
from specontext.kernels.dispatch import upload
from specontext.kernels.token_choice import Draw, draw_tokens, ranked, rows_at_once
from specontext.kernels.top_k import best_tokens


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
        free = all(request.params.unrestricted for request in requests)
        raw = logits if free else logits.float()
        adjusted = raw if free else restricted(raw, requests, end_token_ids)
        found = best_tokens(adjusted)
        self.token_ids = found[0]
        draws = [
            Draw(
                row,
                p.temperature,
                p.min_p,
                p.top_p,
                p.top_k,
                request.seed,
                request.index,
                len(request.token_ids) + request.unread,
            )
            for row, request in enumerate(requests)
            if (p := request.params).temperature > 0
        ]
        if draws:
            draw_tokens(adjusted, self.token_ids, draws)
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


def ranked_logprobs(logits: Tensor, tokens: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a token and of the `width` most likely ones of each row.

    Args:
        logits: float32 [R, V].
        tokens: int64 [R].

    Returns:
        Ids, int64 [R, 1 + width], first those of `tokens`, and their log-probabilities, float32 of the same shape.
    """
    ids = torch.cat((tokens.unsqueeze(1), ranked(logits, width)), dim=1) if width else tokens.unsqueeze(1)
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

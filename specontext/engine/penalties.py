"""Penalties on tokens that a request has already, from a record that is kept up as tokens come.

A step looks at the new tokens only, and works on whole rows of logits on the device, all at once: it costs the same however long
the context.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specontext.core import Request
from specontext.kernels.dispatch import upload


def penalised(request: Request) -> bool:
    """Whether a request asks for any penalty."""
    params = request.params
    return params.repetition_penalty != 1.0 or bool(params.frequency_penalty or params.presence_penalty)


def penalise(logits: Tensor, requests: Sequence[Request]) -> None:
    """Apply the three penalties to the logits of requests that ask for any, float32 [P, V], in place."""
    histories = [_history(request, row) for request, row in zip(requests, logits, strict=True)]
    everyone = [request.params for request in requests]
    repeated = [place for place, history in enumerate(histories) if history.seen is not None]
    if repeated:
        factor = _column([everyone[place].repetition_penalty for place in repeated], logits)
        row, seen = _rows(logits, repeated), _stacked([histories[place].seen for place in repeated])
        changed = torch.where(row > 0, row / factor, row * factor)
        bounds = torch.finfo(row.dtype)  # or a very small penalty would leave infinities, among which nothing is likelier
        changed = torch.where(row.isfinite(), changed.clamp_(bounds.min, bounds.max), row)
        _put(logits, repeated, torch.where(seen, changed, row))
    counted = [place for place, history in enumerate(histories) if history.counts is not None]
    if counted:
        frequency, presence = (
            _column([getattr(everyone[place], name) for place in counted], logits)
            for name in ("frequency_penalty", "presence_penalty")
        )
        counts = _stacked([histories[place].counts for place in counted])
        _put(logits, counted, _rows(logits, counted) - (frequency * counts + presence * (counts > 0)))


def _history(request: Request, row: Tensor) -> _History:
    """What is remembered of a request's tokens, all of them."""
    if not isinstance(request.history, _History):
        request.history = _History(request, row)
    request.history.update(request)
    return request.history


def _column(numbers: Sequence[float], logits: Tensor) -> Tensor:
    return upload(numbers, logits.dtype, logits.device).unsqueeze(1)


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor:
    return torch.stack([tensor for tensor in tensors if tensor is not None])


def _rows(logits: Tensor, places: Sequence[int]) -> Tensor:
    return logits if len(places) == len(logits) else logits[upload(places, torch.int64, logits.device)]


def _put(logits: Tensor, places: Sequence[int], rows: Tensor) -> None:
    if len(places) == len(logits):
        logits.copy_(rows)
    else:
        logits[upload(places, torch.int64, logits.device)] = rows


class _History:
    """Tokens of one request.

    Attributes:
        seen: bool [V], tokens of prompt and output; None where nothing asks for them.
        counts: float32 [V], how often each is in the output; None likewise.
    """

    def __init__(self, request: Request, row: Tensor) -> None:
        params = request.params
        counted = params.frequency_penalty or params.presence_penalty
        self.seen = torch.zeros_like(row, dtype=torch.bool) if params.repetition_penalty != 1.0 else None
        self.counts = torch.zeros_like(row) if counted else None
        self._read = 0 if self.seen is not None else request.prompt_length  # tokens that are in them

    def update(self, request: Request) -> None:
        start, self._read = self._read, len(request.token_ids)
        if start == self._read:
            return
        device = (self.seen if self.seen is not None else self.counts).device  # type: ignore[union-attr]
        new = upload(request.token_ids[start:], torch.int64, device)
        if self.seen is not None:
            self.seen[new] = True
        if self.counts is not None:
            made = new[max(request.prompt_length - start, 0) :]
            self.counts.index_add_(0, made, torch.ones_like(made, dtype=self.counts.dtype))

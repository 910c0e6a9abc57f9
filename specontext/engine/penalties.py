"""Penalties on tokens that a request has already, from a record that is kept up as tokens come.

A step looks at the new tokens only, and works on whole rows of logits on the device: it costs the same however long the context.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.core import Request
from specontext.kernels.dispatch import upload


def penalised(request: Request) -> bool:
    """Whether a request asks for any penalty."""
    params = request.params
    return params.repetition_penalty != 1.0 or bool(params.frequency_penalty or params.presence_penalty)


def penalise(row: Tensor, request: Request) -> None:
    """Apply the three penalties to a row of logits, float32 [V], in place."""
    if not isinstance(request.history, _History):
        request.history = _History(request, row)
    request.history.apply(row, request)


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

    def apply(self, row: Tensor, request: Request) -> None:
        self._update(request)
        params = request.params
        if self.seen is not None:
            changed = torch.where(row > 0, row / params.repetition_penalty, row * params.repetition_penalty)
            bounds = torch.finfo(row.dtype)  # or a very small penalty would leave infinities, among which nothing is likelier
            changed = torch.where(row.isfinite(), changed.clamp(bounds.min, bounds.max), row)
            row.copy_(torch.where(self.seen, changed, row))
        if self.counts is not None:
            row -= params.frequency_penalty * self.counts + params.presence_penalty * (self.counts > 0)

    def _update(self, request: Request) -> None:
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

"""The next token of every request of a step; where there is none, it is known whose trouble that is."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from specontext.core import Request
from specontext.engine.failures import NOBODYS, Failures
from specontext.engine.sampler import sample
from specontext.errors import LogitsError


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
        left = [(row, request) for row, request in ready if request.request_id not in failures]
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
    if len(ready) < len(logits):
        logits = logits[torch.tensor([row for row, _ in ready], dtype=torch.int64).to(logits.device)]
    sampled = sample(logits, [request for _, request in ready], end_token_ids=end_token_ids)
    made = zip(sampled.token_ids, sampled.logprobs, strict=True)
    return [NextToken(*pair, *token) for pair, token in zip(ready, made, strict=True)]

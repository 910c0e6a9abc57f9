"""Logits as requests want them: grammars, allowed tokens, bad words, forbidden ends, biases, penalties; in vLLM's order."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from specontext.core import AllowedTokens, Request
from specontext.engine.penalties import penalise, penalised
from specontext.kernels.dispatch import upload
from specontext.kernels.token_masks import mask_tokens, with_masks
from specontext.sampling_params import SamplingParams


def restricted(raw: Tensor, requests: Sequence[Request], end_token_ids: Collection[int]) -> Tensor:
    """Logits [R, V] with everything that the requests ask for; `raw` itself where none asks for anything."""
    masked = [row for row, request in enumerate(requests) if request.allowed is not None]
    listed = [row for row, request in enumerate(requests) if request.params.allowed_token_ids is not None]
    forbidden = [
        (row, token)
        for row, request in enumerate(requests)
        if request.params.min_tokens or request.banned
        for token in _forbidden(request, end_token_ids)
        if token < raw.shape[1]
    ]
    biased = [row for row, request in enumerate(requests) if request.params.logit_bias is not None]
    with_penalties = [row for row, request in enumerate(requests) if penalised(request)]
    if not (masked or listed or forbidden or biased or with_penalties):
        return raw
    masks = _masks([requests[row].allowed for row in masked]) if masked else None
    if masks is not None and masks.is_floating_point():
        adjusted = with_masks(raw, masks, masked)
    else:
        adjusted = raw.clone()
        if masks is not None:
            mask_tokens(adjusted, masks, masked)
    for row in listed:
        allowed = upload(requests[row].params.allowed_token_ids or (), torch.int64, raw.device)
        kept = adjusted[row, allowed]
        adjusted[row] = -math.inf
        adjusted[row, allowed] = kept
    if forbidden:
        rows, tokens = upload(forbidden, torch.int64, raw.device).unbind(dim=1)
        adjusted.index_put_((rows, tokens), adjusted.new_full((), -math.inf))  # a number of the host's would be waited for
    for row in biased:
        ids, values = zip(*(requests[row].params.logit_bias or ()), strict=True)
        bias = upload(values, adjusted.dtype, raw.device)
        adjusted[row].index_add_(0, upload(ids, torch.int64, raw.device), bias)
    if with_penalties:
        rows = upload(with_penalties, torch.int64, raw.device)
        part = adjusted[rows]
        penalise(part, [requests[row] for row in with_penalties])
        adjusted[rows] = part
    return adjusted


def _masks(allowed: Sequence[AllowedTokens | None]) -> Tensor:
    """Masks [M, ..] of what grammars allow; all of a step stand in one tensor."""
    rows = [each.row for each in allowed if each is not None]
    assert allowed[0] is not None
    masks = allowed[0].masks
    return masks if rows == list(range(len(masks))) else masks[upload(rows, torch.int64, masks.device)]


def _forbidden(request: Request, end_token_ids: Collection[int]) -> list[int]:
    """Tokens that may not come next: ends that come too early, and the last ones of bad words that have begun."""
    params, tokens = request.params, request.token_ids
    made = len(tokens) - request.prompt_length
    found: list[int] = []
    if made < params.min_tokens:
        found += set(params.stop_token_ids).union(() if params.ignore_eos else end_token_ids)
    for word in request.banned:
        begun = len(word) - 1
        if begun <= made and list(word[:-1]) == tokens[len(tokens) - begun :]:
            found.append(word[-1])
    return found


def banned_sequences(params: SamplingParams, tokenizer: Any) -> list[tuple[int, ...]]:
    """Tokens of the bad words, as they are written at the beginning of a text and behind a space."""
    spelled = [text for word in params.bad_words for text in (word.lstrip(), f" {word.lstrip()}")]
    found = {tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in spelled}
    return sorted(found - {()})

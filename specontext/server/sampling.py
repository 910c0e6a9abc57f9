"""From the fields of a body to `SamplingParams`."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import Any

from specontext.errors import shown
from specontext.models.generation_entries import FOLLOWED, GENERATION, not_followed, recommended_sampling
from specontext.models.loading import LoadedModel
from specontext.sampling_params import SamplingParams, Thinking
from specontext.server.errors import ApiError
from specontext.server.prompts import over_length
from specontext.server.protocol.chat import ChatRequest
from specontext.server.protocol.common import SamplingBody
from specontext.server.protocol.completion import CompletionRequest

logger = logging.getLogger("specontext.server")

_NULLABLE = (
    *(*FOLLOWED, "n", "seed", "presence_penalty", "frequency_penalty", "stop", "stop_token_ids", "method", "budget"),
    *("allowed_token_ids", "bad_words"),
)
_PLAIN = ("ignore_eos", "min_tokens", "skip_special_tokens", "include_stop_str_in_output")
_TOKEN_ID = re.compile("0|[1-9][0-9]{0,17}")  # one spelling of each, so that no two biases are of one token
COMPLETION_TOKENS = 16  # max_tokens of text completions, as OpenAI has it


def sampling_defaults(loaded: LoadedModel) -> dict[str, Any]:
    """What the model's own generation config recommends, where it says something; the log names what is not followed.

    Raises:
        ModelError: a value that no request may have.
    """
    if passed := not_followed(loaded.generation):
        logger.warning(
            "%s of %s asks for %s, which is not followed: requests that need it must ask themselves (logit_bias, bad_words, "
            "min_tokens, stop)",
            *(GENERATION, loaded.name, ", ".join(passed)),
        )
    return recommended_sampling(loaded.generation, loaded.name)


def chat_params(
    body: ChatRequest,
    prompt_tokens: int,
    *,
    max_len: int,
    max_logprobs: int,
    defaults: dict[str, Any],
    thinking: Thinking | None = None,
) -> SamplingParams:
    """Parameters of a chat completion, which may be as long as the context allows unless it says otherwise.

    Raises:
        ApiError: contradictory or excessive fields.
        RequestError: fields that `SamplingParams` refuses.
    """
    limits = {n for n in (body.max_tokens, body.max_completion_tokens) if n is not None}
    if len(limits) > 1:
        raise ApiError(400, "max_tokens and max_completion_tokens differ: give one of them", param="max_completion_tokens")
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    _check_logprobs(logprobs, max_logprobs, "top_logprobs")
    room = max_len - prompt_tokens
    params = _params(body, limits.pop() if limits else max(room, 1), prompt_tokens, max_len, logprobs, defaults)
    return replace(params, thinking=thinking)


def completion_params(
    body: CompletionRequest, prompt_tokens: int, *, max_len: int, max_logprobs: int, defaults: dict[str, Any]
) -> SamplingParams:
    """Parameters of text completions whose longest prompt has `prompt_tokens` tokens.

    A mere echo makes one token all the same: the engine computes prompts in order to continue them.

    Raises:
        ApiError: contradictory or excessive fields.
        RequestError: fields that `SamplingParams` refuses.
    """
    _check_logprobs(body.logprobs, max_logprobs, "logprobs")
    limit = body.max_tokens
    if limit is None:
        limit = max(min(COMPLETION_TOKENS, max_len - prompt_tokens), 1)
    elif body.only_echo:
        limit = 1
    params = _params(body, limit, prompt_tokens, max_len, body.logprobs, defaults)
    return replace(params, prompt_logprobs=body.logprobs) if body.echo else params


def _params(
    body: SamplingBody, limit: int, prompt_tokens: int, max_len: int, logprobs: int | None, defaults: dict[str, Any]
) -> SamplingParams:
    limit = min(limit, defaults.get("max_tokens", limit))
    if prompt_tokens + max(limit, 1) > max_len:
        raise over_length(
            f"you requested {prompt_tokens + max(limit, 1)} tokens ({prompt_tokens} in the prompt, {limit} in the completion): "
            "shorten one of them.",
            max_len,
            prompt_tokens=prompt_tokens,
            max_tokens=limit,
        )
    given = {name: getattr(body, name) for name in _NULLABLE if getattr(body, name) is not None}
    plain = {name: getattr(body, name) for name in _PLAIN}
    params = SamplingParams(**(defaults | given | plain | {"max_tokens": limit}), logprobs=logprobs)
    return replace(params, logit_bias=_biases(body.logit_bias)) if body.logit_bias else params


def _biases(table: dict[str, float]) -> dict[int, float]:
    """Biases by token id; the keys of a JSON object are texts."""
    for token in table:
        if not _TOKEN_ID.fullmatch(token):
            raise ApiError(400, f"logit_bias: {shown(token)} is not a token id", param="logit_bias")
    return {int(token): bias for token, bias in table.items()}


def kept_tokens(body: SamplingBody, max_len: int) -> int | None:
    """How many of a prompt's last tokens a request keeps; None keeps all."""
    kept = body.truncate_prompt_tokens
    if kept == 0:
        raise ApiError(400, "truncate_prompt_tokens must be at least 1, or -1", param="truncate_prompt_tokens")
    return max_len - 1 if kept == -1 else kept


def _check_logprobs(asked: int | None, most: int, param: str) -> None:
    if asked is not None and asked > most:
        raise ApiError(400, f"{param} is {asked} and the server gives at most {most}: see --max-logprobs", param=param)

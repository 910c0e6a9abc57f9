"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request, Response

from specontext.engine.output_statistics import OutputStatistics
from specontext.engine.request_stream import Delta, RequestStream
from specontext.errors import which_prompt
from specontext.sampling_params import SamplingParams
from specontext.server.bounded_body import BoundedRoute
from specontext.server.context import note, state_of
from specontext.server.errors import ApiError
from specontext.server.logprobs import completion_logprobs, echo_logprobs
from specontext.server.prompts import over_length
from specontext.server.protocol.common import COMPLETION_RESPONSES
from specontext.server.protocol.completion import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
)
from specontext.server.sampling import completion_params, kept_tokens
from specontext.server.state import ServerState
from specontext.server.streaming import EventStream, event, unless_client_leaves
from specontext.server.usage import make_usage

router = APIRouter(route_class=BoundedRoute)


@dataclass
class Choice:
    """What one output has come to.

    Attributes:
        echo: text of the prompt, where it is to come first.
        prompt_tables: log-probabilities of the prompt's tokens, where they are echoed too.
        length: characters of the tokens so far, where they have log-probabilities.
        streamed: its tokens' ids have been shown, and those of its prompt with the first of them.
    """

    echo: str
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    tables: list[dict[int, float]] = field(default_factory=list)
    prompt_tables: list[dict[int, float] | None] | None = None
    length: int = 0
    streamed: bool = False
    finish_reason: str | None = None
    stats: OutputStatistics | None = None


class Completion:
    """One request on its way through the engine."""

    def __init__(
        self, state: ServerState, body: CompletionRequest, stream: RequestStream | None, prompts: list[list[int]]
    ) -> None:
        self.state, self.body, self.stream, self.prompts = state, body, stream, prompts
        self.id, self.created = f"cmpl-{stream.request_id if stream is not None else uuid.uuid4().hex}", int(time.time())
        self.completion_tokens = 0
        self.choices: list[Choice] = []

    async def prepare(self) -> None:
        """Make the choices, with the texts that are to be echoed."""
        for given, tokens in zip(self.body.prompts, self.prompts, strict=True):
            echo = ""
            if self.body.echo:
                whole = isinstance(given, str) and self.body.truncate_prompt_tokens is None
                echo = str(given) if whole else await self.state.encoder.decode(tokens)
            self.choices += [Choice(echo, length=len(echo)) for _ in range(self.body.n or 1)]

    async def whole(self, request: Request) -> CompletionResponse:
        """Wait for all outputs."""
        async for deltas in self._deltas():
            for delta in deltas:
                choice = self.choices[delta.index]
                choice.text.append(delta.text)
                choice.token_ids += delta.token_ids
                choice.tables += delta.logprobs or []
                choice.prompt_tables = choice.prompt_tables or delta.prompt_logprobs
                self._count(delta)
        self._note(request)
        choices = [
            CompletionChoice(
                index=index,
                text=choice.echo + "".join(choice.text),
                logprobs=self._all_logprobs(index, choice),
                finish_reason=choice.finish_reason or "length",
                prompt_token_ids=self._prompt_of(index) if self.body.return_token_ids else None,
                token_ids=choice.token_ids if self.body.return_token_ids else None,
            )
            for index, choice in enumerate(self.choices)
        ]
        return CompletionResponse(id=self.id, created=self.created, model=self.state.model, choices=choices, usage=self._usage())

    async def events(self, request: Request) -> AsyncIterator[bytes]:
        """The outputs as they come."""
        ended = "length" if self.stream is None else None
        echoes = [(i, choice.echo) for i, choice in enumerate(self.choices) if choice.echo]
        if echoes and (ended or self.body.logprobs is None):  # else they come with their log-probabilities
            yield b"".join(self._event(index, echo, None, ended) for index, echo in echoes)
        async for deltas in self._deltas():
            if data := b"".join(self._delta_event(delta) for delta in deltas):
                yield data
        self._note(request)
        if self.body.wants_usage:
            yield event(self._head() | {"choices": [], "usage": self._usage().model_dump(exclude_none=True)})

    async def _deltas(self) -> AsyncIterator[list[Delta]]:
        if self.stream is not None:
            async for deltas in self.stream:
                yield [_without_output(delta) for delta in deltas] if self.body.only_echo else deltas

    def _delta_event(self, delta: Delta) -> bytes:
        return self._echo_event(delta) + self._output_event(delta)

    def _echo_event(self, delta: Delta) -> bytes:
        if delta.prompt_logprobs is None:
            return b""
        logprobs = self._echo_logprobs(delta.index, delta.prompt_logprobs)
        return self._event(delta.index, self.choices[delta.index].echo, logprobs.model_dump(), None)

    def _output_event(self, delta: Delta) -> bytes:
        self._count(delta)
        logprobs = self._logprobs(self.choices[delta.index], delta.token_ids, delta.logprobs or []) if delta.token_ids else None
        tokens = {"token_ids": delta.token_ids} if self.body.return_token_ids and delta.token_ids else {}
        if not delta.text and logprobs is None and delta.finish_reason is None and not tokens:
            return b""
        shown = logprobs.model_dump() if logprobs else None
        return self._event(delta.index, delta.text, shown, delta.finish_reason, tokens)

    def _prompt_of(self, index: int) -> list[int]:
        return list(self.prompts[index // (self.body.n or 1)])

    def _count(self, delta: Delta) -> None:
        self.completion_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            choice = self.choices[delta.index]
            choice.finish_reason, choice.stats = delta.finish_reason, delta.stats

    def _event(
        self, index: int, text: str, logprobs: Any, finish_reason: str | None, tokens: dict[str, Any] | None = None
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        if tokens and not self.choices[index].streamed:
            choice["prompt_token_ids"] = self._prompt_of(index)
        self.choices[index].streamed = self.choices[index].streamed or bool(tokens)
        choice |= tokens or {}
        usage: dict[str, Any] = {"usage": None} if self.body.wants_usage else {}
        if self.body.wants_running_usage:
            usage = {"usage": self._usage().model_dump(exclude_none=True, exclude={"specontext"})}
        return event(self._head() | {"choices": [choice]} | usage, obfuscate=self.body.wants_obfuscation)

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.state.model}

    def _logprobs(self, choice: Choice, token_ids: list[int], tables: list[dict[int, float]]) -> CompletionLogprobs | None:
        if self.body.logprobs is None:
            return None
        found = completion_logprobs(token_ids, tables, self.body.logprobs, self.state.texts, offset=choice.length)
        choice.length += sum(map(len, found.tokens))
        return found

    def _echo_logprobs(self, index: int, tables: list[dict[int, float] | None]) -> CompletionLogprobs:
        assert self.body.logprobs is not None
        tokens, echo = self._prompt_of(index), self.choices[index].echo
        return echo_logprobs(tokens, tables, self.body.logprobs, self.state.texts, echo=echo)

    def _all_logprobs(self, index: int, choice: Choice) -> CompletionLogprobs | None:
        found = self._logprobs(choice, choice.token_ids, choice.tables)
        if found is None or choice.prompt_tables is None:
            return found
        return self._echo_logprobs(index, choice.prompt_tables) + found

    def _usage(self) -> Any:
        stats = [choice.stats for choice in self.choices]
        return make_usage(sum(map(len, self.prompts)), self.completion_tokens, stats, n=self.body.n or 1)

    def _note(self, request: Request) -> None:
        note(
            request,
            prompt_tokens=sum(map(len, self.prompts)),
            completion_tokens=self.completion_tokens,
            finish_reason=",".join(choice.finish_reason or "none" for choice in self.choices),
        )


def _without_output(delta: Delta) -> Delta:
    """What is left of a delta where only the prompt was asked for."""
    return replace(delta, text="", token_ids=[], logprobs=[], finish_reason=delta.finish_reason and "length")


async def _encode(state: ServerState, body: CompletionRequest) -> list[list[int]]:
    prompts, keep = body.prompts, kept_tokens(body, state.max_model_len)
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if texts:
        return await state.encoder.texts(texts, add_special_tokens=body.add_special_tokens, keep=keep)
    ids = [list(prompt)[-(keep or 0) :] for prompt in prompts if not isinstance(prompt, str)]
    for number, prompt in enumerate(ids):
        place = which_prompt(number, len(ids))
        if not prompt:
            raise ApiError(400, f"{place}the prompt is empty: give some text or token ids", param="prompt")
        if len(prompt) > state.max_model_len:
            raise over_length(f"{place}the prompt has {len(prompt)} tokens: shorten it", state.max_model_len)
        await state.encoder.check_ids(prompt, "prompt", place)
    return ids


async def _structured(state: ServerState, body: CompletionRequest, params: SamplingParams) -> SamplingParams:
    return replace(params, structured_outputs=await state.compile(body.structured_params, body.structured_field))


@router.post("/v1/completions", response_model=CompletionResponse, responses=COMPLETION_RESPONSES)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continue texts."""
    state = state_of(request)
    state.check_model(body.model)
    prompts = await _encode(state, body)
    stream = None
    if not body.only_echo or body.logprobs is not None:  # a mere echo needs no engine
        params = completion_params(
            body,
            max(map(len, prompts)),
            max_len=state.max_model_len,
            max_logprobs=state.config.max_logprobs,
            defaults=state.defaults,
        )
        params = await _structured(state, body, params)
        stream = await state.submit(uuid.uuid4().hex, prompts, params, streaming=bool(body.stream))
        note(request, engine_id=stream.request_id)
    close = stream.abort if stream is not None else lambda: None
    try:
        completion = Completion(state, body, stream, prompts)
        await completion.prepare()
        if not body.stream:
            answer = await unless_client_leaves(request.receive, completion.whole(request))
    except BaseException:
        close()
        raise
    if body.stream:
        return EventStream(completion.events(request), close=close)
    return Response(answer.model_dump_json(), media_type="application/json")

"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response

from specontext.core import Thinking
from specontext.engine.output_statistics import OutputStatistics
from specontext.engine.request_stream import Delta, RequestStream
from specontext.server.bounded_body import BoundedRoute
from specontext.server.context import note, state_of
from specontext.server.logprobs import chat_logprobs
from specontext.server.prompts import ChatPrompt
from specontext.server.protocol.chat import ChatChoice, ChatMessage, ChatRequest, ChatResponse
from specontext.server.protocol.common import COMPLETION_RESPONSES
from specontext.server.sampling import chat_params
from specontext.server.state import ServerState
from specontext.server.streaming import EventStream, event, unless_client_leaves
from specontext.server.usage import make_usage

router = APIRouter(route_class=BoundedRoute)


@dataclass
class Choice:
    """What one output has come to."""

    reasoning: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    tables: list[dict[int, float]] = field(default_factory=list)
    finish_reason: str | None = None
    stats: OutputStatistics | None = None
    reasoning_tokens: int = 0

    def add(self, delta: Delta, *, keep: bool) -> None:
        """Take a delta, and keep its text and log-probabilities where the whole will be asked for."""
        self.reasoning_tokens = delta.reasoning_tokens
        if keep:
            self.reasoning.append(delta.reasoning)
            self.content.append(delta.text)
            self.token_ids += delta.token_ids
            self.tables += delta.logprobs or []
        if delta.finish_reason is not None:
            self.finish_reason, self.stats = delta.finish_reason, delta.stats


class Chat:
    """One chat request on its way through the engine."""

    def __init__(self, state: ServerState, body: ChatRequest, stream: RequestStream) -> None:
        self.state, self.body, self.stream = state, body, stream
        self.choices = [Choice() for _ in range(stream.count)]
        self.id, self.created = f"chatcmpl-{stream.request_id}", int(time.time())
        self.completion_tokens = 0

    async def whole(self, request: Request) -> ChatResponse:
        """Wait for all outputs."""
        async for deltas in self.stream:
            for delta in deltas:
                self.completion_tokens += len(delta.token_ids)
                self.choices[delta.index].add(delta, keep=True)
        self._note(request)
        choices = []
        for index, choice in enumerate(self.choices):
            reasoning = "".join(choice.reasoning) or None
            message = ChatMessage(content="".join(choice.content), reasoning=reasoning, reasoning_content=reasoning)
            logprobs = self._logprobs(choice.token_ids, choice.tables)
            choices.append(
                ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=choice.finish_reason or "stop")
            )
        return ChatResponse(id=self.id, created=self.created, model=self.state.model, choices=choices, usage=self._usage())

    async def events(self, request: Request) -> AsyncIterator[bytes]:
        """The outputs as they come, each beginning with its role."""
        yield b"".join(self._event(index, {"role": "assistant", "content": ""}) for index in range(len(self.choices)))
        async for deltas in self.stream:
            if data := b"".join(self._delta_event(delta) for delta in deltas):
                yield data
        self._note(request)
        if self.body.wants_usage:
            yield event(self._head() | {"choices": [], "usage": self._usage().model_dump(exclude_none=True)})

    def _delta_event(self, delta: Delta) -> bytes:
        self.completion_tokens += len(delta.token_ids)
        self.choices[delta.index].add(delta, keep=False)
        texts = {"reasoning": delta.reasoning, "reasoning_content": delta.reasoning, "content": delta.text}
        message = {name: text for name, text in texts.items() if text}
        logprobs = self._logprobs(delta.token_ids, delta.logprobs) if delta.logprobs else None
        if not message and logprobs is None and delta.finish_reason is None:
            return b""
        return self._event(delta.index, message, logprobs.model_dump() if logprobs is not None else None, delta.finish_reason)

    def _event(self, index: int, delta: dict[str, str], logprobs: Any = None, finish_reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if self.body.wants_usage else {}
        return event(self._head() | {"choices": [choice]} | usage, obfuscate=self.body.wants_obfuscation)

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.state.model}

    def _logprobs(self, token_ids: list[int], tables: list[dict[int, float]] | None) -> Any:
        if not self.body.logprobs:
            return None
        return chat_logprobs(token_ids, tables or [], self.body.top_logprobs or 0, self.state.texts)

    def _usage(self) -> Any:
        prompt_tokens, stats = sum(map(len, self.stream.prompts)), [choice.stats for choice in self.choices]
        thought = sum(choice.reasoning_tokens for choice in self.choices) if self.stream.params.thinking is not None else None
        return make_usage(prompt_tokens, self.completion_tokens, stats, n=len(stats), reasoning_tokens=thought)

    def _note(self, request: Request) -> None:
        note(
            request,
            prompt_tokens=sum(map(len, self.stream.prompts)),
            completion_tokens=self.completion_tokens,
            finish_reason=",".join(choice.finish_reason or "none" for choice in self.choices),
        )


def _thinking(state: ServerState, body: ChatRequest, prompt: ChatPrompt) -> Thinking | None:
    if state.reasoning is None:
        return None
    return state.reasoning.thinking(prompt.text, continued=body.messages[-1].text if body.continue_final_message else None)


@router.post("/v1/chat/completions", response_model=ChatResponse, responses=COMPLETION_RESPONSES)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Continue a conversation."""
    state = state_of(request)
    state.check_model(body.model)
    prompt = await state.encoder.messages(body)
    params = chat_params(
        body,
        len(prompt.token_ids),
        max_len=state.max_model_len,
        max_logprobs=state.config.max_logprobs,
        defaults=state.defaults,
        thinking=_thinking(state, body, prompt),
    )
    stream = await state.submit(uuid.uuid4().hex, [prompt.token_ids], params, streaming=bool(body.stream))
    note(request, engine_id=stream.request_id)
    chat = Chat(state, body, stream)
    if body.stream:
        return EventStream(chat.events(request), close=stream.abort)
    try:
        answer = await unless_client_leaves(request.receive, chat.whole(request))
    finally:
        stream.abort()
    return Response(answer.model_dump_json(), media_type="application/json")

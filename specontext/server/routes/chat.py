"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from specontext.engine.request_stream import Delta
from specontext.server.answers import Answer, Growth
from specontext.server.bounded_body import BoundedRoute
from specontext.server.context import state_of
from specontext.server.conversation import Conversation
from specontext.server.logprobs import chat_logprobs
from specontext.server.protocol.chat import ChatChoice, ChatMessage, ChatRequest, ChatResponse
from specontext.server.protocol.common import COMPLETION_RESPONSES
from specontext.server.protocol.tools import FunctionCall, ToolCall
from specontext.server.state import ServerState
from specontext.server.streaming import EventStream, event, unless_client_leaves

router = APIRouter(route_class=BoundedRoute)


class Chat:
    """The answer to one chat request."""

    def __init__(self, state: ServerState, body: ChatRequest, talk: Conversation) -> None:
        self.state, self.body, self.talk = state, body, talk
        self.id, self.created = f"chatcmpl-{talk.stream.request_id}", int(time.time())

    async def whole(self, request: Request) -> ChatResponse:
        """Wait for all outputs."""
        await self.talk.finish(request)
        wanted = bool(self.body.return_token_ids)
        return ChatResponse(
            id=self.id,
            created=self.created,
            model=self.state.model,
            choices=[self._choice(index, answer) for index, answer in enumerate(self.talk.answers)],
            usage=self.talk.usage(),
            prompt_token_ids=self.talk.prompt_token_ids if wanted else None,
        )

    def _choice(self, index: int, answer: Answer) -> ChatChoice:
        reasoning, content = "".join(answer.reasoning) or None, "".join(answer.content)
        calls = [ToolCall(id=c.id, function=FunctionCall(name=c.name, arguments=c.text)) for c in answer.calls]
        message = ChatMessage(
            content=None if calls and not content else content,
            reasoning=reasoning,
            reasoning_content=reasoning,
            tool_calls=calls or None,
        )
        return ChatChoice(
            index=index,
            message=message,
            logprobs=self._logprobs(answer.token_ids, answer.tables),
            finish_reason=answer.finish_reason or "stop",
            token_ids=answer.token_ids if self.body.return_token_ids else None,
        )

    async def events(self, request: Request) -> AsyncIterator[bytes]:
        """The outputs as they come, each beginning with its role."""
        given = {"prompt_token_ids": self.talk.prompt_token_ids} if self.body.return_token_ids else {}
        begin: dict[str, Any] = {"role": "assistant", "content": ""}
        yield b"".join(self._event(index, begin, more=given) for index in range(len(self.talk.answers)))
        async for grown in self.talk.grow():
            if data := b"".join(piece for delta, growths in grown for piece in self._delta_events(delta, growths)):
                yield data
        self.talk.note(request)
        if self.body.wants_usage:
            yield event(self._head() | {"choices": [], "usage": self.talk.usage().model_dump(exclude_none=True)})

    def _delta_events(self, delta: Delta, growths: Sequence[Growth]) -> list[bytes]:
        """Events of what came at once; the last one has what belongs to all of it."""
        answer = self.talk.answers[delta.index]
        messages = [message for growth in growths if (message := _message(growth, answer))]
        reason = answer.finish_reason
        logprobs = self._logprobs(delta.token_ids, delta.logprobs) if delta.logprobs else None
        tokens = {"token_ids": delta.token_ids} if self.body.return_token_ids and delta.token_ids else {}
        if not messages and logprobs is None and reason is None and not tokens:
            return []
        shown = logprobs.model_dump() if logprobs is not None else None
        *others, last = messages or [{}]
        events = [self._event(delta.index, message) for message in others]
        return [*events, self._event(delta.index, last, shown, reason, choice=tokens)]

    def _event(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: Any = None,
        finish_reason: str | None = None,
        *,
        choice: dict[str, Any] | None = None,
        more: dict[str, Any] | None = None,
    ) -> bytes:
        whole = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason} | (choice or {})
        usage: dict[str, Any] = {"usage": None} if self.body.wants_usage else {}
        if self.body.wants_running_usage:
            usage = {"usage": self.talk.usage().model_dump(exclude_none=True, exclude={"specontext"})}
        return event(self._head() | {"choices": [whole]} | usage | (more or {}), obfuscate=self.body.wants_obfuscation)

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.state.model}

    def _logprobs(self, token_ids: list[int], tables: list[dict[int, float]] | None) -> Any:
        if not self.body.logprobs:
            return None
        return chat_logprobs(token_ids, tables or [], self.body.top_logprobs or 0, self.state.texts)


def _message(growth: Growth, answer: Answer) -> dict[str, Any]:
    """The delta of a message as OpenAI sends it."""
    place = len(answer.calls) - 1 if growth.begun is None else answer.calls.index(growth.begun)
    if growth.begun is not None:
        call = {"id": growth.begun.id, "type": "function", "function": {"name": growth.begun.name, "arguments": ""}}
        return {"tool_calls": [{"index": place, **call}]}
    if growth.arguments:
        return {"tool_calls": [{"index": place, "function": {"arguments": growth.arguments}}]}
    texts = {"reasoning": growth.reasoning, "reasoning_content": growth.reasoning, "content": growth.content}
    return {name: text for name, text in texts.items() if text}


@router.post("/v1/chat/completions", response_model=ChatResponse, responses=COMPLETION_RESPONSES)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Continue a conversation."""
    state = state_of(request)
    state.check_model(body.model)
    talk = await Conversation.begin(request, state, body)
    chat = Chat(state, body, talk)
    if body.stream:
        return EventStream(chat.events(request), close=talk.stream.abort)
    try:
        answer = await unless_client_leaves(request.receive, chat.whole(request))
    finally:
        talk.stream.abort()
    return Response(answer.model_dump_json(), media_type="application/json")

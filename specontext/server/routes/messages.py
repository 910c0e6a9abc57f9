"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic has them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from specontext.server.anthropic.input import to_chat
from specontext.server.anthropic.output import MessageWriter
from specontext.server.bounded_body import BoundedRoute
from specontext.server.context import state_of
from specontext.server.conversation import Conversation
from specontext.server.errors import anthropic_error
from specontext.server.protocol.common import COMPLETION_RESPONSES, ERROR_RESPONSES
from specontext.server.protocol.messages import CountRequest, MessagesRequest
from specontext.server.streaming import EventStream, named_event, unless_client_leaves

router = APIRouter(route_class=BoundedRoute)


class _Turn:
    """One request and its answer."""

    def __init__(self, talk: Conversation) -> None:
        self.talk, self.writer = talk, MessageWriter(talk)

    async def events(self, request: Request) -> AsyncIterator[dict[str, Any]]:
        for each in self.writer.begin():
            yield each
        async for grown in self.talk.grow():
            for delta, growths in grown:
                self.writer.stop = delta.stop
                for each in self.writer.grow(growths):
                    yield each
        self.talk.note(request)
        for each in self.writer.end():
            yield each

    async def whole(self, request: Request) -> dict[str, Any]:
        async for _ in self.events(request):
            pass
        return self.writer.message()

    async def encoded(self, request: Request) -> AsyncIterator[bytes]:
        async for each in self.events(request):
            yield named_event(each)


@router.post("/v1/messages", responses=COMPLETION_RESPONSES)
async def messages(request: Request, body: MessagesRequest) -> Response:
    """Continue a conversation, as Anthropic's protocol has it."""
    state = state_of(request)
    state.check_model(body.model)
    talk = await Conversation.begin(request, state, to_chat(body, thinks=state.reasoning is not None))
    turn = _Turn(talk)
    if body.stream:
        return EventStream(
            turn.encoded(request),
            close=talk.stream.abort,
            failed=lambda error: named_event(anthropic_error(error)),
            last=b"",
        )
    try:
        answer = await unless_client_leaves(request.receive, turn.whole(request))
    finally:
        talk.stream.abort()
    return Response(json.dumps(answer), media_type="application/json")


@router.post("/v1/messages/count_tokens", responses=ERROR_RESPONSES)
async def count_tokens(request: Request, body: CountRequest) -> dict[str, int]:
    """How many tokens the prompt of a conversation has."""
    state = state_of(request)
    state.check_model(body.model)
    chat = to_chat(body, thinks=state.reasoning is not None)
    state.tools.use(chat)
    return {"input_tokens": len((await state.encoder.messages(chat)).token_ids)}

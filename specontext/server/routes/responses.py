"""POST /v1/responses."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from specontext.server.bounded_body import BoundedRoute
from specontext.server.context import state_of
from specontext.server.conversation import Conversation
from specontext.server.errors import ApiError
from specontext.server.protocol.common import COMPLETION_RESPONSES
from specontext.server.protocol.responses import ResponsesRequest
from specontext.server.responses.input import Item, all_items, to_chat
from specontext.server.responses.output import ResponseWriter
from specontext.server.streaming import EventStream, named_event, unless_client_leaves

router = APIRouter(route_class=BoundedRoute)


class _Turn:
    """One request, its answer, and where the answer is kept."""

    def __init__(self, talk: Conversation, body: ResponsesRequest, items: list[Item]) -> None:
        self.talk, self.body, self.items = talk, body, items
        self.writer = ResponseWriter(talk, body)

    async def events(self, request: Request) -> AsyncIterator[dict[str, Any]]:
        for each in self.writer.begin():
            yield each
        async for grown in self.talk.grow():
            for delta, growths in grown:
                for each in self.writer.grow(delta, growths):
                    yield each
        self.talk.note(request)
        *closing, last = list(self.writer.end())
        self._keep()
        for each in (*closing, last):
            yield each

    async def whole(self, request: Request) -> dict[str, Any]:
        async for _ in self.events(request):
            pass
        return self.writer.response(self.writer.status)

    async def encoded(self, request: Request) -> AsyncIterator[bytes]:
        async for each in self.events(request):
            hidden = self.body.wants_obfuscation and each["type"].endswith(".delta")
            yield named_event(each, obfuscate=hidden)

    def failed(self, error: ApiError) -> bytes:
        return named_event(self.writer.failed(error.code or error.status_code, error.detail))

    def _keep(self) -> None:
        if self.body.store is not False:
            self.talk.state.responses.add(self.writer.id, self.items, self.writer.output)


@router.post("/v1/responses", responses=COMPLETION_RESPONSES)
async def responses(request: Request, body: ResponsesRequest) -> Response:
    """Answer, as OpenAI's newer protocol has it: items in, items out."""
    state = state_of(request)
    state.check_model(body.model)
    items = all_items(body, state.responses)
    talk = await Conversation.begin(request, state, to_chat(body, items))
    turn = _Turn(talk, body, items)
    if body.stream:
        return EventStream(turn.encoded(request), close=talk.stream.abort, failed=turn.failed, last=b"")
    try:
        answer = await unless_client_leaves(request.receive, turn.whole(request))
    finally:
        talk.stream.abort()
    return Response(json.dumps(answer), media_type="application/json")

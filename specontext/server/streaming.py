"""Answers that end when the client goes away: server-sent events, and waiting for a whole answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from specontext.server.errors import ApiError, as_api_error, error_body, note_error

Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"
_GRAIN = 64  # bytes; the lengths of obfuscated events are multiples of it


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def event(data: dict[str, Any], *, obfuscate: bool = False) -> bytes:
    """One event; obfuscated, its length tells hardly anything of the text in it."""
    if not obfuscate:
        return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"
    bare = event(data | {"obfuscation": ""})
    return event(data | {"obfuscation": secrets.token_hex(_GRAIN // 2)[: -len(bare) % _GRAIN]})


def named_event(data: dict[str, Any], *, obfuscate: bool = False) -> bytes:
    """One event that carries its type as its name too; `obfuscate` as of `event`."""
    return b"event: " + str(data["type"]).encode() + b"\n" + event(data, obfuscate=obfuscate)


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client disconnects.

    Raises:
        ClientGone: it did.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await _cancelled(task, watch)


class EventStream(Response):
    """A stream of server-sent events; an error after the first byte is the next event, and a fact for the log.

    Args:
        events: encoded events.
        close: called once, whichever way the answer ends.
        failed: encodes an error as an event.
        last: ends every stream.

    Raises when it is sent:
        ClientGone: the client left before the end.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        close: Callable[[], None],
        *,
        failed: Callable[[ApiError], bytes] | None = None,
        last: bytes = DONE,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close, self._last = events, close, last
        self._failed = failed or (lambda error: event(error_body(error)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = asyncio.ensure_future(self._write(scope, send))
        watch = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((writer, watch), return_when=asyncio.FIRST_COMPLETED)
            if not writer.done():
                raise ClientGone
            writer.result()
        finally:
            self._close()
            await _cancelled(writer, watch)

    async def _write(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except Exception as error:
            known = as_api_error(error)
            note_error(scope, known)
            await send({"type": "http.response.body", "body": self._failed(known), "more_body": True})
        await send({"type": "http.response.body", "body": self._last, "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task

"""What happens to every HTTP request before and after its route: an id, the key, the limit of the body, and a line in the log."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specontext.server.errors import ApiError, error_response
from specontext.server.facts import FACTS
from specontext.server.logs import fields, shortened
from specontext.server.streaming import ClientGone

logger = logging.getLogger("specontext.server")

OPEN_PATHS = ("/health", "/")  # the page holds no data; it asks for the key itself
QUIET_PATHS = ("/health", "/metrics", "/status")
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class PlainPath:
    """Takes a slash at the end of a path as none."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["path"] = scope["path"].rstrip("/") or "/"
        await self.app(scope, receive, send)


class HeadAsGet:
    """Answers HEAD as GET; the server keeps the body to itself, since it knows what was asked."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app({**scope, "method": "GET"} if scope.get("method") == "HEAD" else scope, receive, send)


class RequestId:
    """Names every request, answers errors that nobody else has answered, writes the log and has refusals counted."""

    def __init__(self, app: ASGIApp, *, log: bool, refused: Callable[[str], None]) -> None:
        self.app, self.log, self.refused = app, log, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if _ID.fullmatch(given) else uuid.uuid4().hex
        began, status = time.perf_counter(), 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        facts = scope.setdefault(FACTS, {})
        outcome = "done"
        try:
            await self.app(scope, receive, send_named)
        except ClientGone:
            outcome = "client_left"
        except Exception as error:
            outcome = "error"
            answer = error_response(error, scope)
            if not status:
                await answer(scope, receive, send_named)
        except BaseException:
            outcome = "cancelled"
            raise
        finally:
            if status >= 400 or "reason" in facts:  # an error may come after a stream has begun
                self.refused(facts.get("code") or "invalid_request")
            if self.log and (scope["path"] not in QUIET_PATHS or status >= 500):
                seconds = round(time.perf_counter() - began, 4)
                shown = {
                    "request_id": name,
                    "method": scope["method"],
                    "path": shortened(scope["path"]),
                    "status": status or None,
                }
                logger.info("%s", fields("request", shown | {"outcome": outcome, "seconds": seconds} | facts))


class ApiKeys:
    """Lets only those in who present one of the keys; keys are compared in constant time.

    OPTIONS needs none: browsers ask with it before they send a key, and it tells nothing.
    """

    def __init__(self, app: ASGIApp, *, keys: Iterable[str]) -> None:
        self.app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._digests or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        kind, key = (*headers.get("authorization", "").split(None, 1), "", "")[:2]
        if not key and "x-api-key" in headers:  # as clients of Anthropic's protocol send it
            kind, key = "bearer", headers["x-api-key"]
        digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()  # equal lengths, whatever was sent
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if kind.lower() != "bearer" or not any(matches):
            error = ApiError(
                401,
                "the API key is missing or wrong: send 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            return await error_response(error, scope)(scope, receive, send)
        await self.app(scope, receive, send)

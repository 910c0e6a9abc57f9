"""JSON bodies whose structure is counted before it is parsed: millions of tiny values would hold everybody up."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from specontext.server.errors import ApiError

MOST_CONTAINERS = 1 << 18  # lists and objects of one body
MOST_STRINGS = 1 << 19  # strings, names of fields among them
_STRING = re.compile(rb'"(?:[^"\\]+|\\.)*+"', re.DOTALL)


def check_structure(body: bytes) -> None:
    """Raises ApiError for a body of more values than any request needs, in time that is little against parsing it."""
    quotes = body.count(b'"') - body.count(b'\\"')  # those inside of strings have a backslash before them
    if quotes > 2 * MOST_STRINGS:
        raise ApiError(400, f"the body has more than {MOST_STRINGS} strings: send fewer at a time", code="body_too_complex")
    if _containers(body) > MOST_CONTAINERS and _containers(_STRING.sub(b"", body)) > MOST_CONTAINERS:
        raise ApiError(
            400, f"the body has more than {MOST_CONTAINERS} lists and objects: send fewer at a time", code="body_too_complex"
        )


def _containers(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")


class BoundedRoute(APIRoute):
    """A route that checks the structure of its bodies."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_bounded(request: Request) -> Response:
            return await handle(_BoundedRequest(request.scope, request.receive))

        return handle_bounded


class _BoundedRequest(Request):
    async def json(self) -> Any:
        encoding = self.headers.get("content-encoding", "identity")
        if encoding.strip().lower() not in ("", "identity"):
            raise ApiError(415, f"bodies in Content-Encoding '{encoding[:50]}' are not read: send the JSON as it is")
        check_structure(await self.body())
        try:
            return await super().json()
        except json.JSONDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise ApiError(
                400, "the body cannot be read: it is not Unicode, nested too deeply, or has a number of too many digits"
            ) from error

"""JSON bodies whose structure is counted before it is parsed: millions of tiny values would hold everybody up."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from specontext.errors import shown
from specontext.server.errors import ApiError
from specontext.server.streaming import ClientGone

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


def parse(body: bytes) -> Any:
    """What a body of JSON says.

    Raises:
        JSONDecodeError: it is no JSON.
        ApiError: it is JSON that says something twice, or cannot be read.
    """
    try:
        text = body.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: byte {error.start} is none of it") from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply") from error
    except ValueError as error:  # Python's own bound on the digits of integers
        raise ApiError(400, "the body has a number of too many digits") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(name, _), *_] = Counter(name for name, _ in pairs).most_common(1)
        raise ApiError(400, f"{shown(name)} comes twice in one object, and which value is meant cannot be told: send one")
    return found


def _no_constant(name: str) -> None:
    raise ApiError(400, f"the body is not JSON: {name} is no number there")


class BoundedRoute(APIRoute):
    """A route that checks the structure of its bodies."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_bounded(request: Request) -> Response:
            bounded = _BoundedRequest(request.scope, request.receive)
            try:
                await bounded.body()
            except ClientDisconnect as error:
                raise ClientGone from error
            return await handle(bounded)

        return handle_bounded


class _BoundedRequest(Request):
    async def json(self) -> Any:
        encoding = self.headers.get("content-encoding", "identity")
        if encoding.strip().lower() not in ("", "identity"):
            raise ApiError(415, f"bodies in Content-Encoding '{encoding[:50]}' are not read: send the JSON as it is")
        body = await self.body()
        check_structure(body)
        return parse(body)

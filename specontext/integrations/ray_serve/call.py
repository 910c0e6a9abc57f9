"""A request on its way from the process that has read it to the replica that answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.types import Message, Scope

_KEPT = (
    "type",
    "asgi",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "headers",
    "client",
    "server",
)


@dataclass(frozen=True)
class Call:
    """An HTTP request, read whole.

    Attributes:
        scope: what ASGI says of it, plain values only.
        marks: of the beginnings of its prompt.
        replica: the only one that can answer, None for any.
    """

    scope: dict[str, Any]
    body: bytes
    marks: tuple[bytes, ...] = ()
    replica: str | None = None


def plain_scope(scope: Scope) -> dict[str, Any]:
    """The part of a scope that another process can use."""
    return {name: scope[name] for name in _KEPT if name in scope}


def joined(messages: list[Message]) -> list[Message]:
    """The same answer in fewer messages: each costs as much to send as many bytes."""
    found: list[Message] = []
    for message in messages:
        last = found[-1] if found else None
        if last is not None and last["type"] == message["type"] == "http.response.body":
            found[-1] = {**message, "body": last.get("body", b"") + message.get("body", b"")}
        else:
            found.append(message)
    return found

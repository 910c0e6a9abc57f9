"""HTTP as uvicorn speaks it, except for what hurts: heads without a bound or an end, offers of other protocols, old clients.

The parser itself takes heads of any length, for as long as a client likes to take over them, and drops the body of a request that
offers to go on in another protocol, as Java's HTTP client does with every first one. A server may go on as if nothing had been
offered (RFC 9110, 7.8). Chunks are not sent to clients of older versions, which do not know them (RFC 9112, 6.1).
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from typing import Any

import httptools
from starlette.types import Message, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from specontext.server.errors import ApiError, DrainingError, as_api_error, error_response
from specontext.server.facts import FACTS
from specontext.server.logs import fields, shortened

logger = logging.getLogger("specontext.server")

LONGEST_HEAD = 1 << 16  # bytes of address and headers
_LINGER = 2.0  # seconds in which a client that was refused may end its side
_OFFER = re.compile(rb"(?i)\r\nupgrade(?=:)")
_HTTP2 = re.compile(rb"PRI \* HTTP/2")
_TLS = re.compile(rb"\x16\x03[\x00-\x04]")  # how a client begins that was told https


def http_protocol(receive_timeout: float, *, log: bool, refused: Callable[[str], None]) -> type[HttpToolsProtocol]:
    """The protocol of a server's connections.

    Args:
        receive_timeout: seconds in which the head of a request must have come; 0 is no limit.
        log: write a line for each request that is refused here.
        refused: told of each of them, by the code of its answer.
    """

    class Configured(BoundedHttp):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.receive_timeout, self.log, self.refused = receive_timeout, log, refused

    return Configured


class BoundedHttp(HttpToolsProtocol):
    """Bounds heads in bytes and time, refuses what is no request in the server's own form, and passes over other protocols."""

    receive_timeout: float
    log: bool
    refused: Callable[[str], None]
    _in_head = True
    _begun = False  # more than empty lines has come of the head
    _head_bytes = 0
    _over = False  # nothing that comes is read any more
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._over:
            return
        self._unset_keepalive_if_required()
        self._watch()
        room = len(data)
        if self._in_head:
            room = LONGEST_HEAD - self._head_bytes
            self._head_bytes += min(room, len(data))
            if _OFFER.search(data, 0, end := _head_end(data)):
                data = _OFFER.sub(b"\r\nx-offered", data[:end]) + data[end:]
        self._parse(data[:room])
        if len(data) > room and self._in_head and self._head_bytes == LONGEST_HEAD:
            self._refuse(ApiError(400, f"address and headers are longer than {LONGEST_HEAD} bytes: shorten them"))
        elif len(data) > room:
            self._parse(data[room:])

    def _parse(self, data: bytes) -> None:
        if self._over or self.transport.is_closing():
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self._refuse(ApiError(400, _what_came(data)))
        except httptools.HttpParserUpgrade:  # an offer that came in two pieces, or behind another request
            self._over = True
            self.cycle.keep_alive = False  # the parser goes on no more: what has come is answered, and nothing after it

    def on_message_begin(self) -> None:
        self._watch()
        self._begun = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()
        if self.parser.get_http_version() != "1.1":
            self.cycle.send = _without_chunks(self.cycle)  # type: ignore[method-assign, assignment]

    def on_message_complete(self) -> None:
        self._unwatch()
        self._in_head, self._begun, self._head_bytes = True, False, 0  # what comes next is another one's
        super().on_message_complete()

    def shutdown(self) -> None:
        """As uvicorn does; who has not sent a whole request is not waited for."""
        if self._answering and self.cycle.disconnected:
            self.transport.close()
        elif self._answering and self._silent and self.cycle.more_body:
            self._refuse(as_api_error(DrainingError("the server is shutting down: try another one")))
        else:
            super().shutdown()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _silent(self) -> bool:
        """Whether no answer has been begun that has not ended."""
        return not self._answering or not (self.pipeline or self.cycle.response_started)

    def _watch(self) -> None:
        if self._timer is None and self.receive_timeout:
            self._timer = self.loop.call_later(self.receive_timeout, self._too_slow)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self._answering:  # its application bounds the body, and what follows waits for the answer
            self._watch()
        elif self._in_head and self._begun:
            said = f"address and headers did not come within {self.receive_timeout:g} s: send them at once"
            self._refuse(ApiError(408, said, code="request_timeout"))
        else:
            self.transport.close()

    def _linger(self) -> None:
        """Read on without listening: who is still sending would lose the answer with the connection."""
        self._over = True
        if self._answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.flow.resume_reading()
        self.transport.write_eof()
        self._unwatch()
        self._timer = self.loop.call_later(_LINGER, self.transport.close)

    def _refuse(self, error: ApiError) -> None:
        """Answer what no application can, unless another answer is under way, and close the connection."""
        if self._over or self.transport.is_closing():
            return
        scope: dict[str, Any] = {"path": "" if self._in_head else self.scope.get("path", "")}
        answer = error_response(error, scope)
        if self._silent:
            head = [*self.server_state.default_headers, *answer.raw_headers]
            lines = [b"HTTP/1.1 %d %s" % (error.status_code, _REASONS[error.status_code]), b"connection: close"]
            lines += [name + b": " + value for name, value in head if name != b"connection"]
            self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + bytes(answer.body))
            self._linger()
        else:
            self.transport.close()
        self.refused(error.code or "invalid_request")
        if self.log:
            shown = {"client": self.client[0] if self.client else None, "path": shortened(scope["path"]) or None}
            logger.info("%s", fields("request", shown | {"status": error.status_code, "outcome": "refused"} | scope[FACTS]))


_REASONS = {400: b"Bad Request", 408: b"Request Timeout", 503: b"Service Unavailable"}


def _head_end(data: bytes) -> int:
    """Where the head ends in what was read, if it does not begin with a head's last bytes."""
    place = data.find(b"\r\n\r\n")
    return len(data) if place < 0 else place + 2


def _what_came(data: bytes) -> str:
    if _TLS.match(data):
        return "this is TLS, and the server speaks plain HTTP: write http:// in the address, or put a proxy in front of it"
    if _HTTP2.match(data):
        return "this is HTTP/2, and the server speaks HTTP/1.1"
    return "this is no valid request of HTTP/1.1"


def _without_chunks(cycle: RequestResponseCycle) -> Send:
    """Sends the answer of a cycle; where its length is not known, it ends with the connection."""
    send, unbounded = cycle.send, False

    async def send_plain(message: Message) -> None:
        nonlocal unbounded
        if message["type"] == "http.response.start":
            unbounded = not any(name.lower() == b"content-length" for name, _ in message["headers"])
            cycle.chunked_encoding = False if unbounded else None
        elif unbounded:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)  # type: ignore[arg-type]

    return send_plain

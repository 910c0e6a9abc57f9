"""Bodies have a bound, and so has the time that a client may take to send one."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specontext.server.errors import ApiError, error_response

SLOWEST = 4096  # bytes a second that a body may come at, behind the time that every request has


class BodyLimit:
    """Refuses bodies that are too long, without keeping them, and bodies that do not come.

    Args:
        most: bytes.
        seconds: in which a body must have come, and one more for every `SLOWEST` bytes of it; 0 is no limit.
    """

    def __init__(self, app: ASGIApp, *, most: int, seconds: float) -> None:
        self.app, self.most, self.seconds = app, most, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self.most:
            if "expect" not in headers:  # else the client asks before it sends
                await self._discard(receive)
            return await error_response(self._too_long(), scope)(scope, receive, send)
        began, read, more = asyncio.get_running_loop().time(), 0, True

        async def receive_limited() -> Message:
            nonlocal read, more
            try:
                async with asyncio.timeout_at(began + self.seconds + read / SLOWEST if self.seconds and more else None):
                    message = await receive()
            except TimeoutError:
                raise self._too_slow(read) from None
            more = more and message.get("more_body", False)
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                if read > self.most:
                    if message.get("more_body"):
                        await self._discard(receive)
                    raise self._too_long()
            return message

        await self.app(scope, receive_limited, send)

    async def _discard(self, receive: Receive) -> None:
        """Read on a little, since most clients look at the answer only when they have sent everything."""
        left = 4 * self.most
        try:
            async with asyncio.timeout(self.seconds or None):
                while left > 0:
                    message = await receive()
                    if message["type"] != "http.request" or not message.get("more_body"):
                        return
                    left -= len(message.get("body", b""))
        except TimeoutError:
            return

    def _too_long(self) -> ApiError:
        return ApiError(
            413,
            f"the body is longer than {self.most} bytes: shorten it, or raise --max-body-size",
            code="body_too_large",
            headers={"Connection": "close"},
        )

    def _too_slow(self, read: int) -> ApiError:
        return ApiError(
            408,
            f"only {read} bytes of the body have come within {self.seconds + read / SLOWEST:.3g} s: send it at once",
            code="request_timeout",
            headers={"Connection": "close"},
        )

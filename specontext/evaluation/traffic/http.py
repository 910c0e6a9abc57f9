"""A small HTTP/1.1 client for asyncio: it shares its machine with the server that it measures, so it has to be cheap."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from specontext.errors import SpeContextError


class HttpError(SpeContextError):
    """A server that cannot be reached, answers with an error, or breaks off.

    Attributes:
        status: of the answer; None where there was none.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Address:
    """Where a server is, from a URL such as `http://127.0.0.1:8000` or `https://host/prefix/v1`."""

    host: str
    port: int
    secure: bool
    path: str
    api_key: str | None = None

    @classmethod
    def parse(cls, url: str, api_key: str | None = None) -> Address:
        """Raises HttpError for something that is no http or https URL."""
        try:
            parts = urlsplit(url if "//" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:
            raise HttpError(f"'{url}' is not a URL: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise HttpError(f"'{url}' is not a URL of a server: write for example http://127.0.0.1:8000")
        secure = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if secure else 80), secure, path, api_key)


class Exchange:
    """One request and its answer, on a connection of its own: `async with Exchange(...) as answer`.

    Raises:
        HttpError: see there; an answer with an error status too.
    """

    def __init__(self, address: Address, method: str, path: str, body: Any = None) -> None:
        self.address = address
        data = b"" if body is None else json.dumps(body).encode()
        lines = [
            f"{method} {address.path}{path} HTTP/1.1",
            f"Host: {address.host}:{address.port}",
            "Connection: close",
            f"Content-Length: {len(data)}",
        ]
        lines += ["Content-Type: application/json"] if data else []
        lines += [f"Authorization: Bearer {address.api_key}"] if address.api_key else []
        self._request = "\r\n".join(lines).encode() + b"\r\n\r\n" + data

    async def __aenter__(self) -> Exchange:
        secure = ssl.create_default_context() if self.address.secure else None
        try:
            self._reader, self._writer = await asyncio.open_connection(self.address.host, self.address.port, ssl=secure)
        except (OSError, ValueError) as error:  # ValueError: a name that no host can have
            reason = getattr(error, "strerror", None) or error
            raise HttpError(f"cannot reach {self.address.host}:{self.address.port}: {reason}") from error
        try:
            self._writer.write(self._request)
            await self._read_head()
            if self.status >= 400:
                raise HttpError(_message(await self.read(), self.status), self.status)
        except BaseException as error:
            self._writer.close()
            if isinstance(error, OSError | asyncio.IncompleteReadError | ValueError):
                raise HttpError(f"the server broke off: {error}") from error
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._writer.close()

    async def _read_head(self) -> None:
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *rest = head.split("\r\n")
        self.status = int(first.split(" ", 2)[1])
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
        self._chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        self._length = int(headers["content-length"]) if "content-length" in headers else None

    async def _pieces(self) -> AsyncIterator[bytes]:
        if not self._chunked:
            yield await (self._reader.read() if self._length is None else self._reader.readexactly(self._length))
            return
        while size := int((await self._reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield (await self._reader.readexactly(size + 2))[:-2]

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([piece async for piece in self._pieces()])

    async def events(self) -> AsyncIterator[Any]:
        """The server-sent events of the body, up to `[DONE]`.

        Raises:
            HttpError: an event is an error, or the stream breaks off.
        """
        rest = b""
        try:
            async for piece in self._pieces():
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        return
                    event = json.loads(data)
                    if "error" in event:
                        raise HttpError(_message(data, self.status), self.status)
                    yield event
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            raise HttpError(f"the server broke off: {error or type(error).__name__}") from error
        raise HttpError("the server broke off: the stream has no end mark")


async def fetch_json(address: Address, method: str, path: str, body: Any = None) -> Any:
    """The JSON that a server answers with."""
    async with Exchange(address, method, path, body) as answer:
        data = await answer.read()
    try:
        return json.loads(data)
    except ValueError as error:
        raise HttpError(f"the server's answer to {path} is not JSON") from error


def _message(body: bytes, status: int) -> str:
    try:
        found = json.loads(body)
        error = found.get("error", found)
        text = error.get("message") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = None
    return str(text) if text else f"the server answered with status {status}"

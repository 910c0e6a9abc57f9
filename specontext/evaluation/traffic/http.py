"""A small HTTP/1.1 client for asyncio: it shares its machine with the server that it measures, so it has to be cheap."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlsplit

from specontext.errors import SpeContextError, shown

_STATUS_LINE = re.compile(r"HTTP/\d(?:\.\d)? (?P<status>\d{3})\b")


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
        """Raises HttpError for something that is no http or https URL, or has more than host, port and path."""
        try:
            parts = urlsplit(url if "//" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:
            raise HttpError(f"'{url}' is not a URL: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise HttpError(f"'{url}' is not a URL of a server: write for example http://127.0.0.1:8000")
        if parts.query or parts.fragment or parts.username is not None:
            raise HttpError(
                f"{parts.hostname}: a server's address has a host, a port and a path, and no user, ? or #: leave these out (keys "
                "are an option of their own)"
            )
        secure = parts.scheme == "https"
        path = quote(parts.path.rstrip("/").removesuffix("/v1"), safe="/%:@!$&'()*+,;=~")
        return cls(parts.hostname, port or (443 if secure else 80), secure, path, api_key)

    @property
    def place(self) -> str:
        """Host and port, as URLs have them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


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
            f"Host: {address.place}",
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
            raise HttpError(f"cannot reach {self.address.place}: {reason}") from error
        try:
            self._writer.write(self._request)
            with _whole():
                await self._read_head()
            if 300 <= self.status < 400:
                raise HttpError(f"{self.address.place} sends on to {self._location}: give that address", self.status)
            if self.status >= 400:
                raise HttpError(_message(await self.read(), self.status), self.status)
        except BaseException:
            self._writer.close()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._writer.close()

    async def _read_head(self) -> None:
        self.status = 100
        while self.status < 200:  # what comes before is of no account
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *rest = head.split("\r\n")
            line = _STATUS_LINE.match(first)
            if line is None:
                raise HttpError(f"what answers at {self.address.place} does not speak HTTP: give the address of a server")
            self.status = int(line["status"])
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
        self._location = shown(headers.get("location", "nowhere"))
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
        with _whole():
            return b"".join([piece async for piece in self._pieces()])

    async def json(self) -> Any:
        """The whole body, which is JSON."""
        data = await self.read()
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise HttpError("the server's answer is not JSON: is it the address of an OpenAI-compatible server?") from error

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The server-sent events of the body, JSON objects, up to `[DONE]`.

        Raises:
            HttpError: an event is an error, or the stream breaks off.
        """
        rest = b""
        with _whole():
            async for piece in self._pieces():
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        return
                    event = json.loads(data)
                    if not isinstance(event, dict):
                        raise HttpError(f"the server's stream has an event that is no object: {shown(event)}")
                    if event.get("error"):
                        raise HttpError(_message(data, self.status), self.status)
                    yield event
        raise HttpError("the server broke off: the stream has no end mark")


async def fetch_json(address: Address, method: str, path: str, body: Any = None) -> Any:
    """The JSON that a server answers with."""
    async with Exchange(address, method, path, body) as answer:
        return await answer.json()


@contextmanager
def _whole() -> Iterator[None]:
    """What is read inside comes whole, and as HTTP has it; else HttpError."""
    try:
        yield
    except (OSError, EOFError, ValueError, RecursionError, asyncio.LimitOverrunError) as error:
        raise HttpError(f"the server broke off: {error or type(error).__name__}") from error


def _message(body: bytes, status: int) -> str:
    try:
        found = json.loads(body)
        error = found.get("error", found)
        text = error.get("message") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = None
    return str(text) if text else f"the server answered with status {status}"

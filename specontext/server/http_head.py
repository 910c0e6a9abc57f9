"""HTTP as uvicorn speaks it, except for what comes before a body: it has a bound, and offers of HTTP/2 in it are passed over.

The parser itself takes heads of any length, and drops the body of a request that offers to go on in another protocol, as Java's
HTTP client does with every first one. A server may go on as if nothing had been offered (RFC 9110, 7.8).
"""

from __future__ import annotations

import re

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

LONGEST_HEAD = 1 << 16  # bytes of address and headers, give or take what one read brings
_OFFER = re.compile(rb"(?i)\r\nupgrade(?=:[ \t]*h2c?[ \t]*\r\n)")


def _head_end(data: bytes) -> int:
    place = data.find(b"\r\n\r\n")
    return len(data) if place < 0 else place + 2


class BoundedHttp(HttpToolsProtocol):
    """Refuses requests whose address and headers are too long, and answers those that offer HTTP/2 as if they did not."""

    _in_head = True
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
            end = _head_end(data)
            if _OFFER.search(data, 0, end):
                data = _OFFER.sub(b"\r\nx-offered", data[:end]) + data[end:]
        super().data_received(data)
        if self._in_head and self._head_bytes > LONGEST_HEAD and not self.transport.is_closing():
            self.send_400_response(f"address and headers are longer than {LONGEST_HEAD} bytes")

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head, self._head_bytes = True, 0  # what comes next is another one's
        super().on_message_complete()

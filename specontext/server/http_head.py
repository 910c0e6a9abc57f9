"""HTTP as uvicorn speaks it, with a bound on what comes before a body: the parser itself takes heads of any length."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

LONGEST_HEAD = 1 << 16  # bytes of address and headers, give or take what one read brings


class BoundedHttp(HttpToolsProtocol):
    """Refuses requests whose address and headers are too long."""

    _in_head = True
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > LONGEST_HEAD and not self.transport.is_closing():
            self.send_400_response(f"address and headers are longer than {LONGEST_HEAD} bytes")

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

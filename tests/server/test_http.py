"""HTTP below the application: old clients, slow ones, offers of other protocols and what is no request at all."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from specontext.server.body_limit import SLOWEST
from specontext.server.http_protocol import LONGEST_HEAD
from tests.server.serving import PATIENCE, Server, make_engine, running, wait_for
from tests.server.test_operators import samples

TEXT, HEALTH = "/v1/completions", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
BODY: dict[str, Any] = {"prompt": "apple", "max_tokens": 3, "ignore_eos": True}
LIMIT = 0.4  # seconds


@pytest.fixture(scope="module")
def strict() -> Iterator[Server]:
    """A server that waits for nobody."""
    with running(make_engine(), receive_timeout=LIMIT, timeout_keep_alive=LIMIT, max_body_size=10**6) as server:
        yield server
        server.check_idle()


def post(body: dict[str, Any] | bytes, *headers: str, path: str = TEXT, version: str = "1.1", length: int | None = None) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", "Host: x", "Content-Type: application/json", *headers]
    lines += [f"Content-Length: {len(data) if length is None else length}"] if "Transfer-Encoding: chunked" not in headers else []
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE)


def read_to_end(connection: socket.socket) -> bytes:
    received = b""
    while piece := connection.recv(1 << 16):
        received += piece
    return received


def exchange(server: Server, *pieces: bytes, pause: float = 0) -> bytes:
    """All that comes until the server closes the connection."""
    with connect(server) as connection:
        for number, piece in enumerate(pieces):
            threading.Event().wait(pause if number else 0)
            connection.sendall(piece)
        return read_to_end(connection)


def error_of(answer: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize("connection", [(), ("Connection: keep-alive",)])
def test_a_stream_to_a_client_of_http_1_0(server: Server, connection: tuple[str, ...]) -> None:
    head, _, body = exchange(server, post(BODY | {"stream": True}, *connection, version="1.0")).partition(b"\r\n\r\n")
    assert b" 200 " in head and b"transfer-encoding" not in head.lower() and b"connection: close" in head.lower()
    *events, done, rest = body.split(b"\n\n")
    assert done == b"data: [DONE]" and not rest
    assert all(json.loads(event.removeprefix(b"data: "))["choices"] for event in events) and len(events) >= 3


def test_other_answers_to_a_client_of_http_1_0(server: Server) -> None:
    head, _, body = exchange(server, post(BODY, version="1.0")).partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head and json.loads(body)["usage"]["completion_tokens"] == 3
    assert exchange(server, b"HEAD /version HTTP/1.0\r\n\r\n").endswith(b"\r\n\r\n")
    assert error_of(exchange(server, b"GET /nowhere HTTP/1.0\r\n\r\n"))[0] == 404


@pytest.mark.parametrize(
    ("pieces", "status"),
    [
        ((b"",), None),  # nothing at all
        ((b"\r\n", b"\r\n"), None),
        ((b"POST /v1/comp",), 408),
        ((b"POST /v1/completions HTTP/1.1\r\n", b"a: b\r\n", b"a: b\r\n"), 408),
        ((post(b'{"prompt":', length=50),), 408),
        ((post(b"{", length=50), b" ", b" "), 408),
        ((post(b"4\r\n", "Transfer-Encoding: chunked"),), 408),
        ((post(b"", path="/nowhere", length=50), b" ", b" "), 404),  # was answered early
        ((HEALTH,), 200),
        ((HEALTH, b"\r\n", b"\r\n"), 200),
    ],
)
def test_a_client_that_stops_is_not_waited_for(strict: Server, pieces: tuple[bytes, ...], status: int | None) -> None:
    began = time.monotonic()
    with connect(strict) as connection:
        threading.Thread(target=_drip, args=(connection, pieces), daemon=True).start()
        answer = read_to_end(connection)
    assert time.monotonic() - began >= 0.9 * LIMIT
    assert answer.count(b"HTTP/1.1 ") == (status is not None)
    assert status is None or int(answer.split()[1]) == status
    if status == 408:
        assert error_of(answer)[1]["code"] == "request_timeout"


def _drip(connection: socket.socket, pieces: tuple[bytes, ...]) -> None:
    try:
        for piece in pieces:
            connection.sendall(piece)
            threading.Event().wait(LIMIT / 8)
    except OSError:
        return  # the server has closed


def test_a_slow_answer_is_no_slow_request(strict: Server) -> None:
    """Neither is what a client sends while it waits for it."""
    slow = BODY | {"max_tokens": 300, "stream": True}
    answer = exchange(strict, post(slow), b"\r\n", post(BODY)[:20], pause=0.01)
    assert answer.count(b"data: [DONE]") == 1 and answer.count(b"HTTP/1.1 200") == 1
    assert answer.count(b"HTTP/1.1 408") == 1  # the second request never came


def test_large_bodies_have_more_time(strict: Server) -> None:
    body = json.dumps(BODY).encode()
    assert error_of(exchange(strict, post(body[:-1], length=len(body))))[0] == 408
    body = b" " * SLOWEST + body
    assert exchange(strict, post(body[:-1], "Connection: close", length=len(body)), body[-1:], pause=1.5 * LIMIT).startswith(
        b"HTTP/1.1 200"
    )


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ((b"\x16\x03\x01\x02\x00\x01" + b"\0" * 60,), "TLS"),
        ((b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",), "HTTP/2"),
        ((b"hello\r\n\r\n",), "no valid request"),
        ((b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n",), ""),
        ((post(b"ZZ\r\n{", "Transfer-Encoding: chunked"),), "no valid request"),
        ((post(b"{}", "Transfer-Encoding: chunked", "Content-Length: 2"),), "no valid request"),
        ((post(b"", "Content-Length: 5"),), "no valid request"),
        ((b"GET /health HTTP/1.1\r\nContent-Length: -1\r\n\r\n",), "no valid request"),
        ((b"GET /health HTTP/1.1\r\nHost: a\r\n folded: b\r\n\r\n",), "no valid request"),
        ((b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * (LONGEST_HEAD // 6 + 1) + b"\r\n",), "longer than"),
        ((b"GET /health HTTP/1.1\r\n", *[b"a: b\r\n" * 1000] * 11, b"\r\n"), "longer than"),
        ((b"GET /" + b"a" * LONGEST_HEAD + b" HTTP/1.1\r\n\r\n",), "longer than"),
    ],
)
def test_what_is_no_request(server: Server, caplog: pytest.LogCaptureFixture, pieces: tuple[bytes, ...], said: str) -> None:
    before = samples(server)
    caplog.set_level(logging.INFO, "specontext.server")
    status, error = error_of(exchange(server, *pieces))
    assert status == 400 and said in error["message"]
    assert samples(server)["specontext:request_refused_total", "invalid_request"] == (
        before["specontext:request_refused_total", "invalid_request"] + 1
    )
    assert [record for record in caplog.records if "status=400 outcome=refused" in record.getMessage()]


def test_who_is_still_sending_when_it_is_refused_reads_why(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET /")
        for _ in range(40):
            connection.sendall(b"a" * 20_000)
            threading.Event().wait(0.002)
        status, error = error_of(read_to_end(connection))
    assert status == 400 and "longer than" in error["message"]


def test_a_head_of_the_greatest_length_before_a_long_body(server: Server) -> None:
    data = json.dumps(BODY).encode() + b" " * 300_000
    head = post(data, "X-Long: %s").partition(b"\r\n\r\n")[0]
    head = head.replace(b"%s", b"a" * (LONGEST_HEAD - len(head) - 2))
    assert len(head) + 4 == LONGEST_HEAD
    for pieces in ((head + b"\r\n\r\n" + data,), (head + b"\r\n", b"\r\n" + data)):
        with connect(server) as connection:
            for piece in pieces:
                connection.sendall(piece)
                threading.Event().wait(0.02)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")


def test_what_follows_a_request_does_not_end_in_its_answer(server: Server) -> None:
    answer = exchange(server, post(BODY | {"max_tokens": 1000, "stream": True}), b"no request\r\n\r\n", pause=0.1)
    assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1") == 1


def test_a_client_that_leaves_amid_its_body_was_not_refused(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "specontext.server")
    before = samples(server)
    with connect(server) as connection:
        connection.sendall(post(b"{", "X-Request-Id: leaves-early", length=50))
    wait_for(lambda: any("leaves-early" in record.getMessage() for record in caplog.records))
    [line] = {record.getMessage() for record in caplog.records if "leaves-early" in record.getMessage()}
    assert "outcome=client_left" in line and "status" not in line
    refused = {key: value for key, value in samples(server).items() if key[0] == "specontext:request_refused_total"}
    assert refused == {key: before[key] for key in refused}


def test_offers_of_other_protocols_are_passed_over(server: Server) -> None:
    offer = (
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    )
    with connect(server) as connection:
        connection.sendall(post(BODY, *offer))
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        connection.sendall("\r\n".join(["GET /v1/realtime HTTP/1.1", *offer]).encode() + b"\r\n\r\n")
        assert wait_for(lambda: b"there is no such path" in connection.recv(1 << 16))


def test_offers_that_are_seen_too_late_end_the_connection(server: Server) -> None:
    """In two pieces, or behind another request; what came before them is answered."""
    offer = b"GET /version HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    for pieces, answers in (((offer[:50], offer[50:], HEALTH), 1), ((HEALTH + offer + HEALTH,), 2)):
        answer = exchange(server, *pieces, pause=0.02)
        assert answer.count(b"HTTP/1.1 200") == answers and answer.endswith(b"}")


def test_requests_in_pieces_and_on_one_connection(server: Server) -> None:
    data = json.dumps(BODY).encode()
    chunked = post(b"%x\r\n%s\r\n1\r\n%s\r\n0\r\n\r\n" % (len(data) - 1, data[:-1], data[-1:]), "Transfer-Encoding: chunked")
    last = post(BODY | {"stream": True}, "Connection: close")
    whole = HEALTH + post(BODY) + chunked + post(b"{}x") + last
    for step in (7, 60, 211, len(whole)):
        answer = exchange(server, *(whole[begin : begin + step] for begin in range(0, len(whole), step)))
        assert answer.count(b"HTTP/1.1 200") == 4 and answer.count(b"HTTP/1.1 400") == 1
        assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_who_asks_before_sending_too_much_need_not_send_it(strict: Server) -> None:
    status, error = error_of(exchange(strict, post(b"", "Expect: 100-continue", length=10**9)))
    assert status == 413 and error["code"] == "body_too_large"  # and no 100 before it


def test_half_a_request_does_not_hold_up_the_end() -> None:
    with running(make_engine(), shutdown_timeout=50) as server:
        with connect(server) as connection:
            connection.sendall(post(b'{"prompt":', length=50))
            wait_for(lambda: server.serving.server.server_state.tasks)
            server.stop()
            status, error = error_of(read_to_end(connection))
            assert status == 503 and error["code"] == "shutting_down"
        server.thread.join(5)
        assert not server.thread.is_alive()

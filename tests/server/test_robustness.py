"""Slow readers, clients that vanish, crowds and broken weights: nobody else is hurt and every page comes back."""

from __future__ import annotations

import concurrent.futures
import json
import logging
import math
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from specontext.engine.llm_engine import LLMEngine
from specontext.errors import RequestError
from tests.server.serving import PATIENCE, Server, check_free, make_engine, running, wait_for

TEXT = "/v1/completions"
ENDLESS = {"prompt": "the sun", "max_tokens": 1900, "ignore_eos": True, "temperature": 0}


def open_stream(server: Server, body: dict[str, Any], *, window: int | None = None) -> socket.socket:
    """A connection on which a request was sent and nothing has been read."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    if window is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    connection.settimeout(PATIENCE)
    connection.connect((host, int(port)))
    data = json.dumps(body | {"stream": True}).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def test_a_client_that_vanishes_in_mid_stream(server: Server) -> None:
    connection = open_stream(server, ENDLESS | {"n": 3})
    assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert server.open_outputs == 3
    connection.close()
    server.check_idle()


def test_the_log_says_how_a_stream_ended(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    def logged(words: str) -> bool:
        return any(words in record.getMessage() and "status=200" in record.getMessage() for record in caplog.records)

    caplog.set_level(logging.INFO, "specontext.server")
    connection = open_stream(server, ENDLESS)
    assert connection.recv(100).startswith(b"HTTP/1.1 200")
    connection.close()
    wait_for(lambda: logged("outcome=client_left"))
    with server.client() as client, client.stream("POST", TEXT, json=ENDLESS | {"stream": True}) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
        server.serving.state.engine.abort_all(RequestError("enough"))
        assert any("enough" in line for line in lines)
    wait_for(lambda: logged("reason=enough"))
    server.check_idle()


def test_a_client_that_vanishes_before_the_answer(server: Server) -> None:
    with server.client() as client, pytest.raises(httpx.ReadTimeout):
        client.post(TEXT, json=ENDLESS, timeout=0.3)
    server.check_idle()


def test_a_client_that_vanishes_while_it_waits_in_the_queue() -> None:
    with running(make_engine(max_num_seqs=1)) as server:
        first = open_stream(server, ENDLESS)
        assert first.recv(100)
        second = open_stream(server, ENDLESS)
        wait_for(lambda: server.open_outputs == 2)
        second.close()
        wait_for(lambda: server.open_outputs == 1)
        first.close()
        server.check_idle()


@pytest.mark.slow
def test_a_slow_reader_stalls_nobody_and_costs_no_memory() -> None:
    """Its answer is longer than all buffers on the way, since every token comes with 20 log-probabilities."""
    with running(make_engine()) as server:
        server.serving.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
        _read_slowly(server)


def _read_slowly(server: Server) -> None:
    outputs, length = 8, 240
    slow = open_stream(server, ENDLESS | {"logprobs": 20, "n": outputs, "max_tokens": length}, window=4096)
    wait_for(lambda: server.open_outputs == outputs)
    for _ in range(3):
        assert server.post(TEXT, ENDLESS | {"max_tokens": 5}).status_code == 200
    wait_for(lambda: not server.open_outputs, "the slow reader's request")  # made to its end although nobody reads
    received = b""
    while b"data: [DONE]" not in received[-100:]:
        piece = slow.recv(1 << 20)
        assert piece, "the answer broke off"
        received += piece
    slow.close()
    tokens, pieces = 0, 0
    for line in received.split(b"\n"):
        if line.startswith(b"data: {"):
            pieces += 1
            tokens += sum(len(choice["logprobs"]["tokens"]) for choice in json.loads(line[6:])["choices"])
    assert tokens == outputs * length
    assert pieces < tokens  # what could not be sent was put together
    server.check_idle()


def test_a_hundred_at_once(server: Server) -> None:
    bodies = [
        {
            "prompt": [5 + i % 7] * (1 + i % 40),
            "max_tokens": 1 + i % 9,
            "temperature": 0,
            "ignore_eos": True,
            "stream": i % 2 == 0,
        }
        for i in range(100)
    ]
    limits = httpx.Limits(max_connections=100)
    with server.client(limits=limits) as client, concurrent.futures.ThreadPoolExecutor(100) as threads:
        answers = list(threads.map(lambda body: client.post(TEXT, json=body), bodies))
    for body, answer in zip(bodies, answers, strict=True):
        assert answer.status_code == 200
        if body["stream"]:
            assert answer.text.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in answer.text
        else:
            assert answer.json()["usage"]["completion_tokens"] == body["max_tokens"]
    server.check_idle()


def test_a_full_queue() -> None:
    with running(make_engine(max_num_seqs=1), max_queued_requests=2) as server:
        streams = [open_stream(server, ENDLESS)]
        assert streams[0].recv(100)
        # The answer begins before the request does: it has left the queue when a step has followed its first token.
        wait_for(lambda: any(len(r.token_ids) > r.prompt_length + 1 for r in list(server.engine.scheduler.running)))
        streams += [open_stream(server, ENDLESS) for _ in range(2)]
        wait_for(lambda: server.open_outputs == 3)
        refused = server.post(TEXT, ENDLESS)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        for stream in streams:
            stream.close()
        server.check_idle()
        assert server.post(TEXT, ENDLESS | {"max_tokens": 1}).status_code == 200


def test_an_error_after_the_beginning_is_the_next_event(server: Server) -> None:
    from specontext.errors import LogitsError

    step = server.engine.step
    good_ready = threading.Event()

    def broken(*arguments: Any) -> Any:
        bad = [r for r in server.engine.scheduler.running if r.params.max_tokens == 1500 and len(r.token_ids) > r.prompt_length]
        if bad and good_ready.is_set():
            server.engine.step = step  # type: ignore[method-assign]
            raise LogitsError([bad[0].request_id])
        return step(*arguments)

    server.engine.step = broken  # type: ignore[method-assign]
    good = open_stream(server, ENDLESS | {"max_tokens": 200})
    assert good.recv(100)
    good_ready.set()
    with server.client() as client, client.stream("POST", TEXT, json=ENDLESS | {"max_tokens": 1500, "stream": True}) as answer:
        assert answer.status_code == 200
        *_, error, done = [line for line in answer.iter_lines() if line]
    assert done == "data: [DONE]" and "not numbers" in json.loads(error.removeprefix("data: "))["error"]["message"]
    received = b""
    while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        received += good.recv(1 << 16)
    assert b'"finish_reason":"length"' in received
    good.close()
    server.check_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_poisoned_weight_fails_the_requests_that_meet_it(checkpoint: Callable[[str], Path], stream: bool) -> None:
    engine = make_engine(checkpoint("llama"), offload_layers=1, budget=16, max_model_len=512, method={"sink": 2, "recent": 4})
    poison = 77
    engine.loaded.model.get_input_embeddings().weight[poison] = math.nan
    body = {"prompt": [9] * 20, "max_tokens": 60, "ignore_eos": True, "temperature": 0, "logit_bias": None}
    with running(engine) as server:
        before = server.post(TEXT, body).json()["choices"]
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            good = [threads.submit(server.post, TEXT, body) for _ in range(3)]
            wait_for(lambda: server.open_outputs >= 3)
            bad = server.post(TEXT, body | {"prompt": [9] * 10 + [poison] + [9] * 10, "stream": stream})
            found = [answer.result() for answer in good]
        assert "not numbers" in bad.text and (bad.status_code == 200 if stream else bad.status_code == 500)
        for answer in found:
            assert answer.status_code == 200 and answer.json()["choices"] == before
        assert server.post(TEXT, body).json()["choices"] == before  # in the pages that the poisoned one had
        assert server.get("/health").status_code == 200
        server.check_idle()


def test_a_dead_engine_ends_the_server() -> None:
    with running(make_engine()) as server:

        def broken(*_: Any) -> Any:
            raise ZeroDivisionError("a bug")

        server.engine.step = broken  # type: ignore[method-assign]
        answer = server.post(TEXT, ENDLESS)
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_dead"
        assert server.get("/health").status_code == 503
        assert server.post(TEXT, ENDLESS).json()["error"]["code"] == "engine_dead"
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive() and "died" in str(server.ended[0])


def checked_when_closed(engine: LLMEngine) -> LLMEngine:
    """The engine must have given back all pages by the time it is closed."""
    close = engine.close

    def closing() -> None:
        if not engine.closed:
            check_free(engine)
        close()

    engine.close = closing  # type: ignore[method-assign]
    return engine


def test_draining() -> None:
    with running(checked_when_closed(make_engine()), shutdown_timeout=PATIENCE) as own:
        stream = open_stream(own, ENDLESS | {"max_tokens": 300})
        assert stream.recv(100)
        own.stop()
        received = b""
        while piece := stream.recv(1 << 16):
            received += piece
        assert b'"finish_reason":"length"' in received and b"data: [DONE]" in received
        own.thread.join(PATIENCE)
        assert not own.thread.is_alive() and not own.ended
        with pytest.raises(httpx.ConnectError):
            own.get("/health")
        assert own.engine.closed


def test_draining_has_an_end() -> None:
    with running(checked_when_closed(make_engine()), shutdown_timeout=0.2) as server:
        stream = open_stream(server, ENDLESS)
        assert stream.recv(100)
        server.stop()
        received = b""
        while piece := stream.recv(1 << 16):
            received += piece
        assert b"shutting down" in received and b'"code":"shutting_down"' in received
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive() and not server.ended
        assert server.engine.closed

"""Every field whose size costs time or memory has a bound, and the error names it."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from specontext.server.bounded_body import MOST_CONTAINERS, MOST_STRINGS, check_structure
from specontext.server.errors import ApiError
from tests.server.serving import PATIENCE, Server
from tests.server.test_errors import CHAT, GOOD, TEXT, error_of

A = {"role": "user", "content": "a"}
PART = {"type": "text", "text": "a"}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("path", "fields", "param", "bound"),
    [
        (CHAT, {"messages": [A] * 4097}, "messages", 4096),
        ("/tokenize", {"messages": [A] * 4097}, "messages", 4096),
        (CHAT, {"messages": [{"role": "user", "content": [PART] * 16_385}]}, "messages", 16_384),
        (CHAT, {"messages": [{"role": "user", "content": [PART] * 5000}] * 4}, "messages", 16_384),
        (CHAT, {"messages": [A | {"name": "x" * 1025}]}, "messages.0.name", 1024),
        (CHAT, {"chat_template_kwargs": {"a": "x" * 65_536}}, "chat_template_kwargs", 65_536),
        (CHAT, {"chat_template_kwargs": {"x" * 65_536: 1}}, "chat_template_kwargs", 65_536),
        (CHAT, {"chat_template_kwargs": {"a": [0] * 65_536}}, "chat_template_kwargs", 65_536),
        (CHAT, {"chat_template_kwargs": {"a": nested(17)}}, "chat_template_kwargs", 16),
        (CHAT, {"chat_template_kwargs": {"a": nested(800)}}, "chat_template_kwargs", 16),
        (CHAT, {"metadata": {str(i): "a" for i in range(17)}}, "metadata", 16),
        (CHAT, {"metadata": {"a": "x" * 513}}, "metadata.a", 512),
        (CHAT, {"safety_identifier": "x" * 1025}, "safety_identifier", 1024),
        (CHAT, {"prompt_cache_key": "x" * 1025}, "prompt_cache_key", 1024),
        (CHAT, {"top_logprobs": 21, "logprobs": True}, "top_logprobs", 20),
        (TEXT, {"logprobs": 21}, "logprobs", 20),
        (TEXT, {"prompt": ["a"] * 513}, "prompt", 512),
        (TEXT, {"prompt": ["a"] * 10, "n": 100}, None, 512),
        (TEXT, {"prompt": [5] * 200_000}, None, 2048),
        ("/detokenize", {"tokens": [5] * 2049}, None, 2048),
        ("/tokenize", {"prompt": "a,b;" * 2048, "return_token_strs": True}, None, 2048),
        *((path, {"model": "x" * 1025}, "model", 1024) for path in (CHAT, TEXT, "/detokenize")),
        ("/tokenize", {"prompt": "a", "model": "x" * 1025}, "model", 1024),
        *((path, {"user": "x" * 1025}, "user", 1024) for path in (CHAT, TEXT)),
        *((path, {"method": "x" * 1025}, "method", 1024) for path in (CHAT, TEXT)),
        *((path, {"stop": ["a"] * 65}, "stop", 64) for path in (CHAT, TEXT)),
        *((path, {"stop_token_ids": [5] * 1025}, "stop_token_ids", 1024) for path in (CHAT, TEXT)),
        *((path, {"n": 129}, "n", 128) for path in (CHAT, TEXT)),
    ],
)
def test_bounds(server: Server, path: str, fields: dict[str, Any], param: str | None, bound: int) -> None:
    error = error_of(server.post(path, {"/detokenize": {"tokens": [5]}, **GOOD}.get(path, {}) | fields))
    assert error["param"] == param and str(bound) in error["message"] and len(error["message"]) < 300


def test_what_is_within_them_is_served(server: Server) -> None:
    variables = {"chat_template_kwargs": {"a": nested(15), "b": "x" * 60_000}, "metadata": {str(i): "a" for i in range(16)}}
    assert server.post(CHAT, GOOD[CHAT] | variables | {"user": "x" * 1024}).status_code == 200
    parts = [{"role": "user", "content": [PART] * 500}]
    assert server.post(CHAT, GOOD[CHAT] | {"messages": parts}).status_code == 200
    assert server.post(CHAT, GOOD[CHAT] | {"messages": [A, {"role": "assistant", "content": "b"}] * 250}).status_code == 200


def test_errors_quote_little_of_what_was_sent(server: Server) -> None:
    for path in (CHAT, TEXT):
        for field in (
            {"k" * 100_000: 1},
            {"method": "x" * 1000},
            {"model": "y" * 1000},
            {f"unknown{i}": 1 for i in range(10_000)},
        ):
            answer = server.post(path, GOOD[path] | field)
            assert answer.status_code in (400, 404) and len(answer.content) < 1500
    assert error_of(server.post(CHAT, GOOD[CHAT] | {"a": 1, "b": 2}))["param"] == "a"
    assert len(server.get("/v1/models/" + "x" * 10_000).content) < 500


@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
def test_bodies_of_too_many_values(server: Server, path: str) -> None:
    for body, bound in (
        (b'{"a": [' + b"[]," * MOST_CONTAINERS + b"[]]}", MOST_CONTAINERS),
        (b'{"a": [' + b"{}," * MOST_CONTAINERS + b"{}]}", MOST_CONTAINERS),
        (b'{"a": [' + b'"",' * MOST_STRINGS + b'""]}', MOST_STRINGS),
    ):
        answer = server.http.post(path, content=body, headers={"content-type": "application/json"})
        assert str(bound) in error_of(answer)["message"]


def test_what_stands_inside_of_texts_is_not_counted() -> None:
    text = '[{"' * (MOST_STRINGS + 10) + "\\"
    check_structure(json.dumps({"prompt": text}).encode())
    with pytest.raises(ApiError):
        check_structure(json.dumps({"prompt": text, "more": [[]] * (MOST_CONTAINERS + 1)}).encode())


def test_long_heads(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for line in (
        b"GET /" + b"x" * 300_000 + b" HTTP/1.1\r\n",
        b"GET /health HTTP/1.1\r\n" + (b"X-A: " + b"x" * 10_000 + b"\r\n") * 30,
    ):
        with socket.create_connection((host, int(port)), PATIENCE) as connection:
            try:
                connection.sendall(line)
                assert connection.recv(100).startswith(b"HTTP/1.1 400")
            except ConnectionError:
                pass  # closed before all of it was sent
    assert server.get("/health", headers={"x-long": "x" * 30_000}).status_code == 200


def test_offers_of_another_protocol_are_passed_over(server: Server) -> None:
    """Java's HTTP client offers HTTP/2 with the first request of each connection, body and all."""
    offer = {"Connection": "Upgrade, HTTP2-Settings", "HTTP2-Settings": "AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA"}
    body = {"prompt": "a\r\nUpgrade: h2c\r\n", "max_tokens": 1, "echo": True}
    for name in ("Upgrade", "upgrade"):
        answer = server.http.post("/v1/completions", json=body, headers=offer | {name: "h2c"})
        assert answer.status_code == 200 and answer.json()["choices"][0]["text"].startswith(body["prompt"])

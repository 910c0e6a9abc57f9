"""What `chat` and `bench serve` make of servers that are not ours, and of what is none: words, and never a traceback."""

from __future__ import annotations

import io
import json
import re
import socketserver
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from specontext.cli import main
from specontext.evaluation.traffic.http import Address, HttpError

USAGE = {"prompt_tokens": 3, "completion_tokens": 2}
MODELS = json.dumps({"data": [{"id": "m"}]}).encode()


def answer(body: bytes, status: str = "200 OK", header: str = "X: y") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{header}\r\n\r\n".encode() + body


def events(*found: Any) -> bytes:
    return answer(b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in found) + b"data: [DONE]\n\n")


def delta(**fields: Any) -> Any:
    return {"choices": [{"index": 0, **fields}]}


SAID = delta(delta={"content": "hello"})


class Canned(socketserver.ThreadingTCPServer):
    """Gives one answer to whatever is posted, and a list of models."""

    allow_reuse_address = daemon_threads = True
    gives = b""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[bytes] = []


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.rfile.readline()
        self.rfile.read(int(re.search(rb"Content-Length: (\d+)", head)[1]))  # type: ignore[index]
        server = self.server
        assert isinstance(server, Canned)
        server.asked.append(head)
        self.wfile.write(answer(MODELS) if head.startswith(b"GET") else server.gives)


@pytest.fixture
def canned() -> Iterator[Canned]:
    with Canned() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def run(canned: Canned, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*words: object, gives: bytes = b"") -> tuple[int, str, str]:
        canned.gives = gives
        status = main([*map(str, words), "--base-url", f"http://127.0.0.1:{canned.server_address[1]}"])
        out, err = capsys.readouterr()
        assert "Traceback" not in err and "Aborted" not in err
        return status, out, err

    return call


@pytest.mark.parametrize(
    "first",
    [
        {"choices": [{"delta": None}]},
        {"choices": None, "usage": USAGE},
        {"choices": []},
        {**SAID, "error": None},
        delta(delta={"content": [{"type": "text", "text": "oh "}, {"type": "thinking"}]}),
        delta(delta={"role": "assistant", "content": None, "reasoning_content": None}),
    ],
)
def test_a_chat_takes_what_servers_write_for_nothing(first: Any, run: Any) -> None:
    status, out, _ = run("chat", "--prompt", "hi", gives=events(first, SAID))
    assert status == 0 and out.endswith("hello\n")
    assert run("chat", "--prompt", "hi", gives=b"HTTP/1.1 103 Early\r\n\r\n" + events(SAID))[:2] == (0, "hello\n")


def test_a_chat_says_when_an_answer_was_cut(run: Any) -> None:
    status, out, err = run(
        "chat", "--prompt", "hi", "--max-tokens", 7, gives=events(SAID, delta(delta={}, finish_reason="length"))
    )
    assert (status, out) == (0, "hello\n") and "cut" in err and "7 tokens (--max-tokens)" in err
    assert "cut" not in run("chat", "--prompt", "hi", gives=events(SAID, delta(delta={}, finish_reason="stop")))[2]


@pytest.mark.parametrize(
    ("gives", "words"),
    [
        (b"", "broke off"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "does not speak HTTP"),
        (answer(b"", "301 Moved", "Location: https://there/"), "sends on to 'https://there/'"),
        (answer(b"<html>", "404 Not Found"), "status 404"),
        (answer(b'{"detail": "no"}', "422 No"), "status 422|no"),
        (answer(b"", "200 OK", "X: " + "y" * 200_000), "broke off"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{", "broke off"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "broke off"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", "broke off"),
        (answer(b"<html>"), "no end mark|not JSON"),
        (answer(b"[" * 100_000), "no end mark|not JSON"),
        (events(5), "no object|not JSON"),
        (events("x"), "no object|not JSON"),
        (events({"error": {"message": "tired"}}), "tired|not JSON"),
    ],
)
def test_what_is_no_server_is_told_in_words(gives: bytes, words: str, run: Any) -> None:
    load = ("bench", "serve", "--num-prompts", 1, "--num-warmups", 0, "--model", "m", "--tokenizer", "nano")
    for verb in (("chat", "--prompt", "hi"), load, (*load, "--no-stream")):
        status, out, err = run(*verb, gives=gives)
        assert status == 1 and out.strip() == "" and re.search(words, err), err


@pytest.mark.parametrize("choices", [5, [5], ["x"], {"a": 1}, [{"delta": "x"}]])
def test_a_stream_of_another_kind_is_no_chat(choices: Any, run: Any) -> None:
    status, _, err = run("chat", "--prompt", "hi", gives=events({"choices": choices}))
    assert status == 1 and "no choices as OpenAI's has" in err


@pytest.mark.parametrize("usage", [None, 5, {}, {"prompt_tokens": None, "completion_tokens": 1}, USAGE | {"prompt_tokens": "3"}])
def test_a_load_test_needs_a_server_that_counts_tokens(usage: Any, run: Any) -> None:
    load = ("bench", "serve", "--num-prompts", 1, "--num-warmups", 0, "--model", "m", "--tokenizer", "nano")
    for verb, gives in ((load, events({"choices": [], "usage": usage})), ((*load, "--no-stream"), b"")):
        gives = gives or answer(json.dumps({"choices": [], "usage": usage}).encode())
        status, _, err = run(*verb, gives=gives)
        assert status == 1 and "does not say how many tokens" in err
    assert run(*load, gives=events({"choices": [{"text": "a"}], "usage": USAGE}))[0] == 0


def test_addresses() -> None:
    for url, words in (
        ("http://me:secret@host/v1", "no user"),
        ("http://host/v1?api-version=1", "no user, \\? or #"),
        ("ftp://host", "not a URL of a server"),
    ):
        with pytest.raises(HttpError, match=words) as told:
            Address.parse(url)
        assert "secret" not in str(told.value)
    assert Address.parse("http://[::1]:8000/v1/").place == "[::1]:8000"
    assert Address.parse("https://host/a b/é/v1").path == "/a%20b/%C3%A9"


def test_keys_that_no_header_can_carry_are_not_sent(run: Any, canned: Canned) -> None:
    status, _, err = run("chat", "--prompt", "hi", "--api-key", "a\r\nX: b", gives=events(SAID))
    assert status == 2 and "no header can carry" in err and not canned.asked
    assert run("chat", "--prompt", "hi", "--api-key", " key ", gives=events(SAID))[0] == 0
    assert b"\r\nAuthorization: Bearer key\r\n" in canned.asked[-1]


def test_what_is_typed_must_be_text(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    status, out, err = run("chat", gives=events(SAID))
    assert status == 2 and not out and "not UTF-8" in err
    for option in ("--prompt", "--system"):
        status, _, err = run("chat", "--prompt", "hi", option, "a\udcff", gives=events(SAID))
        assert status == 2 and f"{option} is not UTF-8" in err

"""Tokens that the model cannot read, and fields whose size costs time, are refused by name; nobody else notices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.serving import Server, make_engine, running

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
NAMED = "token 1839 ('<|new|>') is in the tokenizer and not in the model"


@pytest.fixture(scope="module")
def server(larger_tokenizer: Path) -> Iterator[Server]:
    with running(make_engine(larger_tokenizer, max_model_len=256)) as server:
        yield server


def error_of(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = server.post(path, body)
    assert answer.status_code == 400, answer.text
    server.check_idle()
    found: dict[str, Any] = answer.json()["error"]
    return found


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (TEXT, {"prompt": "the sun <|new|>"}, "prompt"),
        (TEXT, {"prompt": "the sun <|new|>", "stream": True}, "prompt"),
        (TEXT, {"prompt": "the sun <|new|>", "echo": True, "max_tokens": 0}, "prompt"),
        (TEXT, {"prompt": [5, 1839]}, "prompt"),
        (CHAT, {"messages": user("the sun <|new|>")}, "messages"),
        ("/tokenize", {"prompt": "the sun <|new|>"}, "prompt"),
        ("/tokenize", {"messages": user("the sun <|new|>")}, "messages"),
        ("/detokenize", {"tokens": [5, 1839]}, "tokens"),
    ],
)
def test_a_token_without_a_row_is_named(server: Server, path: str, body: dict[str, Any], param: str) -> None:
    error = error_of(server, path, body)
    assert error["message"].startswith(NAMED) and error["param"] == param


@pytest.mark.parametrize("bad", ["the sun <|new|>", [5, 1839], [5, -1], [5, 10**30], []])
def test_the_bad_prompt_of_several_is_named(server: Server, bad: Any) -> None:
    good: Any = "the sun" if isinstance(bad, str) else [5]
    error = error_of(server, TEXT, {"prompt": [good, good, bad, good], "n": 2})
    assert error["message"].startswith("prompt 2 of 4, counted from 0: ") and error["param"] == "prompt"


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("stop_token_ids", [1839], NAMED),
        ("stop_token_ids", [5, 10**6], "1000000 is not a token id"),
        ("stop_token_ids", [10**30], "is not a token id"),
        ("stop_token_ids", [-1], "from 0 up"),
        ("stop_token_ids", [5] * 1025, "1024"),
        ("stop", ["a"] * 65, "64"),
        ("stop", "#" * 131_073, "131072 characters, got one of 131073"),
        ("n", 129, "128"),
        ("method", "m" * 100_000, "1024 characters"),
    ],
    ids=["no row", "beyond", "far beyond", "negative", "many ids", "many stops", "long stop", "many outputs", "long name"],
)
def test_fields_are_bounded_by_name(server: Server, path: str, field: str, value: Any, says: str) -> None:
    prompt = {"messages": user("the sun")} if path == CHAT else {"prompt": "the sun"}
    error = error_of(server, path, prompt | {"max_tokens": 2, field: value})
    assert field in f"{error['param']} {error['message']}" and says in error["message"]
    assert len(error["message"]) < 1000


def test_long_stop_strings_are_served(server: Server) -> None:
    body = {"prompt": "apple = 417.", "temperature": 0, "max_tokens": 20, "ignore_eos": True}
    plain = server.post(TEXT, body).json()["choices"][0]["text"]
    stops = ["#" * 131_072, plain[5:9], " " * 100_000]
    for stream in (False, True):
        answer = server.post(TEXT, body | {"stop": stops, "stream": stream})
        assert answer.status_code == 200
        if not stream:
            choice = answer.json()["choices"][0]
            assert (choice["text"], choice["finish_reason"]) == (plain[: plain.index(plain[5:9])], "stop")

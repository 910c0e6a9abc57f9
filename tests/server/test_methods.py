"""Requests that choose their method and budget over HTTP: mixed in one batch they get what they get alone."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specontext.cli import main
from specontext.config import EngineConfig
from tests.server.serving import Server, make_engine, running

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PROMPT = "Remember the facts in this text. " + " ".join(f"key{i} = {100 + 7 * i}." for i in range(40)) + "\nQuestion: key7?"
CHOICES: list[dict[str, Any]] = [
    {},
    {"budget": 32},
    {"method": "full"},
    {"method": "streaming"},
    {"method": "streaming", "budget": 40},
    {"method": "quest"},
    {"method": "speculative", "budget": 48},
    {"method": "random"},
]


@pytest.fixture(scope="module")
def mixed() -> Iterator[Server]:
    with running(make_engine(methods=("full", "streaming", "quest", "random"))) as server:
        yield server
        server.check_idle()


def ask(server: Server, path: str, choice: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The text of a greedy answer, and its statistics."""
    body = {"max_tokens": 24, "temperature": 0, "ignore_eos": True} | choice
    body |= {"prompt": PROMPT} if path == TEXT else {"messages": [{"role": "user", "content": PROMPT}]}
    answer = server.post(path, body)
    assert answer.status_code == 200, answer.text
    [found] = answer.json()["choices"]
    return found["text"] if path == TEXT else found["message"]["content"], answer.json()["usage"]["specontext"]


@pytest.mark.parametrize("path", [TEXT, pytest.param(CHAT, marks=pytest.mark.slow)])
def test_a_mixed_batch_says_what_each_says_alone(mixed: Server, path: str) -> None:
    alone = [ask(mixed, path, choice) for choice in CHOICES]
    with concurrent.futures.ThreadPoolExecutor(len(CHOICES)) as threads:
        together = list(threads.map(lambda choice: ask(mixed, path, choice), CHOICES))
    assert [text for text, _ in together] == [text for text, _ in alone]
    assert len({text for text, _ in alone}) > 2  # else the choices change nothing
    for choice, (_, stats) in zip(CHOICES, together, strict=True):
        assert stats["method"] == choice.get("method", "speculative")
        assert stats["budget"] == (None if choice.get("method") == "full" else choice.get("budget", 64))
        if stats["budget"] is not None:
            assert stats["tokens_read_per_step"] <= stats["budget"]


@pytest.mark.parametrize("path", [TEXT, CHAT])
@pytest.mark.parametrize(
    ("choice", "param", "says"),
    [
        ({"method": "h2o"}, "method", "--methods"),
        ({"method": "magic"}, "method", "magic"),
        ({"method": 5}, "method", "string"),
        ({"budget": 65}, "budget", "64"),
        ({"budget": 20}, "budget", "sink"),
        ({"budget": 0}, "budget", "greater"),
        ({"budget": "32"}, "budget", "integer"),
        ({"budget": 10**30}, "budget", "less"),
        ({"method": "full", "budget": 32}, "budget", "leave it out"),
    ],
)
def test_choices_that_the_server_does_not_allow(mixed: Server, path: str, choice: Any, param: str, says: str) -> None:
    body = {"prompt": "a"} if path == TEXT else {"messages": [{"role": "user", "content": "a"}]}
    for stream in (False, True):
        answer = mixed.post(path, body | choice | {"stream": stream})
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error" and error["param"] == param and says in error["message"]


@pytest.mark.parametrize(
    ("words", "text", "methods"),
    [
        ([], "budget: 64", None),
        (["--methods", "full", "--methods", "quest"], "", ("full", "quest")),
        ([], "methods: [full, quest-prompt]", ("full", "quest-prompt")),
        ([], "methods: quest", ("quest",)),
        (["--methods", "h2o"], "methods: [full, quest]", ("h2o",)),
    ],
)
def test_methods_from_the_command_line_and_from_a_file(
    words: list[str], text: str, methods: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[EngineConfig] = []
    monkeypatch.setattr("specontext.server.run.serve", lambda config, *_, **__: found.append(config))
    file = tmp_path / "serve.yaml"
    file.write_text(text or "{}")
    assert main(["serve", "nano", "--config", str(file), *words]) == 0
    assert found[0].methods == methods


@pytest.mark.parametrize("words", [["--methods", "magic"], ["--methods", "full,quest"]])
def test_methods_that_do_not_exist(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "nano", *words]) == 2
    assert "unknown method" in capsys.readouterr().err

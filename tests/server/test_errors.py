"""What clients do wrong is answered with 4xx and a message, and never hurts the server."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from specontext.locations import NANO
from specontext.server.protocol.chat import ChatRequest
from specontext.server.protocol.common import Body
from specontext.server.protocol.completion import CompletionRequest
from specontext.server.protocol.messages import MessagesRequest
from specontext.server.protocol.responses import ResponsesRequest
from tests.server.serving import PATIENCE, Server, make_engine, running

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "the sun"}]
GOOD = {CHAT: {"messages": USER, "max_tokens": 1}, TEXT: {"prompt": "the sun", "max_tokens": 1}}


def error_of(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"]
    [error] = answer.json().values()
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"3", b'"text"', b'{"prompt": "a" "b"}', b"\xff\xfe", b"[" * 100_000]
)
@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
def test_malformed_bodies(server: Server, path: str, body: bytes) -> None:
    answer = server.http.post(path, content=body, headers={"content-type": "application/json"})
    assert error_of(answer)["type"] == "invalid_request_error"


def test_a_body_that_is_not_sent_as_json(server: Server) -> None:
    assert "Content-Type" in error_of(server.http.post(TEXT, content=json.dumps(GOOD[TEXT])))["message"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", -1),
        ("temperature", [1]),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 10**30),
        ("min_p", 2),
        ("n", 0),
        ("n", 10**9),
        ("n", "1"),
        ("seed", 10**40),
        ("stop", 5),
        ("stop", [""]),
        ("stop", ["a"] * 100),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", [-5]),
        ("stop_token_ids", [5, 10**6]),
        ("stop_token_ids", [10**30]),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", 10**9),
        ("max_tokens", 10**30),
        ("min_tokens", 5),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("stream", "yes"),
        ("stream_options", {"include_usage": 1}),
        ("stream_options", {"surprise": True}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"five": 1}),
        ("logit_bias", {"": 1}),
        ("logit_bias", {"5": 100, "05": -100}),
        ("logit_bias", {"²": 1}),
        ("logit_bias", {"99999": 1}),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [99999]),
        ("bad_words", [""]),
        ("truncate_prompt_tokens", 0),
        ("priority", 1),
        ("use_beam_search", True),
        ("best_of", 2),
        ("best_of", 0),
        ("stream_options", {"include_usage": True}),
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "objekt"}}}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"not": {"type": "string"}}}}),
        ("structured_outputs", {"regex": "(("}),
        ("structured_outputs", {"regex": "a", "choice": ["b"]}),
        ("structured_outputs", {"json": "{"}),
        ("structured_outputs", {"structural_tag": "x"}),
        ("structured_outputs", 5),
        ("guided_json", {"enum": ["a" * 300_000]}),
        ("guided_choice", []),
        ("guided_grammar", "root ::= other"),
        ("user", 5),
        ("model", 5),
        ("logprobs", "many"),
        ("no_such_field", 1),
    ],
)
def test_bad_fields(server: Server, path: str, field: str, value: Any) -> None:
    error = error_of(server.post(path, GOOD[path] | {field: value}))
    assert error["type"] == "invalid_request_error"
    assert field in f"{error['param']} {error['message']}" or "context" in error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("reasoning_effort", "high"),
        ("modalities", ["text", "audio"]),
        ("store", True),
        ("messages", []),
        ("messages", "the sun"),
        ("messages", [{"role": "robot", "content": "a"}]),
        ("messages", [{"content": "a"}]),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": None}]),
        ("messages", [{"role": "tool", "content": None, "tool_call_id": "a"}]),
        ("messages", [{"role": "user", "content": "a", "tool_call_id": "a"}]),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("tools", [{"type": "web_search"}]),
        ("tools", [{"type": "function", "function": {"name": "not a name"}}]),
        ("tools", [{"type": "function", "function": {"name": "f"}}] * 2),
        ("tools", [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("messages", [{"role": "user", "content": "a", "surprise": 1}]),
        ("messages", [{"role": "user", "content": "\ud800"}]),
        ("top_logprobs", 5),
        ("max_completion_tokens", 2),
        ("chat_template_kwargs", {"messages": []}),
        ("chat_template_kwargs", {"tools": []}),
        ("continue_final_message", 1),
    ],
)
def test_bad_chats(server: Server, field: str, value: Any) -> None:
    body = json.dumps(GOOD[CHAT] | {field: value})
    answer = server.http.post(CHAT, content=body, headers={"content-type": "application/json"})
    error = error_of(answer)
    assert field in f"{error['param']} {error['message']}" or error["param"] is None


@pytest.mark.parametrize(
    ("path", "field", "value", "param", "says"),
    [
        (TEXT, "stop", ["a"] * 65, "stop", "64"),
        (TEXT, "stop", 5, "stop", "string"),
        (TEXT, "stream_options", {"surprise": True}, "stream_options.surprise", "not known"),
        (CHAT, "messages", [{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content.0.type", "'image_url'"),
        (CHAT, "messages", [{"role": "user", "content": 5}], "messages.0.content", "string"),
        (CHAT, "messages", [{"role": "user", "content": "a", "tool_calls": [1]}], "messages.0.tool_calls.0", "object"),
        (CHAT, "max_completion_tokens", 0, "max_completion_tokens", "greater"),
        ("/tokenize", "prompt", 5, "prompt", "string"),
        ("/tokenize", "messages", [], "messages", "at least 1"),
        ("/tokenize", "messages", [{"role": "robot", "content": "a"}], "messages.0.role", "'user'"),
        ("/tokenize", "surprise", 1, "prompt", "required"),
    ],
)
def test_errors_say_where_they_are(server: Server, path: str, field: str, value: Any, param: str, says: str) -> None:
    error = error_of(server.post(path, GOOD.get(path, {}) | {field: value}))
    assert error["param"] == param and says in error["message"]


def test_a_body_that_is_compressed(server: Server) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = server.http.post(TEXT, content=gzip.compress(json.dumps(GOOD[TEXT]).encode()), headers=headers)
    assert "'gzip'" in error_of(answer, 415)["message"]
    answer = server.http.post(TEXT, json=GOOD[TEXT], headers={"content-encoding": "identity"})
    assert answer.status_code == 200


def test_what_asks_for_nothing_is_let_through(server: Server) -> None:
    neutral = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "logit_bias": {},
        "store": False,
        "user": "me",
        "prompt_cache_retention": "24h",
        "logits_processors": [],
        "spaces_between_special_tokens": True,
        "return_tokens_as_token_ids": False,
        "echo": False,
        "documents": [],
        "include_reasoning": True,
    }
    ours = (
        "prompt_logprobs",
        "repetition_detection",
        "cache_salt",
        "request_id",
        "vllm_xargs",
        "chat_template",
        "thinking_token_budget",
    )
    neutral |= dict.fromkeys(ours)  # as clients of vLLM that write all fields out
    assert server.post(CHAT, GOOD[CHAT] | neutral).status_code == 200
    assert (
        server.post(CHAT, GOOD[CHAT] | dict.fromkeys([*neutral, "n", "temperature", "stop", "seed", "logprobs"])).status_code
        == 200
    )
    assert server.post(TEXT, GOOD[TEXT] | {"best_of": 1, "suffix": "", "logit_bias": None, "n": None}).status_code == 200
    assert server.post(TEXT, GOOD[TEXT] | {"best_of": 2, "n": 2}).status_code == 200
    for path in (CHAT, TEXT, "/v1/responses"):
        body = {"input": "the sun", "max_output_tokens": 2} if path == "/v1/responses" else GOOD[path]
        callers = {
            "user": "me",
            "metadata": {"a": "b"},
            "safety_identifier": "me",
            "prompt_cache_key": "k",
            "service_tier": "auto",
        }
        for fields in (callers, dict.fromkeys(callers), {"store": False}):
            assert server.post(path, body | fields).status_code == 200, (path, fields)


@pytest.mark.parametrize(
    ("path", "body", "needed", "length"),
    [
        (CHAT, ChatRequest, {"messages": USER}, "max_tokens"),
        (TEXT, CompletionRequest, {"prompt": "the sun"}, "max_tokens"),
        ("/v1/responses", ResponsesRequest, {"input": "the sun"}, "max_output_tokens"),
        ("/v1/messages", MessagesRequest, {"messages": USER, "max_tokens": 1}, "max_tokens"),
    ],
)
def test_null_is_the_default_of_every_field_that_has_one(
    path: str, body: type[Body], needed: dict[str, Any], length: str, server: Server
) -> None:
    nulls = dict.fromkeys(field.alias or name for name, field in body.model_fields.items())
    answer = server.post(path, nulls | needed | {length: 1})
    assert answer.status_code == 200, answer.text
    plain = server.post(path, needed | {length: 1})
    counts = [[each for each in got.json()["usage"].values() if isinstance(each, int)] for got in (answer, plain)]
    assert counts[0] == counts[1]
    for name in needed:
        refused = server.post(path, needed | {name: None})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == name
    if path != "/v1/messages":
        options = {"stream": True, "stream_options": {"include_obfuscation": None}}
        assert server.post(path, needed | {length: 1} | options).status_code == 200


@pytest.mark.parametrize(
    "prompt",
    ["", [], [""], [[]], ["a", 1], [1, "a"], [1.5], [[1], "a"], {"a": 1}, None, 5, [[[1]]], [-1], [10**6], [True], ["a"] * 1000],
)
def test_bad_prompts(server: Server, prompt: Any) -> None:
    error_of(server.post(TEXT, {"prompt": prompt, "max_tokens": 1}))


def test_a_huge_list_of_wrong_tokens_has_one_error(server: Server) -> None:
    assert len(server.post(TEXT, {"prompt": [1.5] * 200_000}).text) < 1000
    assert len(server.post("/detokenize", {"tokens": ["a"] * 200_000}).text) < 1000


def test_unknown_models(server: Server) -> None:
    for path, body in [*GOOD.items(), ("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})]:
        error = error_of(server.post(path, body | {"model": "other"}), 404)
        assert error["code"] == "model_not_found" and "nano" in error["message"]
    error_of(server.get("/v1/models/other"), 404)


def test_over_long_prompts(server: Server) -> None:
    limit = server.engine.parts.max_tokens
    for prompt in ([5] * limit, [5] * (limit * 4), "the sun " * limit, "x" * (limit * 200)):
        for body in ({"prompt": prompt}, {"prompt": prompt, "max_tokens": 5}):
            error = error_of(server.post(TEXT, body))
            assert error["code"] == "context_length_exceeded" and str(limit) in error["message"]
    chat = {"messages": [{"role": "user", "content": "the sun " * limit}]}
    assert error_of(server.post(CHAT, chat))["code"] == "context_length_exceeded"
    assert error_of(server.post(TEXT, {"prompt": [5] * (limit - 1), "max_tokens": 2}))["code"] == "context_length_exceeded"
    assert server.post(TEXT, {"prompt": [5] * (limit - 1), "max_tokens": 1}).status_code == 200


def test_log_probabilities_have_limits(server: Server) -> None:
    assert "20" in error_of(server.post(TEXT, GOOD[TEXT] | {"logprobs": 21}))["message"]
    assert "20" in error_of(server.post(CHAT, GOOD[CHAT] | {"logprobs": True, "top_logprobs": 21}))["message"]
    assert server.post(TEXT, GOOD[TEXT] | {"logprobs": 20}).status_code == 200


def test_unknown_places(server: Server) -> None:
    assert error_of(server.get("/v1/nothing"), 404)["type"] == "not_found_error"
    error_of(server.get(CHAT), 405)


def test_huge_bodies() -> None:
    with running(make_engine(), max_body_size=10_000) as server:
        body = json.dumps(GOOD[TEXT] | {"user": "x" * 10_000}).encode()

        def pieces() -> Any:  # without a Content-Length
            yield body

        for content in (body, pieces(), b"x" * 1_000_000):
            answer = httpx.post(
                server.url + TEXT, content=content, headers={"content-type": "application/json"}, timeout=PATIENCE
            )
            assert "10000 bytes" in error_of(answer, 413)["message"]
        assert server.post(TEXT, GOOD[TEXT]).status_code == 200


def test_api_keys() -> None:
    with running(make_engine(), api_key=("first", "secönd")) as server:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "first"}, {"authorization": "Basic first"}):
            for path in ("/v1/models", "/metrics", "/status", "/version", "/openapi.json", "/nothing"):
                answer = server.get(path, headers=headers)
                assert error_of(answer, 401)["type"] == "authentication_error"
                assert answer.headers["www-authenticate"] == "Bearer"
        error_of(server.post(TEXT, GOOD[TEXT]), 401)
        assert server.get("/health").status_code == server.get("/").status_code == 200
        for key in (b"first", "secönd".encode()):
            assert server.get("/v1/models", headers={b"authorization": b"Bearer " + key}).status_code == 200


def test_a_chat_without_a_template_says_which_file_and_option(tmp_path: Path) -> None:
    shutil.copytree(NANO, tmp_path / "model", ignore=shutil.ignore_patterns("chat_template.jinja"))
    with running(make_engine(tmp_path / "model")) as server:
        message = error_of(server.http.post(CHAT, json=GOOD[CHAT]))["message"]
    assert "chat_template.jinja" in message and "--chat-template" in message and TEXT in message

"""What bodies of all protocols say comes through, or is refused at its place and quickly."""

from __future__ import annotations

import time
from typing import Any

import pytest

from specontext.server.protocol.responses import ResponsesRequest
from specontext.server.responses.input import all_items, to_chat
from specontext.server.responses.store import ResponseStore
from tests.server.serving import Server

CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
USER = {"role": "user", "content": "apple"}
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [USER], "max_tokens": 2},
    TEXT: {"prompt": "apple", "max_tokens": 2},
    RESPONSES: {"input": "apple", "max_output_tokens": 2},
    MESSAGES: {"messages": [USER], "max_tokens": 2},
}
MANY = 400_000


def thinking(**fields: Any) -> dict[str, Any]:
    return {"type": "reasoning", "id": "r"} | fields


@pytest.mark.parametrize(
    ("path", "fields", "said"),
    [
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "text"),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a", "refusal": "b"}]}]}, "refusal"),
        (RESPONSES, {"input": [thinking(encrypted_content="x", summary=[]), USER]}, "encrypted"),
        (RESPONSES, {"input": [{"role": "user", "content": None}]}, "input.0.content"),
        (RESPONSES, {"input": [None]}, "input.0"),
        (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "a"}}}, "schema"),
        (RESPONSES, {"text": {"format": {"type": "text", "schema": {"type": "object"}}}}, "schema"),
        (RESPONSES, {"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "function"}}, "tool_choice.name"),
        (MESSAGES, {"tool_choice": {"type": "tool"}}, "tool_choice"),
        (MESSAGES, {"tool_choice": {"type": "auto", "name": "f"}}, "tool_choice"),
        (MESSAGES, {"stop_sequences": [""]}, "stop_sequences.0"),
        (MESSAGES, {"system": [5]}, "system.0"),
        (CHAT, {"messages": [{"role": "user", "content": [5]}]}, "messages.0.content.0"),
        (CHAT, {"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs may not set self"),
        (CHAT, {"stop": [5]}, "stop.0"),
        (CHAT, {"guided_json": {"$ref": "#"}}, "guided_json cannot be followed"),
        (CHAT, {"structured_outputs": {"grammar": "root ::= root"}}, "structured_outputs cannot be followed"),
        (TEXT, {"allowed_token_ids": [5], "guided_choice": ["hello"]}, "allowed_token_ids"),
        (TEXT, {"allowed_token_ids": [5], "stop_token_ids": [5], "min_tokens": 2}, "min_tokens"),
    ],
)
def test_refused_at_its_place(server: Server, path: str, fields: dict[str, Any], said: str) -> None:
    found = server.post(path, GOOD[path] | fields)
    assert found.status_code == 400 and said in found.json()["error"]["message"], found.text


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "nested too deeply"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"prompt": "a\xff"}', "not UTF-8: byte 13"),
        ('{"prompt": "a"}'.encode("utf-16"), "not UTF-8"),
        (b'{"prompt": "a", "max_tokens": 1, "max_tokens": 2}', "'max_tokens' comes twice"),
        (b'{"prompt": "a", "metadata": {"k": "a", "k": "a"}}', "'k' comes twice"),
        (b'{"prompt": "a", "guided_json": {"type": "number", "minimum": NaN}}', "NaN is no number"),
        (b'{"prompt": "a", "metadata": {"k": -Infinity}}', "-Infinity is no number"),
        (b'{"prompt": "a",}', "not JSON"),
        (b'{"prompt": "a"', "at character 14"),
    ],
)
def test_bodies_that_are_not_one_object_of_json(server: Server, body: bytes, said: str) -> None:
    for path in (TEXT, CHAT, RESPONSES, MESSAGES):
        found = server.http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert found.status_code == 400 and said in found.json()["error"]["message"]


def test_a_mark_of_byte_order_is_passed_over(server: Server) -> None:
    body = b"\xef\xbb\xbf" + b'{"prompt": "a", "max_tokens": 1}'
    assert server.http.post(TEXT, content=body, headers={"Content-Type": "application/json"}).status_code == 200


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (RESPONSES, {"input": [thinking(summary=[5] * MANY)]}),
        (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "c", "output": [5] * MANY}]}),
        (RESPONSES, {"stop": [5] * MANY}),
        (RESPONSES, {"include": [5] * MANY}),
        (RESPONSES, {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [5] * MANY}}),
        (RESPONSES, {"logit_bias": {str(i): "x" for i in range(MANY // 4)}}),
        (MESSAGES, {"system": [5] * MANY}),
        (MESSAGES, {"system": [{"type": "text", "text": "a"}] * (MANY // 10)}),
        (MESSAGES, {"stop_sequences": [5] * MANY}),
    ],
)
def test_long_lists_of_what_does_not_belong_there_are_refused_at_once(server: Server, path: str, fields: dict[str, Any]) -> None:
    began = time.monotonic()
    assert server.post(path, GOOD[path] | fields).status_code == 400
    assert time.monotonic() - began < 10  # it was thirty


def test_all_thinking_before_an_answer_is_kept() -> None:
    items = [thinking(summary=[{"type": "summary_text", "text": text}]) for text in ("one ", "two")]
    body = ResponsesRequest(input=[*items, {"role": "assistant", "content": "a"}, USER])
    message = to_chat(body, all_items(body, ResponseStore())).messages[0]
    assert (message.reasoning_content, message.text) == ("one two", "a")


@pytest.mark.parametrize("prompt", [[1] * 3000 + [5, 6, 7], "a " * 60_000 + "apple = 417"])
@pytest.mark.parametrize("keep", [3, -1])
def test_a_prompt_that_is_too_long_can_be_truncated(server: Server, prompt: Any, keep: int) -> None:
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "return_token_ids": True}
    assert server.post(TEXT, body).status_code == 400
    found = server.post(TEXT, body | {"truncate_prompt_tokens": keep}).json()["choices"][0]["prompt_token_ids"]
    end = prompt if isinstance(prompt, list) else server.engine.tokenizer(prompt)["input_ids"]
    assert found == (end[-3:] if keep == 3 else end[-2047:])


def test_a_conversation_that_is_too_long_can_be_truncated(server: Server) -> None:
    body = GOOD[CHAT] | {"messages": [{"role": "user", "content": "a " * 60_000}]}
    assert server.post(CHAT, body).status_code == 400
    assert server.post(CHAT, body | {"truncate_prompt_tokens": 40}).json()["usage"]["prompt_tokens"] == 40


def test_a_penalty_that_is_nearly_nothing_leaves_numbers(server: Server) -> None:
    body = GOOD[TEXT] | {"repetition_penalty": 1e-300, "temperature": 0}
    assert server.post(TEXT, body).json()["choices"][0]["finish_reason"] == "length"

"""A model that thinks, calls and answers in channels, served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.serving import Server, make_engine, running
from tests.server.speaking import save_speaking

TOOL = {
    "type": "object",
    "properties": {"left": {"type": "boolean"}},
    "required": ["left"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": TOOL}}]
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "is it so?"}], "temperature": 0, "max_tokens": 60}
MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>")
SAYS = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It thinks again and again, as far as grammars let it."""
    template = (Path(__file__).parent / "harmony.jinja").read_text()
    words = ("assistant", "analysis", "Hm.")
    folder = tmp_path_factory.mktemp("harmony")
    return save_speaking(folder, SAYS, template, special=None, after="assistant", words=words, marks=MARKS)


@pytest.fixture(scope="module")
def served(directory: Path) -> Iterator[Server]:
    with running(
        make_engine(directory, offload_layers=0, retrieval_head=None, method={"method": "full"}, max_model_len=512)
    ) as server:
        yield server
        server.check_idle()


def ask(server: Server, **more: Any) -> Any:
    answer = server.post("/v1/chat/completions", ASKED | more)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_thinking_goes_apart_without_being_asked_for(served: Server) -> None:
    answer = ask(served, max_tokens=12)
    message = answer["choices"][0]["message"]
    assert message["reasoning_content"] == "Hm.\n\nHm." and not message["content"]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 5


@pytest.mark.parametrize(
    ("form", "content"),
    [
        ({"structured_outputs": {"choice": ["so it is"]}}, "so it is"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": [1, 2]}}}}, "[1,2]"),
    ],
)
def test_answers_follow_grammars_behind_thinking(served: Server, form: Any, content: str) -> None:
    message = ask(served, **form)["choices"][0]["message"]
    assert message["reasoning"] == "Hm." and message["content"].replace(" ", "") == content.replace(" ", "")


def test_calls_are_forced_streamed_and_sent_back(served: Server) -> None:
    asked = {"tools": TOOLS, "tool_choice": "required"}
    choice = ask(served, **asked)["choices"][0]
    [call] = choice["message"]["tool_calls"]
    assert (
        choice["finish_reason"] == "tool_calls" and choice["message"]["reasoning"] == "Hm." and not choice["message"]["content"]
    )
    assert isinstance(json.loads(call["function"]["arguments"])["left"], bool)
    result = {"role": "tool", "tool_call_id": call["id"], "content": "a tree"}
    messages = [*ASKED["messages"], choice["message"], result]
    again = ask(served, messages=messages, reasoning_effort="low", **asked)["choices"][0]
    assert again["message"]["tool_calls"][0]["function"] == call["function"]
    with served.http.stream("POST", "/v1/chat/completions", json=ASKED | asked | {"stream": True}) as stream:
        events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
    deltas = [event["choices"][0]["delta"] for event in events]
    pieces = [delta["tool_calls"][0]["function"] for delta in deltas if "tool_calls" in delta]
    assert pieces[0]["name"] == "look" and "".join(p["arguments"] for p in pieces) == call["function"]["arguments"]
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "Hm."


def test_other_protocols_know_thinking_and_calls(served: Server) -> None:
    flat = [{"type": "function", **TOOLS[0]["function"]}]  # type: ignore[dict-item]
    asked = {"input": "is it so?", "tools": flat, "tool_choice": "required", "temperature": 0, "reasoning": {"effort": "low"}}
    answer = served.post("/v1/responses", asked).json()
    assert [item["type"] for item in answer["output"]] == ["reasoning", "function_call"]
    tools = [{"name": "look", "input_schema": TOOL}]
    asked = ASKED | {"tools": tools, "tool_choice": {"type": "any"}, "model": served.get("/v1/models").json()["data"][0]["id"]}
    message = served.post("/v1/messages", asked).json()
    assert [block["type"] for block in message["content"]] == ["thinking", "tool_use"] and message["stop_reason"] == "tool_use"


def test_what_has_no_place_in_channels_is_refused(served: Server, directory: Path) -> None:
    refused = served.post("/v1/chat/completions", ASKED | {"structured_outputs": {"grammar": 'root ::= "a"'}})
    assert refused.status_code == 400 and "channels" in refused.json()["error"]["message"]
    engine = make_engine(directory, offload_layers=0, retrieval_head=None, method={"method": "full"}, max_model_len=256)
    with pytest.raises(AssertionError, match="leave reasoning_parser out"), running(engine, reasoning_parser="qwen3"):
        pass

"""Tools and structured outputs over HTTP, with `nano` forced by grammars and a model that says calls by itself."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.serving import Server, make_engine, running
from tests.server.speaking import save_speaking

CHAT = "/v1/chat/completions"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 5},
                "at": {
                    "type": "object",
                    "properties": {"day": {"type": "integer", "minimum": 1, "maximum": 9}},
                    "required": ["day"],
                    "additionalProperties": False,
                },
            },
            "required": ["city", "at"],
            "additionalProperties": False,
        },
    },
}
STOP = {"type": "function", "function": {"name": "stop"}}
ASK = [{"role": "user", "content": "How is the weather?"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tooled() -> Iterator[Server]:
    with running(make_engine(), chat_template="hermes") as server:
        yield server
        server.check_idle()


def ask(server: Server, **fields: Any) -> Any:
    body = {"messages": ASK, "tools": [WEATHER, STOP], "temperature": 1.0, "seed": 3, "max_tokens": 150} | fields
    answer = server.post(CHAT, body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events_of(server: Server, **fields: Any) -> list[Any]:
    body = {"messages": ASK, "tools": [WEATHER, STOP], "temperature": 1.0, "seed": 3, "max_tokens": 150, "stream": True} | fields
    lines = server.post(CHAT, body).text.split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


def check_weather(arguments: str) -> None:
    found = json.loads(arguments)
    assert list(found) == ["city", "at"] and len(found["city"]) <= 5 and 1 <= found["at"]["day"] <= 9


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_calls_can_be_forced(tooled: Server, choice: Any) -> None:
    answer = ask(tooled, tool_choice=choice, tools=[WEATHER], parallel_tool_calls=False, n=2, logprobs=True)
    for choice_of in answer["choices"]:
        message = choice_of["message"]
        assert message["content"] is None and len(message["tool_calls"]) == 1
        [call] = message["tool_calls"]
        assert call["type"] == "function" and call["id"].startswith("call_") and call["function"]["name"] == "get_weather"
        check_weather(call["function"]["arguments"])
        assert choice_of["finish_reason"] == ("tool_calls" if choice == "required" else "stop")
        assert choice_of["logprobs"]["content"]
    assert len({c["message"]["tool_calls"][0]["id"] for c in answer["choices"]}) == 2


@pytest.mark.parametrize("parameters", [{"properties": {"day": {"enum": [1, 2]}}}, {"type": ["object", "null"]}, {}, None])
def test_arguments_are_objects_whether_or_not_a_schema_says_so(tooled: Server, parameters: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    options: Any = {
        "tools": [tool],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 60,
        "temperature": 2.0,
    }
    for choice in ask(tooled, **options, n=3)["choices"]:
        [call] = choice["message"]["tool_calls"]
        assert call["function"]["arguments"].startswith("{")


def test_schemas_of_other_arguments_than_objects_are_refused(tooled: Server) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}
    answer = tooled.post(CHAT, {"messages": ASK, "tools": [tool]})
    assert answer.status_code == 400 and "must be 'object'" in answer.json()["error"]["message"]


def test_what_clients_add_to_earlier_messages_changes_nothing(tooled: Server) -> None:
    def tokens(part: Any, message: Any, function: Any) -> list[int]:
        call = {"id": "c", "type": "function", "function": {"name": "stop", "arguments": "{}"} | function}
        messages = [
            {"role": "user", "content": [{"type": "text", "text": "hi"} | part]},
            {"role": "assistant", "content": "so", "tool_calls": [call]} | message,
            {"role": "tool", "tool_call_id": "c", "content": "done"},
        ]
        return list(ask(tooled, messages=messages, max_tokens=1, return_token_ids=True)["prompt_token_ids"])

    more = tokens({"cache_control": {"type": "ephemeral"}}, {"parsed": {"a": 1}}, {"parsed_arguments": {}, "arguments": "null"})
    assert more == tokens({}, {}, {})


def test_streams_of_calls_are_those_of_openai(tooled: Server) -> None:
    fields: Any = {"tool_choice": "required", "parallel_tool_calls": False, "tools": [WEATHER]}
    whole = ask(tooled, **fields)["choices"][0]["message"]["tool_calls"][0]["function"]
    deltas = [event["choices"][0] for event in events_of(tooled, **fields)]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    [first, *others] = [delta["delta"]["tool_calls"][0] for delta in deltas if "tool_calls" in delta["delta"]]
    assert first.keys() == {"index", "id", "type", "function"} and first["function"] == {"name": "get_weather", "arguments": ""}
    assert all(each.keys() == {"index", "function"} and each["function"].keys() == {"arguments"} for each in others)
    assert "".join(each["function"]["arguments"] for each in others) == whole["arguments"] and len(others) > 5
    assert [delta["finish_reason"] for delta in deltas if delta["finish_reason"]] == ["tool_calls"]


def test_several_calls_have_their_indices(tooled: Server) -> None:
    found = set()
    empty = {"type": "object", "properties": {}, "additionalProperties": False}
    stop = {"type": "function", "function": {"name": "stop", "parameters": empty}}
    for seed in range(2):
        events = events_of(tooled, tool_choice="required", tools=[stop], seed=seed, max_tokens=120, logit_bias={"1": -100})
        deltas = [call for e in events for call in e["choices"][0]["delta"].get("tool_calls", [])]
        begun = [call["index"] for call in deltas if "id" in call]
        assert begun == list(range(len(begun))) and [call["index"] for call in deltas] == sorted(call["index"] for call in deltas)
        found.add(len(begun))
    assert max(found) > 1


def test_a_loop_of_several_turns(tooled: Server) -> None:
    """Calls and results go back into the template, and the prompt's beginning is known again."""
    messages: list[Any] = list(ASK)
    for turn in range(2):
        answer = ask(tooled, messages=messages, tool_choice="required", tools=[WEATHER], parallel_tool_calls=False, seed=turn)
        message = answer["choices"][0]["message"]
        [call] = message["tool_calls"]
        messages += [message, {"role": "tool", "tool_call_id": call["id"], "content": f"{turn + 20} degrees"}]
        if turn:
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    shown = tooled.post("/tokenize", {"messages": messages, "tools": [WEATHER]}).json()["tokens"]
    text = tooled.post("/detokenize", {"tokens": shown}).json()["prompt"]
    assert text.count("<tool_response>") == 2 and "21 degrees" in text and '"get_weather"' in text and "Weather of a city" in text
    assert ask(tooled, messages=messages, max_tokens=5)["choices"][0]["message"]["content"] is not None


def test_none_and_auto(tooled: Server, server: Server) -> None:
    plain = ask(tooled, tools=None, tool_choice=None, max_tokens=15)["choices"][0]["message"]["content"]
    assert ask(tooled, tool_choice="none", max_tokens=15)["choices"][0]["message"]["content"] == plain
    assert "tool_calls" not in ask(tooled, max_tokens=15)["choices"][0]["message"]
    assert server.post(CHAT, {"messages": ASK, "tools": [STOP], "tool_choice": "none", "max_tokens": 1}).status_code == 200
    refused = server.post(CHAT, {"messages": ASK, "tools": [STOP]})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "tools" and "--tool-call-parser" in refused.text


def test_strict_tools_hold_what_auto_writes(tmp_path: Any) -> None:
    """A model that goes for a call with arguments of its own; strict, it may not write them."""
    template = "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}{{ messages[-1].content }}<|python_tag|>>"
    says = '{"name": '
    path = save_speaking(tmp_path, "".join(dict.fromkeys(says)), template, special=True)
    body = {"messages": ASK, "temperature": 1.0, "seed": 1, "max_tokens": 200, "ignore_eos": True}
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
    with running(make_engine(path, offload_layers=0, method={"method": "full"}, budget=None, max_model_len=500)) as server:
        answer = server.post(CHAT, body | {"tools": [strict], "n": 4, "parallel_tool_calls": False})
        assert answer.status_code == 200, answer.text
        for call in (call for choice in answer.json()["choices"] for call in choice["message"].get("tool_calls") or []):
            check_weather(call["function"]["arguments"])


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_schemas_in_every_spelling(server: Server, path: str, fields: Any) -> None:
    prompt: Any = {"messages": ASK} if path == CHAT else {"prompt": "a"}
    answer = server.post(path, prompt | fields | {"temperature": 1, "seed": 1, "max_tokens": 200, "n": 2})
    assert answer.status_code == 200, answer.text
    for choice in answer.json()["choices"]:
        found = json.loads(choice["message"]["content"] if path == CHAT else choice["text"])
        assert list(found) == ["name", "ok"] and choice["finish_reason"] == "stop"


def test_other_structures_over_http(server: Server) -> None:
    for fields, wanted in (
        ({"guided_choice": ["left", "right"]}, ("left", "right")),
        ({"structured_outputs": {"choice": ["left"]}}, ("left",)),
        ({"guided_regex": "le[f]t"}, ("left",)),
        ({"guided_grammar": 'root ::= "left"'}, ("left",)),
    ):
        answer = server.post(CHAT, {"messages": ASK, "max_tokens": 50} | fields)  # type: ignore[operator]
        assert answer.json()["choices"][0]["message"]["content"] in wanted
    answer = server.post(CHAT, {"messages": ASK, "max_tokens": 40, "response_format": {"type": "json_object"}})
    assert answer.json()["choices"][0]["message"]["content"].startswith("{")


def test_tools_beside_a_schema(tooled: Server) -> None:
    """An answer is a call or JSON of the schema, never anything else."""
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    for choice in ask(tooled, response_format=form, tools=[WEATHER], parallel_tool_calls=False, n=4)["choices"]:
        if not choice["message"].get("tool_calls"):
            assert list(json.loads(choice["message"]["content"])) == ["name", "ok"]
    refused = tooled.post(CHAT, {"messages": ASK, "tools": [STOP], "guided_regex": "a"})
    assert refused.status_code == 400 and "JSON" in refused.text


def test_token_ids_truncation_and_running_usage(server: Server) -> None:
    ids = server.post("/tokenize", {"messages": ASK}).json()["tokens"]
    body = {"messages": ASK, "max_tokens": 4, "temperature": 0, "return_token_ids": True, "ignore_eos": True}
    whole = server.post(CHAT, body).json()
    assert whole["prompt_token_ids"] == ids and len(whole["choices"][0]["token_ids"]) == 4
    events = events_of(server, **body, tools=None, stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert events[0]["prompt_token_ids"] == ids
    tokens = itertools.chain.from_iterable(c.get("token_ids", []) for e in events for c in e["choices"])
    assert list(tokens) == whole["choices"][0]["token_ids"]
    counted = [event["usage"]["completion_tokens"] for event in events]
    assert counted[0] == 0 and counted[-1] == 4 and counted == sorted(counted)
    short = server.post(CHAT, body | {"truncate_prompt_tokens": 3}).json()
    assert short["prompt_token_ids"] == ids[-3:] and short["usage"]["prompt_tokens"] == 3
    text = server.post(
        "/v1/completions",
        {"prompt": ids, "max_tokens": 2, "truncate_prompt_tokens": 2, "return_token_ids": True, "ignore_eos": True},
    )
    assert text.json()["choices"][0]["prompt_token_ids"] == ids[-2:] and len(text.json()["choices"][0]["token_ids"]) == 2


def test_tokens_can_be_steered_over_http(server: Server) -> None:
    body = {"prompt": "a", "max_tokens": 3, "temperature": 0, "return_token_ids": True}
    assert server.post("/v1/completions", body | {"logit_bias": {"20": 100}}).json()["choices"][0]["token_ids"] == [20] * 3
    found = server.post("/v1/completions", body | {"allowed_token_ids": [20, 21]}).json()["choices"][0]["token_ids"]
    assert {*found} <= {20, 21}


def test_context_errors_begin_as_openai_s(server: Server) -> None:
    for path, prompt in ((CHAT, {"messages": ASK}), ("/v1/completions", {"prompt": "a"})):
        error = server.post(path, prompt | {"max_tokens": 5000}).json()["error"]  # type: ignore[operator]
        assert error["code"] == "context_length_exceeded"
        assert error["message"].startswith("This model's maximum context length is 2048 tokens. However, you requested ")


@pytest.mark.parametrize("arguments", ['{"city": "Os', "{city: Oslo}", "[1]", "Oslo", "nan"])
def test_calls_without_json_go_back_to_the_model_in_every_protocol(arguments: str, tooled: Server) -> None:
    """Agents send a call that they could not read back with an error, so that the model does better."""
    function = {"name": "get_weather", "arguments": arguments}
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "a", "content": "no JSON"},
    ]
    shown = tooled.post("/tokenize", {"messages": messages}).json()["tokens"]
    text = tooled.post("/detokenize", {"tokens": shown}).json()["prompt"]
    assert json.dumps({"unfinished": arguments}) in text and "no JSON" in text
    chat = tooled.post(CHAT, {"messages": messages, "max_tokens": 1})
    items = [*ASK, {"type": "function_call", "call_id": "a", **function}, {"type": "function_call_output", "call_id": "a"}]
    items[-1]["output"] = "no JSON"
    response = tooled.post("/v1/responses", {"input": items, "max_output_tokens": 1})
    assert chat.json()["usage"]["prompt_tokens"] == response.json()["usage"]["input_tokens"] == len(shown)


def test_an_answer_that_was_cut_in_a_call_can_be_gone_on_from(tooled: Server) -> None:
    tool = {"type": "function", **WEATHER["function"]}  # type: ignore[dict-item]
    body = {"input": "How is the weather?", "tools": [tool], "tool_choice": "required", "seed": 3, "ignore_eos": True}
    lengths = range(8, 64, 8)  # tokens, one of which ends amid the arguments
    tries = (tooled.post("/v1/responses", body | {"max_output_tokens": length}).json() for length in reversed(lengths))
    cut = next(found for found in tries if found["status"] == "incomplete" and found["output"][-1].get("arguments"))
    with pytest.raises(ValueError):
        json.loads(cut["output"][-1]["arguments"])
    result = {"type": "function_call_output", "call_id": cut["output"][-1]["call_id"], "output": "that was cut"}
    again = tooled.post("/v1/responses", {"input": [result], "previous_response_id": cut["id"], "max_output_tokens": 1})
    assert again.status_code == 200, again.text


def test_a_stop_string_amid_a_call_leaves_no_call_to_make(tooled: Server) -> None:
    said = {"tool_choice": "required", "tools": [WEATHER], "parallel_tool_calls": False}
    cut = ask(tooled, **said, stop=['"city'])["choices"][0]
    assert cut["finish_reason"] == "stop" and cut["message"]["tool_calls"]
    assert [event["choices"][0]["finish_reason"] for event in events_of(tooled, **said, stop=['"city'])][-1] == "stop"
    behind = ask(tooled, **said, stop=["</tool_call>"])["choices"][0]
    assert behind["finish_reason"] == "tool_calls"
    check_weather(behind["message"]["tool_calls"][0]["function"]["arguments"])
    tool = {"name": "get_weather", "input_schema": WEATHER["function"]["parameters"]}  # type: ignore[index]
    claude = {"messages": ASK, "tools": [tool], "tool_choice": {"type": "any"}, "max_tokens": 150, "temperature": 1, "seed": 3}
    cut = tooled.post("/v1/messages", claude | {"stop_sequences": ['"city']}).json()
    assert (cut["stop_reason"], cut["stop_sequence"]) == ("stop_sequence", '"city')
    behind = tooled.post("/v1/messages", claude | {"stop_sequences": ["</tool_call>"]}).json()
    assert behind["stop_reason"] == "tool_use"


def test_texts_before_and_behind_a_call_are_apart(tmp_path: Any) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% for t in tools or [] %}{{ t.function.name }}{% endfor %}>"
    call = ["<tool_call>", '{"name": "stop"}', "</tool_call>"]
    path = save_speaking(tmp_path, f"On.\n{''.join(call)} it", template, special=None, words=call)
    engine = make_engine(path, offload_layers=0, method={"method": "full"}, budget=None, max_model_len=200)
    with running(engine, tool_call_parser="hermes") as server:
        said = {"messages": ASK[:1], "tools": [STOP], "temperature": 0, "seed": 0, "max_tokens": None}
        message = ask(server, **said)["choices"][0]["message"]
        assert message["content"] == "On.\n\nit" and len(message["tool_calls"]) == 1
        deltas = [event["choices"][0]["delta"] for event in events_of(server, **said)]
        assert "".join(delta.get("content", "") for delta in deltas) == message["content"]
        claude: Any = {"messages": ASK[:1], "tools": [{"name": "stop", "input_schema": {"type": "object"}}], "temperature": 0}
        answer = server.post("/v1/messages", claude | {"max_tokens": 50, "stop_sequences": ["it"]}).json()
        assert [block.get("text") for block in answer["content"]] == ["On.", None]
        assert (answer["stop_reason"], answer["stop_sequence"]) == ("tool_use", None)
        items = server.post(
            "/v1/responses", {"input": "a", "tools": [{"type": "function", "name": "stop"}], "temperature": 0}
        ).json()
        assert [item["content"][0]["text"] for item in items["output"] if item["type"] == "message"] == ["On.", "it"]

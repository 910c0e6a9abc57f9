"""The protocols that agents speak, with the clients that they use: /v1/responses and Anthropic's /v1/messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.serving import Server, make_engine, running
from tests.server.speaking import save_speaking

openai = pytest.importorskip("openai")

FACTS = "Remember the facts in this text. apple = 417.\nQuestion: apple?"
GREEDY = {"temperature": 0}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FLAT: Any = {"type": "function", "name": "get_weather", "description": "Weather.", "parameters": PARAMETERS, "strict": True}
BILLING: Any = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=1f3a2;"}
CUSTOM: Any = {"name": "get_weather", "description": "Weather.", "input_schema": PARAMETERS}


@pytest.fixture(scope="module")
def tooled() -> Iterator[Server]:
    with running(make_engine(), chat_template="hermes", api_key=("secret",)) as server:
        yield server
        server.check_idle()


@pytest.fixture(scope="module")
def client(tooled: Server) -> Any:
    return openai.OpenAI(base_url=tooled.url + "/v1", api_key="secret", max_retries=0)


@pytest.fixture(scope="module")
def claude(tooled: Server) -> Any:
    return pytest.importorskip("anthropic").Anthropic(base_url=tooled.url, api_key="secret", max_retries=0)


def test_a_response(server: Server) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        answer = client.responses.create(model="nano", input=FACTS, temperature=0, max_output_tokens=5)
        assert answer.output_text == " apple = 417." and answer.status in ("completed", "incomplete")
        assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
        chat = client.chat.completions.create(model="nano", messages=[{"role": "user", "content": FACTS}], temperature=0)
        assert chat.choices[0].message.content == answer.output_text
        cut = client.responses.create(model="nano", input=FACTS, temperature=0, max_output_tokens=2)
        assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"


def test_a_response_is_streamed_in_order(client: Any) -> None:
    with client.responses.stream(model="nano", input=FACTS, temperature=0, max_output_tokens=12) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    assert kinds[-4:] == ["response.output_text.done", "response.content_part.done", "response.output_item.done", kinds[-1]]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == final.output_text
    assert kinds[-1] == f"response.{final.status}" and final.usage.output_tokens


def test_streams_of_responses_have_the_log_probabilities_of_all_tokens(tmp_path: Path) -> None:
    """Also those of tokens that show no text at once: parts of characters, what may become a stop string, end tokens."""
    model = save_speaking(tmp_path, "aé€b🙊c", "{{ messages[0].content }}>", special=None)
    asked = {"input": "q", "max_output_tokens": 40, "temperature": 0, "include": ["message.output_text.logprobs"]}
    with running(make_engine(model, offload_layers=0, method={"method": "full"}, max_model_len=512)) as server:
        for stop, tokens in (([], 13), (["c"], 12), (["€b🙊cd"], 13)):
            whole = server.post("/v1/responses", asked | {"stop": stop}).json()
            streamed = server.post("/v1/responses", asked | {"stop": stop, "stream": True}).text.split("\n")
            events = [json.loads(line.removeprefix("data: ")) for line in streamed if line.startswith("data: ")]
            deltas = [event["logprobs"] for event in events if event["type"] == "response.output_text.delta"]
            [part] = whole["output"][0]["content"]
            assert len(part["logprobs"]) == tokens == whole["usage"]["output_tokens"]
            shown = [one for delta in deltas for one in delta]
            assert shown == part["logprobs"] == events[-1]["response"]["output"][0]["content"][0]["logprobs"]
        server.check_idle()


def test_deltas_of_responses_are_padded_where_that_is_asked_for(server: Server) -> None:
    asked = {"input": "a", "max_output_tokens": 6, "seed": 1, "stream": True, "stream_options": {"include_obfuscation": True}}
    lines = server.post("/v1/responses", asked).text.split("\n")
    deltas = [line for line in lines if line.startswith("data: ") and ".delta" in line.partition(",")[0]]
    assert deltas and all("obfuscation" in line and (len(line.encode()) + 2) % 64 == 0 for line in deltas)


@pytest.mark.slow
def test_responses_call_functions_for_several_turns(client: Any) -> None:
    options: Any = {"model": "nano", "tools": [FLAT], "tool_choice": "required", "parallel_tool_calls": False}
    options |= {"max_output_tokens": 150, "extra_body": {"seed": 1}}
    first = client.responses.create(input="weather?", instructions="be quick", **options)
    [call] = first.output
    assert call.type == "function_call" and call.name == "get_weather" and len(json.loads(call.arguments)["city"]) <= 5
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"}
    by_id = client.responses.create(input=[result], previous_response_id=first.id, **options)
    by_items = client.responses.create(input=[{"role": "user", "content": "weather?"}, call, result], **options)
    assert by_id.output[0].arguments == by_items.output[0].arguments
    by_reference = client.responses.create(
        input=[{"role": "user", "content": "weather?"}, {"type": "item_reference", "id": call.id}, result], **options
    )
    assert by_reference.output[0].arguments == by_items.output[0].arguments
    events = list(client.responses.create(input="weather?", stream=True, **options))
    deltas = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    [done] = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert deltas == done.arguments == events[-1].response.output[0].arguments


def test_responses_follow_schemas(client: Any) -> None:
    from pydantic import BaseModel, Field

    class Inner(BaseModel):
        yes: bool

    class Person(BaseModel):
        name: str = Field(max_length=5)
        inner: Inner

    answer = client.responses.parse(model="nano", input="who?", text_format=Person, max_output_tokens=150, temperature=0)
    assert isinstance(answer.output_parsed, Person)
    echoed = [{"role": "user", "content": "who?"}, *answer.output, {"role": "user", "content": "and?"}]
    assert client.responses.create(model="nano", input=echoed, max_output_tokens=2).status


def test_what_responses_refuse(client: Any) -> None:
    for wrong, words in (
        ({"previous_response_id": "resp_unknown"}, "not found"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "not found"),
        ({"input": []}, "empty"),
        ({"input": [{"type": "computer_call", "id": "x"}]}, "not supported"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "'input_image' is not supported"),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"background": True}, "background"),
        ({"max_output_tokens": 5000}, "maximum context length is 2048"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "objekt"}}}}, "text.format cannot .*objekt"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            client.responses.create(**{"model": "nano", "input": "a"} | wrong)
    first = client.responses.create(model="nano", input="a", max_output_tokens=2, store=False)
    with pytest.raises(openai.BadRequestError, match="not found"):
        client.responses.create(model="nano", input="a", previous_response_id=first.id)


def test_kept_answers_are_bounded() -> None:
    from specontext.server.responses.store import ResponseStore

    store = ResponseStore(most=3, most_characters=1000)
    for number in range(5):
        store.add(f"r{number}", [{"id": f"i{number}"}], [{"id": f"o{number}"}])
    assert store.items_of("r1") is None and store.item("o1") is None
    assert store.items_of("r4") == [{"id": "i4"}, {"id": "o4"}] and store.item("o4") == {"id": "o4"}
    store.add("huge", [{"id": "a" * 2000}], [])
    assert store.items_of("huge") is None and store.items_of("r4") is None


def test_a_message(claude: Any, tooled: Server) -> None:
    answer = claude.messages.create(
        model="nano", max_tokens=10, messages=[{"role": "user", "content": FACTS}], extra_body=GREEDY, stop_sequences=["zzz"]
    )
    assert answer.type == "message" and answer.content[0].type == "text" and answer.stop_reason in ("end_turn", "max_tokens")
    counted = claude.messages.count_tokens(model="nano", messages=[{"role": "user", "content": FACTS}])
    assert counted.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens
    said = answer.content[0].text
    stopped = claude.messages.create(
        model="nano", max_tokens=10, messages=[{"role": "user", "content": FACTS}], extra_body=GREEDY, stop_sequences=[said[2:4]]
    )
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == said[2:4]
    assert said.startswith(stopped.content[0].text)


def test_messages_are_streamed(claude: Any) -> None:
    asked: Any = {"model": "nano", "max_tokens": 8, "messages": [{"role": "user", "content": FACTS}]}
    asked["extra_body"] = GREEDY
    whole = claude.messages.create(**asked)
    with claude.messages.stream(**asked, system=[{"type": "text", "text": ""}]) as stream:
        kinds = [event.type for event in stream if event.type not in ("text",)]
        final = stream.get_final_message()
    assert kinds[0] == "message_start" and kinds[1] == "content_block_start" and kinds[-1] == "message_stop"
    assert final.usage.output_tokens == 8 and final.content[0].text and whole.content[0].text


def test_what_coding_agents_send_is_understood(claude: Any) -> None:
    keeps = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    cached = {"type": "ephemeral"}
    answer = claude.messages.create(
        model="nano",
        max_tokens=2,
        system=[{"type": "text", "text": "be kind", "cache_control": cached}],
        messages=[{"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": cached}]}],
        tools=[CUSTOM | {"cache_control": cached}],
        metadata={"user_id": "me"},
        thinking={"type": "disabled"},
        extra_body={"context_management": keeps, "temperature": 1},
        extra_headers={"anthropic-beta": "something-2025-01-01"},
        extra_query={"beta": "true"},
    )
    assert answer.usage.output_tokens == 2 or answer.stop_reason == "end_turn"


def test_what_is_for_accounts_changes_no_prompt(claude: Any) -> None:
    said = [{"type": "text", "text": "be kind"}]
    options: Any = {"model": "nano", "messages": [{"role": "user", "content": "hi"}]}
    counts = {claude.messages.count_tokens(system=system, **options).input_tokens for system in (said, [BILLING, *said])}
    assert len(counts) == 1
    alone = [claude.messages.count_tokens(**options, **more).input_tokens for more in ({}, {"system": [BILLING]})]
    assert alone[0] == alone[1] < counts.pop()


@pytest.mark.slow
def test_messages_use_tools_for_several_turns(claude: Any) -> None:
    options: Any = {"model": "nano", "max_tokens": 150, "tools": [CUSTOM], "extra_body": {"seed": 1}}
    options |= {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    messages: list[Any] = [{"role": "user", "content": "weather?"}]
    for turn in range(2):
        answer = claude.messages.create(messages=messages, **options)
        assert answer.stop_reason == "tool_use" and len(answer.content[-1].input["city"]) <= 5
        with claude.messages.stream(messages=messages, **options) as stream:
            assert stream.get_final_message().content[-1].input == answer.content[-1].input
        result = {"type": "tool_result", "tool_use_id": answer.content[-1].id, "content": f"{turn + 20} degrees"}
        messages += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    named = claude.messages.create(messages=messages, **options | {"tool_choice": {"type": "tool", "name": "get_weather"}})
    assert named.stop_reason == "tool_use"
    assert claude.messages.count_tokens(model="nano", messages=messages, tools=[CUSTOM]).input_tokens > 50


SEEN = {"type": "tool_result", "tool_use_id": "x", "content": [{"type": "image", "source": {}}]}


def test_what_messages_refuse(claude: Any, tooled: Server) -> None:
    import anthropic

    for wrong, words in (
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking"),
        ({"thinking": {"type": "adaptive"}}, "--reasoning-parser"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "not supported"),
        ({"messages": [{"role": "user", "content": [SEEN]}]}, "'image' is not supported"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "objekt"}}}},
            "output_config.format cannot .*objekt",
        ),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash"),
        ({"max_tokens": 5000}, r"input length and `max_tokens` exceed context limit: [0-9]+ \+ 5000 > 2048"),
        ({"messages": [{"role": "user", "content": "word " * 1000}]}, "prompt is too long: [0-9]+ tokens > 2048 maximum"),
        ({"messages": [{"role": "user", "content": "word " * 10_000}]}, "prompt is too long: [0-9]+ tokens > 2048 maximum"),
    ):
        with pytest.raises(anthropic.BadRequestError, match=words) as refused:
            claude.messages.create(**{"model": "nano", "max_tokens": 5, "messages": [{"role": "user", "content": "a"}]} | wrong)
        assert refused.value.body["type"] == "error" and refused.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=tooled.url, api_key="wrong", max_retries=0).messages.count_tokens(
            model="nano", messages=[{"role": "user", "content": "a"}]
        )
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.count_tokens(model="other", messages=[{"role": "user", "content": "a"}])


def test_thinking_in_all_protocols(tmp_path: Any) -> None:
    path = save_speaking(
        tmp_path, "um, hi</think>ok", "{% for m in messages %}{{ m.content }}{% endfor %}<think>>", special=False
    )
    engine = make_engine(path, offload_layers=0, method={"method": "full"}, budget=None, max_model_len=200)
    with running(engine, reasoning_parser="deepseek_r1") as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        for streamed in (False, True):
            answer = client.responses.create(model=str(path), input="a", temperature=0, stream=streamed)
            answer = list(answer)[-1].response if streamed else answer
            assert [item.type for item in answer.output] == ["reasoning", "message"] and answer.output_text == "ok"
            assert answer.output[0].content[0].text == "um, hi" and answer.usage.output_tokens_details.reasoning_tokens
        again = client.responses.create(model=str(path), input="b", previous_response_id=answer.id, temperature=0)
        assert again.output_text == "ok"
        body = {"model": str(path), "max_tokens": 30, "messages": [{"role": "user", "content": "a"}], "temperature": 0}
        blocks = server.post("/v1/messages", body | {"thinking": {"type": "adaptive"}}).json()["content"]
        assert [(block["type"], block[block["type"]]) for block in blocks] == [("thinking", "um, hi"), ("text", "ok")]
        text = server.post("/v1/messages", body | {"stream": True}).text
        assert "thinking_delta" in text and text.rstrip().endswith('{"type":"message_stop"}')

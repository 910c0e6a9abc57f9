"""What agents are built with, against a real server: each is tested where it is installed.

pip install pydantic-ai-slim[openai] instructor litellm openai-agents langchain-openai langchain-anthropic
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

from tests.server.serving import Server, make_engine, running

pytestmark = pytest.mark.slow  # they take seconds to import
KEY = "secret"


class Inner(BaseModel):
    yes: bool


class Person(BaseModel):
    name: str = Field(max_length=5)
    inner: Inner


@pytest.fixture(scope="module")
def tooled() -> Iterator[Server]:
    with running(make_engine(max_model_len=4096), chat_template="hermes", api_key=(KEY,), served_model_name=("nano",)) as server:
        yield server
        server.check_idle()


def test_langchain(tooled: Server) -> None:
    langchain = pytest.importorskip("langchain_openai")
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    @tool
    def look(left: bool) -> str:
        """Look somewhere."""
        return "left" if left else "right"

    options: Any = {"model": "nano", "base_url": tooled.url + "/v1", "api_key": KEY, "max_tokens": 150, "temperature": 0}
    for responses in (False, True):
        chat = langchain.ChatOpenAI(**options, use_responses_api=responses)
        for method in ("json_schema", "function_calling") if not responses else ("json_schema",):
            assert isinstance(chat.with_structured_output(Person, method=method).invoke("who?"), Person)
        bound = chat.bind_tools([look], tool_choice="required", parallel_tool_calls=False)
        messages: list[Any] = [HumanMessage("look")]
        for _ in range(2):
            answer = bound.invoke(messages)
            [call] = answer.tool_calls
            messages += [answer, ToolMessage(str(look.invoke(call["args"])), tool_call_id=call["id"])]
        whole = None
        for piece in bound.stream(messages):
            whole = piece if whole is None else whole + piece
        assert whole is not None and whole.tool_calls[0]["name"] == "look"  # type: ignore[attr-defined]
    with pytest.raises(Exception, match="maximum context length") as long:
        langchain.ChatOpenAI(**options).invoke("word " * 9000)
    assert getattr(long.value, "code", None) == "context_length_exceeded"


def test_langchain_anthropic(tooled: Server) -> None:
    langchain = pytest.importorskip("langchain_anthropic")
    chat = langchain.ChatAnthropic(model="nano", base_url=tooled.url, api_key=KEY, max_tokens=150)
    assert isinstance(chat.with_structured_output(Person).invoke("who?"), Person)
    assert chat.invoke("Remember the facts in this text. apple = 417.\nQuestion: apple?").content is not None


@pytest.mark.parametrize("kind", ["chat", "responses"])
def test_pydantic_ai(tooled: Server, kind: str) -> None:
    ai = pytest.importorskip("pydantic_ai")
    settings: Any = {"max_tokens": 200, "temperature": 0}
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    make = OpenAIChatModel if kind == "chat" else OpenAIResponsesModel
    model = make("nano", provider=OpenAIProvider(base_url=tooled.url + "/v1", api_key=KEY))
    agent = ai.Agent(model, output_type=Person, model_settings=settings, retries=3)
    assert isinstance(agent.run_sync("who?").output, Person)
    native = ai.Agent(model, output_type=ai.NativeOutput(Person), model_settings=settings)
    assert isinstance(native.run_sync("who?").output, Person)


def test_instructor(tooled: Server) -> None:
    instructor = pytest.importorskip("instructor")
    import openai

    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        client = instructor.from_openai(openai.OpenAI(base_url=tooled.url + "/v1", api_key=KEY), mode=mode)
        asked: Any = {"model": "nano", "max_tokens": 200, "temperature": 0, "messages": [{"role": "user", "content": "who?"}]}
        assert isinstance(client.chat.completions.create(response_model=Person, **asked), Person)


def test_litellm(tooled: Server) -> None:
    litellm = pytest.importorskip("litellm")
    asked: Any = {"model": "openai/nano", "api_base": tooled.url + "/v1", "api_key": KEY, "max_tokens": 150, "temperature": 0}
    tool = {"type": "function", "function": {"name": "look", "parameters": Inner.model_json_schema()}}
    messages: list[Any] = [{"role": "user", "content": "who?"}]
    for _ in range(2):
        answer = litellm.completion(messages=messages, tools=[tool], tool_choice="required", parallel_tool_calls=False, **asked)
        message = answer.choices[0].message
        [call] = message.tool_calls
        messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "seen"}]
    pieces = list(litellm.completion(messages=messages, tools=[tool], tool_choice="required", stream=True, **asked))
    assert litellm.stream_chunk_builder(pieces).choices[0].message.tool_calls
    parsed = litellm.completion(messages=messages[:1], response_format=Person, **asked)
    assert Person.model_validate_json(parsed.choices[0].message.content)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=[{"role": "user", "content": "word " * 9000}], **asked)
    anthropic: Any = {"model": "anthropic/nano", "api_base": tooled.url, "api_key": KEY, "max_tokens": 20}
    assert litellm.completion(messages=messages[:1], **anthropic).choices[0].finish_reason in ("length", "stop")


@pytest.mark.parametrize("kind", ["chat", "responses"])
def test_openai_agents(tooled: Server, kind: str) -> None:
    agents = pytest.importorskip("agents")
    import openai

    os.environ.setdefault("OPENAI_AGENTS_DISABLE_TRACING", "1")
    looked = []

    @agents.function_tool
    def look(where: bool) -> str:
        """Look somewhere."""
        looked.append(where)
        return "seen"

    async def run() -> Any:
        client = openai.AsyncOpenAI(base_url=tooled.url + "/v1", api_key=KEY)
        make = agents.OpenAIChatCompletionsModel if kind == "chat" else agents.OpenAIResponsesModel
        model = make(model="nano", openai_client=client)
        settings = agents.ModelSettings(temperature=0, max_tokens=200, tool_choice="required", parallel_tool_calls=False)
        agent = agents.Agent(name="a", model=model, tools=[look], output_type=Person, model_settings=settings)
        config = agents.RunConfig(tracing_disabled=True)
        first = await agents.Runner.run(agent, "look around", max_turns=4, run_config=config)
        streamed = agents.Runner.run_streamed(agent, "look around", max_turns=4, run_config=config)
        kinds = {event.type async for event in streamed.stream_events()}
        return first, streamed, kinds

    first, streamed, kinds = asyncio.run(run())
    assert looked and isinstance(first.final_output, Person) and isinstance(streamed.final_output, Person)
    assert "raw_response_event" in kinds


def test_clients_of_node(tooled: Server) -> None:
    """npm's openai and the AI SDK, where SPECONTEXT_NODE_CLIENTS names a directory that has them (see clients.mjs)."""
    folder = os.environ.get("SPECONTEXT_NODE_CLIENTS")
    if folder is None:
        pytest.skip("SPECONTEXT_NODE_CLIENTS names no directory with npm's clients")
    script = shutil.copy(Path(__file__).parent / "clients.mjs", folder)
    done = subprocess.run(["node", script, tooled.url, KEY], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)

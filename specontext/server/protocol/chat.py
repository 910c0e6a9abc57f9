"""Bodies of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from specontext.server.protocol.bounds import MOST_MESSAGES, MOST_TOOLS, Name, Variables, check_messages
from specontext.server.protocol.common import Answered, Body, SamplingBody, Usage, content_kind, unsupported
from specontext.server.protocol.structured import StructuredBody
from specontext.server.protocol.tools import (
    AllowedChoice,
    CallInMessage,
    FunctionTool,
    NamedChoice,
    ToolCall,
    ToolChoice,
    ToolList,
)


class TextPart(Body):
    type: content_kind("text")  # type: ignore[valid-type]
    text: str
    cache_control: Any = Field(None, description="Accepted for compatibility: beginnings are known again without it.")


# What `Message` checks of a message's role, for its description.
_TEXT: dict[str, JsonValue] = {"not": {"type": "null"}}
_NO_ID: dict[str, JsonValue] = {"type": "null"}
_NO_CALLS: dict[str, JsonValue] = {"anyOf": [{"type": "null"}, {"type": "array", "maxItems": 0}]}
_ASSISTANT: dict[str, JsonValue] = {"role": {"const": "assistant"}, "tool_call_id": _NO_ID}
_TOOL: dict[str, JsonValue] = {"role": {"const": "tool"}, "content": _TEXT, "tool_calls": _NO_CALLS}
_OTHERS: dict[str, JsonValue] = _TOOL | {"role": {"enum": ["system", "developer", "user"]}, "tool_call_id": _NO_ID}
_BY_ROLE: list[JsonValue] = [
    {"properties": _ASSISTANT},
    {"properties": _TOOL, "required": ["content"]},
    {"properties": _OTHERS, "required": ["content"]},
]


class Message(Body):
    model_config = ConfigDict(json_schema_extra={"anyOf": _BY_ROLE})

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: Name | None = Field(None, description="Given to the chat template, which may have no place for it.")
    reasoning: str | None = None
    reasoning_content: str | None = Field(None, description="The same as reasoning, by its older name.")
    tool_call_id: Name | None = Field(None, description="Of a tool's message: the call that it answers.")
    tool_calls: Annotated[list[CallInMessage], Field(fail_fast=True, max_length=MOST_TOOLS)] | None = None
    function_call: unsupported("give the call in tool_calls") = None  # type: ignore[valid-type]
    parsed: Any = Field(None, description="What clients made of an answer's text; changes nothing.")
    provider_specific_fields: Any = Field(None, description="What litellm sends back of an answer; changes nothing.")
    refusal: unsupported("the chat template has no place for it", "") = None  # type: ignore[valid-type]
    audio: unsupported("only text is implemented") = None  # type: ignore[valid-type]
    annotations: unsupported("the chat template has no place for them", []) = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _one_reasoning(self) -> Message:
        if self.reasoning and self.reasoning_content and self.reasoning != self.reasoning_content:
            raise ValueError("reasoning and reasoning_content differ: give one of them")
        return self

    @model_validator(mode="after")
    def _of_its_role(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"content is missing: a message of the role {self.role} needs a text")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls are the assistant's, and this message's role is {self.role}")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError(f"tool_call_id is for messages of the role tool, and this one's is {self.role}")
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""

    def for_template(self) -> dict[str, Any]:
        """The message as `ChatTemplate` takes it."""
        content = (
            [{"type": "text", "text": part.text} for part in self.content] if isinstance(self.content, list) else self.content
        )
        message: dict[str, Any] = {"role": self.role, "content": content}
        message |= {"name": self.name} if self.name is not None else {}
        reasoning = self.reasoning_content or self.reasoning
        message |= {"reasoning_content": reasoning} if reasoning is not None else {}
        message |= {"tool_call_id": self.tool_call_id} if self.tool_call_id is not None else {}
        return message | ({"tool_calls": [_for_template(call) for call in self.tool_calls]} if self.tool_calls else {})


def _for_template(call: CallInMessage) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": call.function.arguments}
    return {"id": call.id, "type": "function", "function": function}


class TemplateBody(Body):
    """Fields that say how messages become a prompt."""

    messages: Annotated[
        list[Message], Field(fail_fast=True, min_length=1, max_length=MOST_MESSAGES), BeforeValidator(check_messages)
    ]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Variables | None = None
    tools: ToolList | None = None

    @property
    def shown_tools(self) -> list[FunctionTool]:
        """Tools that the chat template writes out."""
        return self.tools or []

    @property
    def template_variables(self) -> dict[str, Any]:
        return self.chat_template_kwargs or {}

    @model_validator(mode="after")
    def _one_ending(self) -> TemplateBody:
        if self.continue_final_message and self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        return self


class ChatRequest(SamplingBody, StructuredBody, TemplateBody):
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**63)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, lt=2**63)
    tool_choice: ToolChoice | None = Field(None, description="Default: auto with tools.")
    parallel_tool_calls: bool | None = Field(None, description="False: at most one call. Without tools it changes nothing.")
    functions: unsupported("give them as tools", []) = None  # type: ignore[valid-type]
    function_call: unsupported("give it as tool_choice", "none", "auto") = None  # type: ignore[valid-type]
    modalities: unsupported("only text is implemented", ["text"]) = None  # type: ignore[valid-type]
    audio: unsupported("only text is implemented") = None  # type: ignore[valid-type]
    prediction: unsupported("predicted outputs are not implemented") = None  # type: ignore[valid-type]
    web_search_options: unsupported("web search is not implemented") = None  # type: ignore[valid-type]
    reasoning_effort: Name | None = Field(None, description="For chat templates that know it.")
    verbosity: unsupported("it is not implemented", "medium") = None  # type: ignore[valid-type]
    echo: unsupported("an answer begins with its own text", False) = None  # type: ignore[valid-type]
    chat_template: unsupported("it is the server's, --chat-template") = None  # type: ignore[valid-type]
    documents: unsupported("give their text in messages", []) = None  # type: ignore[valid-type]
    mm_processor_kwargs: unsupported("only text is implemented", {}) = None  # type: ignore[valid-type]
    include_reasoning: unsupported("thinking is given where the server has a reasoning parser", True) = None  # type: ignore[valid-type]
    thinking_token_budget: unsupported("the length of thinking cannot be bounded") = None  # type: ignore[valid-type]

    @property
    def shown_tools(self) -> list[FunctionTool]:
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def template_variables(self) -> dict[str, Any]:
        own = {"reasoning_effort": self.reasoning_effort} if self.reasoning_effort is not None else {}
        return own | (self.chat_template_kwargs or {})

    @model_validator(mode="after")
    def _tools_and_choice(self) -> ChatRequest:
        names = [tool.function.name for tool in self.tools or []]
        if len({*names}) < len(names):
            raise ValueError("tools must have different names")
        if isinstance(self.tool_choice, NamedChoice):
            chosen = [self.tool_choice.function.name]
        elif isinstance(self.tool_choice, AllowedChoice):
            chosen = [tool.function.name for tool in self.tool_choice.allowed_tools.tools]
        else:
            chosen = []
        if missing := [name for name in chosen if name not in names]:
            raise ValueError(f"tool_choice names {missing[0]}, which is not among the tools")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice is required and there are no tools: give some")
        return self


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(Answered):
    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Answered):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    token_ids: list[int] | None = None


class ChatResponse(Answered):
    model_config = ConfigDict(title="ChatCompletion")

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None

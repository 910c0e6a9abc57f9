"""Bodies of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from specontext.server.protocol.bounds import MOST_MESSAGES, Metadata, Name, Variables, check_messages
from specontext.server.protocol.common import Body, SamplingBody, Usage, unsupported


def _check_kind(value: Any) -> Any:
    if isinstance(value, str) and value != "text":
        raise ValueError(f"content of type '{value[:50]}' is not supported: only 'text' is")
    return value


class TextPart(Body):
    type: Annotated[Literal["text"], BeforeValidator(_check_kind)]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None
    name: Name | None = Field(None, description="Given to the chat template, which may have no place for it.")
    reasoning: str | None = None
    reasoning_content: str | None = Field(None, description="The same as reasoning, by its older name.")
    tool_call_id: unsupported("tools are not implemented") = None  # type: ignore[valid-type]
    tool_calls: unsupported("tools are not implemented", []) = None  # type: ignore[valid-type]
    function_call: unsupported("tools are not implemented") = None  # type: ignore[valid-type]
    refusal: unsupported("the chat template has no place for it", "") = None  # type: ignore[valid-type]
    audio: unsupported("only text is implemented") = None  # type: ignore[valid-type]
    annotations: unsupported("the chat template has no place for them", []) = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _one_reasoning(self) -> Message:
        if self.reasoning and self.reasoning_content and self.reasoning != self.reasoning_content:
            raise ValueError("reasoning and reasoning_content differ: give one of them")
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""

    def for_template(self) -> dict[str, Any]:
        """The message as `ChatTemplate` takes it."""
        content = [part.model_dump() for part in self.content] if isinstance(self.content, list) else self.content
        message: dict[str, Any] = {"role": self.role, "content": content}
        message |= {"name": self.name} if self.name is not None else {}
        reasoning = self.reasoning_content or self.reasoning
        return message | ({"reasoning_content": reasoning} if reasoning is not None else {})


class TemplateBody(Body):
    """Fields that say how messages become a prompt."""

    messages: Annotated[
        list[Message], Field(fail_fast=True, min_length=1, max_length=MOST_MESSAGES), BeforeValidator(check_messages)
    ]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Variables | None = None
    tools: unsupported("tools are not implemented", []) = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _one_ending(self) -> TemplateBody:
        if self.continue_final_message and self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        return self


class ChatRequest(SamplingBody, TemplateBody):
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**63)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, lt=2**63)
    metadata: Metadata | None = Field(None, description="Accepted for compatibility; changes nothing.")
    safety_identifier: Name | None = Field(None, description="Accepted for compatibility; changes nothing.")
    prompt_cache_key: Name | None = Field(None, description="Accepted for compatibility; changes nothing.")
    parallel_tool_calls: bool | None = Field(None, description="Without tools it changes nothing.")
    service_tier: unsupported("there is one tier", "auto", "default") = None  # type: ignore[valid-type]
    store: unsupported("nothing is stored", False) = None  # type: ignore[valid-type]
    response_format: unsupported("output formats are not implemented", {"type": "text"}) = None  # type: ignore[valid-type]
    tool_choice: unsupported("tools are not implemented", "none", "auto") = None  # type: ignore[valid-type]
    functions: unsupported("tools are not implemented", []) = None  # type: ignore[valid-type]
    function_call: unsupported("tools are not implemented", "none", "auto") = None  # type: ignore[valid-type]
    modalities: unsupported("only text is implemented", ["text"]) = None  # type: ignore[valid-type]
    audio: unsupported("only text is implemented") = None  # type: ignore[valid-type]
    prediction: unsupported("predicted outputs are not implemented") = None  # type: ignore[valid-type]
    web_search_options: unsupported("web search is not implemented") = None  # type: ignore[valid-type]
    reasoning_effort: unsupported("give what the chat template knows in chat_template_kwargs") = None  # type: ignore[valid-type]
    verbosity: unsupported("it is not implemented") = None  # type: ignore[valid-type]


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatResponse(BaseModel):
    model_config = ConfigDict(title="ChatCompletion")

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage

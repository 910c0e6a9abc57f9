"""Bodies of /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from specontext.sampling_params import MOST_STOPS
from specontext.server.protocol.bounds import (
    MOST_MESSAGES,
    MOST_OUTPUTS_OF_TOOLS,
    MOST_TOOLS,
    Biases,
    Metadata,
    Name,
    Schema,
    Variables,
    check_messages,
)
from specontext.server.protocol.common import Body, content_kind, unsupported
from specontext.server.protocol.structured import type_tag
from specontext.server.protocol.tools import ToolName


class InputText(Body):
    type: content_kind("input_text", "output_text", "text", "refusal")  # type: ignore[valid-type]
    text: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    prompt_cache_breakpoint: Any = None
    parsed: Any = Field(None, description="What clients made of an answer's text; changes nothing.")

    @model_validator(mode="after")
    def _says_one_thing(self) -> InputText:
        own, other = ("refusal", "text") if self.type == "refusal" else ("text", "refusal")
        if getattr(self, own) is None or getattr(self, other):
            raise ValueError(f"a part of type {self.type} has its text in {own}, and none in {other}")
        return self


class InputMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Annotated[list[InputText], Field(fail_fast=True)]
    id: Name | None = None
    status: Name | None = None
    phase: Name | None = None


class InputCall(Body):
    type: Literal["function_call"]
    call_id: Name
    name: ToolName
    arguments: str
    id: Name | None = None
    status: Name | None = None
    parsed_arguments: Any = Field(None, description="What clients made of the arguments; changes nothing.")
    namespace: unsupported("tools have no namespaces") = None  # type: ignore[valid-type]


class InputResult(Body):
    type: Literal["function_call_output"]
    call_id: Name
    output: str | Annotated[list[InputText], Field(fail_fast=True, max_length=MOST_OUTPUTS_OF_TOOLS)]
    id: Name | None = None
    status: Name | None = None


class ReasoningText(Body):
    type: Literal["summary_text", "reasoning_text"]
    text: str


class InputReasoning(Body):
    type: Literal["reasoning"]
    id: Name | None = None
    summary: Annotated[list[ReasoningText], Field(fail_fast=True)] | None = None
    content: Annotated[list[ReasoningText], Field(fail_fast=True)] | None = None
    encrypted_content: str | None = None
    status: Name | None = None

    @model_validator(mode="after")
    def _readable(self) -> InputReasoning:
        if self.encrypted_content and not (self.content or self.summary):
            raise ValueError("thinking that is encrypted cannot be read here: leave the item out")
        return self


class ItemReference(Body):
    type: Literal["item_reference"]
    id: Name


def _item_kind(value: Any) -> str:
    return type_tag(value) or "Message"


InputItem = Annotated[
    Annotated[InputMessage, Tag("Message")]
    | Annotated[InputCall, Tag("Function_call")]
    | Annotated[InputResult, Tag("Function_call_output")]
    | Annotated[InputReasoning, Tag("Reasoning")]
    | Annotated[ItemReference, Tag("Item_reference")],
    Discriminator(
        _item_kind,
        custom_error_type="input_item",
        custom_error_message="items of this type are not supported: give messages, function calls and their outputs",
    ),
]


def _check_tool(value: Any) -> Any:
    if isinstance(value, dict) and isinstance(value.get("type"), str) and value["type"] != "function":
        raise ValueError(f"tools of type '{value['type'][:50]}' are not supported: only functions are")
    return value


class FlatTool(Body):
    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None
    defer_loading: unsupported("all tools are shown", False) = None  # type: ignore[valid-type]


class FlatChoice(Body):
    type: Literal["function"]
    name: ToolName


class FlatAllowed(Body):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FlatChoice], Field(fail_fast=True, min_length=1, max_length=MOST_TOOLS)]


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema_of_its_type(self) -> TextFormat:
        if (self.schema_ is not None) != (self.type == "json_schema"):
            raise ValueError("a schema belongs to the type json_schema, which needs one")
        return self


class TextSettings(Body):
    format: TextFormat | None = None
    verbosity: unsupported("it is not implemented", "medium") = None  # type: ignore[valid-type]


class ReasoningSettings(Body):
    effort: Name | None = Field(None, description="For chat templates that know it.")
    summary: unsupported("thinking is given whole", "auto") = None  # type: ignore[valid-type]
    generate_summary: unsupported("thinking is given whole", "auto") = None  # type: ignore[valid-type]
    context: unsupported("thinking in the input is the chat template's to keep", "auto") = None  # type: ignore[valid-type]


class ResponseStreamOptions(Body):
    include_obfuscation: bool = Field(
        False, description="Pad deltas to multiples of 64 bytes, so that their lengths tell little. Off unless asked for."
    )


class ResponsesRequest(Body):
    model: Name | None = None
    input: Annotated[
        str | Annotated[list[InputItem], Field(fail_fast=True, max_length=MOST_MESSAGES)], BeforeValidator(check_messages)
    ]
    instructions: str | None = None
    previous_response_id: Name | None = Field(None, description="Of an answer that the server still knows.")
    tools: (
        Annotated[list[Annotated[FlatTool, BeforeValidator(_check_tool)]], Field(fail_fast=True, max_length=MOST_TOOLS)] | None
    ) = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | FlatAllowed | None = None
    parallel_tool_calls: bool | None = True
    text: TextSettings | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=2**63)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, lt=2**63)
    stream: bool | None = False
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = Field(True, description="Keep the answer for previous_response_id, in memory and within a bound.")
    include: (
        Annotated[list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]], Field(fail_fast=True)] | None
    ) = None
    reasoning: ReasoningSettings | None = None
    metadata: Metadata | None = None
    user: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None
    prompt_cache_retention: Name | None = None
    truncation: unsupported("shorten the input yourself", "disabled") = None  # type: ignore[valid-type]
    background: unsupported("answers are made while the client waits", False) = None  # type: ignore[valid-type]
    conversation: unsupported("give previous_response_id or all input") = None  # type: ignore[valid-type]
    prompt: unsupported("there are no stored prompts") = None  # type: ignore[valid-type]
    max_tool_calls: unsupported("tools are called by the client") = None  # type: ignore[valid-type]
    service_tier: unsupported("there is one tier", "auto", "default") = None  # type: ignore[valid-type]
    context_management: unsupported("shorten the input yourself") = None  # type: ignore[valid-type]
    # Fields that OpenAI does not know, as in chats.
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True, max_length=MOST_STOPS)] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Biases | None = None
    method: Name | None = None
    budget: int | None = None
    chat_template_kwargs: Variables | None = None

    @property
    def wants_obfuscation(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_obfuscation


ALIKE = (
    *("model", "parallel_tool_calls", "temperature", "top_p", "stream", "top_k", "min_p", "seed", "stop", "min_tokens"),
    *("ignore_eos", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "method", "budget"),
    "chat_template_kwargs",
)  # fields that chats have by the same name

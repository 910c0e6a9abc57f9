"""Bodies of /v1/messages, as Anthropic has them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from specontext.sampling_params import LONGEST_STOP, MOST_STOPS
from specontext.server.protocol.bounds import MOST_MESSAGES, MOST_PARTS, MOST_TOOLS, Name, Schema, Variables, check_messages
from specontext.server.protocol.common import Body, content_kind, unsupported
from specontext.server.protocol.structured import type_tag
from specontext.server.protocol.tools import ToolName

_KEEPS_THINKING = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}  # which asks for nothing
CacheControl = Annotated[Any, Field(description="Accepted for compatibility: beginnings are known again without it.")]


class TextBlock(Body):
    type: content_kind("text")  # type: ignore[valid-type]
    text: str
    cache_control: CacheControl = None
    citations: unsupported("citations are not implemented", []) = None  # type: ignore[valid-type]


class ThinkingBlock(Body):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class CallBlock(Body):
    type: Literal["tool_use"]
    id: Name
    name: ToolName
    input: Variables
    cache_control: CacheControl = None
    caller: Any = None


class ResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: Name
    content: str | Annotated[list[TextBlock], Field(fail_fast=True, max_length=MOST_PARTS)] | None = None
    is_error: bool | None = None
    cache_control: CacheControl = None


Block = Annotated[
    Annotated[TextBlock, Tag("Text")]
    | Annotated[ThinkingBlock, Tag("Thinking")]
    | Annotated[CallBlock, Tag("Tool_use")]
    | Annotated[ResultBlock, Tag("Tool_result")],
    Discriminator(
        type_tag,
        custom_error_type="block",
        custom_error_message="blocks of this type are not supported: give text, thinking, tool_use and tool_result",
    ),
]


class AnthropicMessage(Body):
    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(fail_fast=True)]


def _check_tool(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") not in (None, "custom"):
        raise ValueError(f"tools of type '{str(value['type'])[:50]}' are not supported: only those of the client are")
    return value


class AnthropicTool(Body):
    name: ToolName
    input_schema: Schema
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: CacheControl = None
    eager_input_streaming: bool | None = Field(None, description="Arguments are always streamed as they are written.")


class AnthropicChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _named(self) -> AnthropicChoice:
        if (self.name is not None) != (self.type == "tool"):
            raise ValueError("a name belongs to the type tool, which needs one")
        return self


class AnthropicFormat(Body):
    type: Literal["json_schema"]
    schema_: Schema = Field(alias="schema")


class OutputConfig(Body):
    format: AnthropicFormat | None = None
    effort: unsupported("give what the chat template knows in chat_template_kwargs") = None  # type: ignore[valid-type]


class ThinkingConfig(Body):
    type: Literal["disabled", "adaptive", "enabled"]
    budget_tokens: unsupported("the length of thinking cannot be bounded: use type adaptive") = None  # type: ignore[valid-type]
    display: Name | None = None


class CallerMetadata(Body):
    user_id: Name | None = None


class CountRequest(Body):
    """What counting tokens needs."""

    model: Name | None = None
    messages: Annotated[
        list[AnthropicMessage], Field(fail_fast=True, min_length=1, max_length=MOST_MESSAGES), BeforeValidator(check_messages)
    ]
    system: str | Annotated[list[TextBlock], Field(fail_fast=True, max_length=MOST_PARTS)] | None = None
    tools: (
        Annotated[list[Annotated[AnthropicTool, BeforeValidator(_check_tool)]], Field(fail_fast=True, max_length=MOST_TOOLS)]
        | None
    ) = None
    tool_choice: AnthropicChoice | None = None
    thinking: ThinkingConfig | None = Field(None, description="Needs a reasoning parser, where it is not disabled.")
    output_config: OutputConfig | None = None
    cache_control: CacheControl = None
    mcp_servers: unsupported("tools are called by the client", []) = None  # type: ignore[valid-type]
    context_management: unsupported("shorten the conversation yourself", {}, {"edits": []}, _KEEPS_THINKING) = None  # type: ignore[valid-type]
    chat_template_kwargs: Variables | None = None


class MessagesRequest(CountRequest):
    max_tokens: int = Field(ge=1, lt=2**63)
    stream: bool | None = False
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**63)
    stop_sequences: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]], Field(fail_fast=True, max_length=MOST_STOPS)
        ]
        | None
    ) = None
    metadata: CallerMetadata | None = Field(None, description="Accepted for compatibility; changes nothing.")
    service_tier: unsupported("there is one tier", "auto", "standard_only") = None  # type: ignore[valid-type]
    container: unsupported("there are no containers") = None  # type: ignore[valid-type]
    inference_geo: unsupported("the model runs here") = None  # type: ignore[valid-type]
    # Fields that Anthropic does not know, as in chats.
    seed: int | None = None
    min_p: float | None = None
    method: Name | None = None
    budget: int | None = None

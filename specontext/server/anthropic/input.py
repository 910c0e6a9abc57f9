"""From blocks to messages of a chat."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from specontext.server.errors import ApiError
from specontext.server.protocol.chat import ChatRequest
from specontext.server.protocol.converting import as_chat
from specontext.server.protocol.messages import (
    AnthropicMessage,
    CallBlock,
    CountRequest,
    MessagesRequest,
    ResultBlock,
    TextBlock,
    ThinkingBlock,
)

_ALIKE = ("stream", "temperature", "top_p", "top_k", "min_p", "seed", "method", "budget")  # as chats name them
_ACCOUNTING = "x-anthropic-billing-header:"
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def to_chat(body: CountRequest, *, thinks: bool) -> ChatRequest:
    """The chat that a request means.

    Args:
        thinks: the server tells thinking from answers.

    Raises:
        ApiError, RequestValidationError: something that a chat cannot have.
    """
    if body.thinking is not None and body.thinking.type != "disabled" and not thinks:
        raise ApiError(
            400,
            "thinking is not told from answers here: leave it out, or start the server with --reasoning-parser",
            param="thinking",
        )
    messages: list[dict[str, Any]] = []
    if system := _system(body):
        messages.append({"role": "system", "content": system})
    for message in body.messages:
        messages += _messages(message)
    fields: dict[str, Any] = {"model": body.model, "messages": messages, "chat_template_kwargs": body.chat_template_kwargs}
    if body.messages[-1].role == "assistant":  # the answer is to go on from there
        fields["continue_final_message"] = True
        fields["add_generation_prompt"] = False
    fields |= {"tools": _tools(body), **_choice(body), "response_format": _format(body)}
    if isinstance(body, MessagesRequest):
        fields |= {name: getattr(body, name) for name in _ALIKE}
        fields |= {"max_tokens": body.max_tokens, "stop": body.stop_sequences}
    return as_chat(fields, messages="messages", response_format="output_config.format")


def _system(body: CountRequest) -> str | list[dict[str, Any]]:
    """Without what is for Anthropic's accounts, which is another in each request: no beginning would be known again."""
    if body.system is None or isinstance(body.system, str):
        return body.system or ""
    return _texts([block for block in body.system if not block.text.startswith(_ACCOUNTING)])


def _messages(message: AnthropicMessage) -> list[dict[str, Any]]:
    """The results of tools are messages of their own, in front of what else the user says."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    calls = [_call(block) for block in message.content if isinstance(block, CallBlock)]
    results = [_result(block) for block in message.content if isinstance(block, ResultBlock)]
    texts = [block for block in message.content if isinstance(block, TextBlock)]
    thoughts = "".join(block.thinking for block in message.content if isinstance(block, ThinkingBlock))
    if message.role == "assistant":
        if results:
            raise ApiError(
                400, "messages: results of tools are the user's, and this message is the assistant's", param="messages"
            )
        made: dict[str, Any] = {"role": "assistant", "content": _texts(texts) or None}
        made |= {"reasoning_content": thoughts} if thoughts else {}
        return [made | ({"tool_calls": calls} if calls else {})]
    if calls or thoughts:
        raise ApiError(400, "messages: calls and thinking are the assistant's, and this message is not", param="messages")
    said = [{"role": message.role, "content": _texts(texts)}] if texts or not results else []
    return results + said


def _texts(blocks: Sequence[TextBlock]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": block.text} for block in blocks]


def _call(block: CallBlock) -> dict[str, Any]:
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": json.dumps(block.input)}}


def _result(block: ResultBlock) -> dict[str, Any]:
    content = block.content if isinstance(block.content, str) else _texts(block.content or ())
    if block.is_error:  # chats have no field for it
        content = f"Error: {content}" if isinstance(content, str) else [{"type": "text", "text": "Error:"}, *content]
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}


def _tools(body: CountRequest) -> list[dict[str, Any]] | None:
    if body.tools is None:
        return None
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.input_schema,
                "strict": tool.strict,
            },
        }
        for tool in body.tools
    ]


def _choice(body: CountRequest) -> dict[str, Any]:
    choice = body.tool_choice
    if choice is None:
        return {}
    parallel = {"parallel_tool_calls": False} if choice.disable_parallel_tool_use else {}
    if choice.type == "tool":
        return {"tool_choice": {"type": "function", "function": {"name": choice.name or ""}}} | parallel
    return {"tool_choice": _CHOICES[choice.type]} | parallel


def _format(body: CountRequest) -> dict[str, Any] | None:
    form = body.output_config.format if body.output_config is not None else None
    return None if form is None else {"type": "json_schema", "json_schema": {"schema": form.schema_}}

"""From items to messages of a chat."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import TypeAdapter

from specontext.server.errors import ApiError
from specontext.server.protocol.chat import ChatRequest
from specontext.server.protocol.converting import as_chat
from specontext.server.protocol.responses import (
    ALIKE,
    FlatAllowed,
    FlatChoice,
    InputCall,
    InputItem,
    InputMessage,
    InputReasoning,
    InputResult,
    InputText,
    ItemReference,
    ResponsesRequest,
)
from specontext.server.responses.store import ResponseStore

Item = dict[str, Any]
_ITEM: TypeAdapter[Any] = TypeAdapter(InputItem)


def to_chat(body: ResponsesRequest, items: Sequence[Item]) -> ChatRequest:
    """The chat that a request means, given all its items.

    Raises:
        RequestValidationError: something in it that a chat cannot have.
    """
    messages = _messages(items)
    if body.instructions is not None:
        messages.insert(0, {"role": "system", "content": body.instructions})
    fields = {name: getattr(body, name) for name in ALIKE} | {"messages": messages}
    fields |= {"tools": _tools(body), "tool_choice": _choice(body), "response_format": _format(body)}
    fields |= {"max_completion_tokens": body.max_output_tokens}
    if body.reasoning is not None and body.reasoning.effort is not None:
        fields |= {"reasoning_effort": body.reasoning.effort}
    if body.top_logprobs is not None or "message.output_text.logprobs" in (body.include or ()):
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    return as_chat(fields, messages="input", response_format="text.format")


def all_items(body: ResponsesRequest, store: ResponseStore) -> list[Item]:
    """The items of the conversation: those of earlier answers, then those of this request.

    Raises:
        ApiError: an earlier answer, or an item, is not known.
    """
    items: list[Item] = []
    if body.previous_response_id is not None:
        earlier = store.items_of(body.previous_response_id)
        if earlier is None:
            raise ApiError(
                400,
                f"Previous response with id '{body.previous_response_id}' not found: the server keeps the last ones only; send "
                "the whole conversation as input",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        items += earlier
    if isinstance(body.input, str):
        return [*items, {"type": "message", "role": "user", "content": body.input}]
    for item in body.input:
        if isinstance(item, ItemReference):
            known = store.item(item.id)
            if known is None:
                raise ApiError(
                    400, f"Item with id '{item.id}' not found: send the item itself", param="input", code="item_not_found"
                )
            items.append(known)
        else:
            items.append(item.model_dump(exclude_none=True))
    if not items:
        raise ApiError(400, "the input is empty: give a text or some items", param="input")
    return items


def _messages(items: Iterable[Item]) -> list[Item]:
    """Thinking, text and calls that follow each other are one message of the assistant."""
    messages: list[Item] = []
    open_message: Item | None = None  # of the assistant, while more may belong to it

    def assistant() -> Item:
        nonlocal open_message
        if open_message is None:
            open_message = {"role": "assistant", "content": None}
            messages.append(open_message)
        return open_message

    for raw in items:
        item = _ITEM.validate_python(raw)
        if isinstance(item, InputReasoning):
            text = "".join(part.text for part in item.content or item.summary or ())
            if text:
                assistant()["reasoning_content"] = assistant().get("reasoning_content", "") + text
        elif isinstance(item, InputCall):
            function = {"name": item.name, "arguments": item.arguments}
            assistant().setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
        elif isinstance(item, InputMessage) and item.role == "assistant":
            if open_message is not None and (open_message["content"] is not None or "tool_calls" in open_message):
                open_message = None
            assistant()["content"] = _content(item.content)
        elif isinstance(item, InputMessage):
            open_message = None
            messages.append({"role": item.role, "content": _content(item.content)})
        elif isinstance(item, InputResult):
            open_message = None
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)})
    return messages


def _content(content: str | Sequence[InputText]) -> str | list[Item]:
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": part.text if part.text is not None else part.refusal or ""} for part in content]


def _tools(body: ResponsesRequest) -> list[Item] | None:
    if body.tools is None:
        return None
    names = ("name", "description", "parameters", "strict")
    return [{"type": "function", "function": {name: getattr(tool, name) for name in names}} for tool in body.tools]


def _choice(body: ResponsesRequest) -> Any:
    choice = body.tool_choice
    if isinstance(choice, FlatChoice):
        return {"type": "function", "function": {"name": choice.name}}
    if isinstance(choice, FlatAllowed):
        tools = [{"type": "function", "function": {"name": tool.name}} for tool in choice.tools]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": tools}}
    return choice


def _format(body: ResponsesRequest) -> Item | None:
    form = body.text.format if body.text is not None else None
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": form.name or "schema", "schema": form.schema_}}

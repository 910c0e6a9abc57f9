"""Calls of tools in messages: the forms in which chat templates take them, and marks that show whether they come out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

Message = Mapping[str, Any]

_ID_LETTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ID_LENGTH = 9  # of the ids of calls that templates of Mistral insist on


def call_forms(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """A conversation with its calls as templates may want them: arguments as objects or as text, ids of nine letters, each call
    in a message of its own before its result."""
    yield list(messages)
    if any(message.get("tool_calls") or message.get("tool_call_id") for message in messages):
        short = [_with_short_ids(message) for message in messages]
        for conversation in (list(messages), short):
            yield [_with_text_arguments(message) for message in conversation]
            if conversation is not short:
                yield short
        if (apart := _calls_apart(messages)) != list(messages):
            yield apart


def short_id(name: str) -> str:
    """Nine letters and digits that stand for an id, always the same."""
    number = int.from_bytes(hashlib.sha256(name.encode("utf-8", "replace")).digest()[:16])
    letters = ""
    for _ in range(_ID_LENGTH):
        number, place = divmod(number, len(_ID_LETTERS))
        letters += _ID_LETTERS[place]
    return letters


def with_names(message: Message, names: Sequence[str]) -> Message:
    """The message with other names of its calls' functions."""
    calls = zip(message["tool_calls"], names, strict=True)
    changed = [{**call, "function": {**call["function"], "name": name}} for call, name in calls]
    return {**message, "tool_calls": changed}


def written_as_python(message: Message, prompt: str) -> bool:
    """Whether arguments of a message's calls stand in the prompt as Python writes objects, and not as JSON."""
    found = [call["function"]["arguments"] for call in message.get("tool_calls") or ()]
    return any(isinstance(arguments, Mapping) and arguments and str(arguments) in prompt for arguments in found)


def _with_text_arguments(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _calls_apart(messages: Sequence[Message]) -> list[Message]:
    """Text, then each call with its results, where one message has several of these; thinking stays in front."""
    found: list[Message] = []
    place = 0
    while place < len(messages):
        message, place = messages[place], place + 1
        calls = message.get("tool_calls")
        if not calls:
            found.append(message)
            continue
        results = list(takewhile(lambda each: each["role"] == "tool", messages[place:]))
        place += len(results)
        first: Message = {**message, "content": ""}
        others = {name: value for name, value in first.items() if name not in ("reasoning_content", "thinking")}
        if message["content"]:
            found.append({name: value for name, value in message.items() if name != "tool_calls"})
            first = others
        ids = [call.get("id") for call in calls]
        for number, call in enumerate(calls):
            found.append({**(others if number else first), "tool_calls": [call]})
            last = number == len(calls) - 1
            found += [
                each
                for each in results
                if each.get("tool_call_id") == ids[number] or (last and each.get("tool_call_id") not in ids)
            ]
    return found


def _with_short_ids(message: Message) -> Message:
    changed = dict(message)
    if message.get("tool_calls"):
        changed["tool_calls"] = [{**call, "id": short_id(str(call.get("id", "")))} for call in message["tool_calls"]]
    if message.get("tool_call_id"):
        changed["tool_call_id"] = short_id(str(message["tool_call_id"]))
    return changed

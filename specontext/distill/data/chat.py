"""Conversations as documents in which the assistant's parts are marked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from specontext.distill.data.documents import Document, marked
from specontext.distill.data.encoder import Encoder, check_unicode
from specontext.distill.data.source import DataError
from specontext.errors import ChatTemplateError
from specontext.models.chat_template import ChatTemplate

MARKS_GENERATION = re.compile(r"\{%-?\s*generation\b")


def conversation(messages: object, encoder: Encoder, where: str, *, tools: Any = None) -> Document:
    """Messages under the tokenizer's chat template; what the assistant has to say is marked.

    A template that marks generated parts itself is taken at its word. Else a part of the assistant is what its message
    adds to the conversation before it, the opening of the answer left out.

    Args:
        messages: mappings with `role` and what the template needs beside, such as `content`.
        where: names the row in errors.

    Raises:
        DataError: no chat template, messages that it refuses or leaves text of out, none of the assistant, or a part that
            cannot be found.
    """
    if not isinstance(messages, list) or not all(isinstance(one, Mapping) and "role" in one for one in messages):
        raise DataError(f"'messages' of {where} must be a list of objects with 'role' and 'content'")
    if not any(one["role"] == "assistant" for one in messages):
        raise DataError(f"{where} has no message of role 'assistant': nothing of it could be learned")
    if not encoder.tokenizer.chat_template:
        raise DataError(f"{where} has 'messages' and the tokenizer no chat template: give rows with 'prompt' and 'completion'")
    try:
        template = ChatTemplate(encoder.tokenizer)
        settled = template.settle([_with_content(one, where) for one in messages], tools=tools)
        ids, said = _encode(settled, encoder, where, tools)
    except DataError:
        raise
    except ChatTemplateError as error:
        raise DataError(f"the messages of {where} cannot be written out: {error}") from error
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise DataError(f"the tokenizer's chat template does not take the messages of {where}: {error}") from error
    if not any(said):
        raise DataError(f"the tokenizer's chat template marks nothing of the assistant's in {where}: nothing could be learned")
    return marked(ids, said, encoder.opening)


def _with_content(message: Mapping, where: str) -> Mapping:
    """The message with content of text, parts of text, or None, as chat templates take it."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    if not isinstance(content, str | list | None) or not all(
        isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in parts
    ):
        raise DataError(f"the message of role '{message['role']}' in {where} has content that is no text: leave the row out")
    for text in (content, *(part["text"] for part in parts)):
        if isinstance(text, str):
            check_unicode(text)
    return {**message, "content": content}


def _encode(messages: Sequence[Mapping], encoder: Encoder, where: str, tools: Any) -> tuple[list[int], list[bool]]:
    tokenizer = encoder.tokenizer
    if MARKS_GENERATION.search(tokenizer.get_chat_template()):
        out = tokenizer.apply_chat_template(messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
        return encoder.known(list(out["input_ids"])), [bool(mark) for mark in out["assistant_masks"]]

    def render(count: int, answer: bool = False) -> str:
        return tokenizer.apply_chat_template(messages[:count], tools=tools, tokenize=False, add_generation_prompt=answer)

    text = render(len(messages))
    spans: list[tuple[int, int]] = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            place = f"message {number + 1} of {where}"
            start = _shared(text, render(number, answer=True)) if number else 0
            through = render(number + 1)
            if number and start < len(render(number)):  # the template writes what was before otherwise as well
                spans.append(_find(text, spans[-1][1] if spans else 0, message, encoder, place, once=True))
            elif len(through) > start and text.startswith(through):
                spans.append((start, len(through)))
            else:
                spans.append(_find(text, start, message, encoder, place, once=False))
    return encoder.marked(text, spans)


def _shared(text: str, other: str) -> int:
    """Characters that two texts begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))


def _find(text: str, start: int, message: Mapping, encoder: Encoder, where: str, *, once: bool) -> tuple[int, int]:
    """The span of a message's content in `text` from `start` on, with an end of turn right after it.

    For templates that write the last turns otherwise than earlier ones (thoughts are left out, a system prompt wanders), so
    that the conversation up to a message is no beginning of the whole.

    Args:
        once: refuse content that stands there more than once.

    Raises:
        DataError: it cannot be told where the message stands.
    """
    content = message.get("content")
    core = content.rpartition("</think>")[2].strip() if isinstance(content, str) else ""
    found = text.find(core, start) if core else -1
    if found < 0 or (once and text.count(core, start) > 1):
        raise DataError(
            f"the tokenizer's chat template does not show where {where} stands: "
            "use a template with {% generation %} marks, or rows with 'input_ids' and 'wanted'"
        )
    end = found + len(core)
    endings = "|".join(map(re.escape, encoder.tokenizer.all_special_tokens))
    turn = re.compile(rf"\s*(?:{endings})").match(text, end) if endings else None
    return found, turn.end() if turn else end

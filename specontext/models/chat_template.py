"""From the messages of a conversation to a prompt, in the tokenizer's chat template: all their text, or an error that says what.

Templates leave out what they have no place for, without a word: roles they do not know, system messages that are not the first,
content that comes in another form than they expect. So each conversation is rendered twice: once with a mark in the text of every
message, which must all come out, and then as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from specontext.errors import ChatTemplateError
from specontext.models.tool_messages import Message, call_forms, with_names, written_as_python

_LONGEST_REASON = 400  # characters of a template's own error that are shown; some quote the conversation
_LONGEST_TAG = 64
_MARK = re.compile(r"zq[0-9]+(?:m[0-9]+qz|key)")


class ChatTemplate:
    """The chat template of a Hugging Face tokenizer.

    Content may be text, a list of parts `{"type": "text", "text": ...}` or None. It reaches the template as it is if the template
    takes that, else parts as one text, joined by line ends, or a text as a list of one part. The role `developer` becomes
    `system` where the template does not speak of developers, or does not take them, and several messages of the system in front
    of all others become one where the template takes no second one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt, which begins with the special tokens that the template writes.

        Args:
            messages: `role`, `content` and whatever else the template knows; `tool_calls` as OpenAI has them, with objects as
                arguments, which become texts where the template wants that, as ids become shorter.
            add_generation_prompt: end with what opens an answer of the assistant.
            continue_final_message: end with the last message, unfinished.
            variables: of the template; `tools` are functions as OpenAI has them.

        Raises:
            ChatTemplateError: the template raises an error, or leaves out the text of a message, a call or a tool.
        """
        options = {
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            "continue_final_message": continue_final_message,
            **variables,
        }
        return self._written(messages, options)[1]

    def settle(self, messages: Sequence[Message], **variables: Any) -> list[Message]:
        """The messages in the form in which the template writes all their text; errors as of `render`."""
        return list(self._written(messages, variables)[0])

    def _written(self, messages: Sequence[Message], options: Mapping[str, Any]) -> tuple[Sequence[Message], str]:
        """The messages in a form of which the template leaves nothing out, and what it makes of them."""
        errors: list[Exception] = []
        left_out: list[int] = []
        for candidate in self._candidates(messages):
            try:
                settled, missing = self._settle(candidate, options)
                if not missing:
                    return settled, self._apply(settled, options)
            except Exception as error:  # a template is a program, and may fail in any way
                errors.append(error)
            else:
                if len(candidate) == len(messages):  # else its numbers are not those of the messages
                    left_out = missing if not left_out or len(missing) < len(left_out) else left_out
        if left_out:
            if left_out[0] >= len(messages):
                raise ChatTemplateError(
                    "the chat template has no place for tools: leave them out, or use a chat template that writes them out",
                    tools=True,
                )
            number, role = left_out[0], messages[left_out[0]]["role"]
            raise ChatTemplateError(
                f"the chat template leaves out text of message {number}, whose role is '{role}': leave the message out, move its "
                "text into another one, or use a chat template that has a place for it",
                number,
            )
        if isinstance(errors[0], TemplateSyntaxError):
            raise ChatTemplateError(
                f"the chat template is broken, line {errors[0].lineno}: {errors[0].message}; mend it"
            ) from errors[0]
        template = self._tokenizer.chat_template
        if isinstance(template, dict) and "default" not in template:
            named = ", ".join(sorted(template))
            raise ChatTemplateError(
                f"the model has several chat templates ({named}) and none that is called default: save the one to use as "
                "chat_template.jinja beside its weights, or give it to the server (specontext serve --chat-template FILE)"
            ) from errors[0]
        # What a template raises itself explains more than what it stumbles over.
        worst = next((each for each in errors if type(each) is TemplateError), errors[0])
        reason = str(worst) or type(worst).__name__
        shown = reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]} ..."
        raise ChatTemplateError(f"the chat template refuses these messages: {shown}") from worst

    def _candidates(self, messages: Sequence[Message]) -> Iterator[list[Message]]:
        """The conversation in the forms that a template may take, the likeliest one first."""
        if self.speaks_of("message.thinking"):  # as gpt-oss calls it
            messages = [
                {**each, "thinking": each["reasoning_content"]} if "reasoning_content" in each else each for each in messages
            ]
        conversations = [list(messages)]
        if any(message["role"] == "developer" for message in messages):
            renamed = [{**message, "role": "system"} if message["role"] == "developer" else message for message in messages]
            conversations = [list(messages), renamed] if self.speaks_of("developer") else [renamed]
        if (joined := _systems_joined(conversations[-1])) is not None:
            conversations.append(joined)
        for conversation in (form for each in conversations for form in call_forms(each)):
            sent = [_as_sent(message) for message in conversation]
            yield sent
            for form in (_as_text, _as_parts):
                changed = [form(message) for message in conversation]
                if changed != sent:
                    yield changed

    def speaks_of(self, word: str) -> bool:
        """Whether a word stands in the template."""
        template = self._tokenizer.chat_template
        texts = template.values() if isinstance(template, dict) else [template]
        return any(word in str(text) for text in texts)

    def _settle(self, messages: Sequence[Message], options: Mapping[str, Any]) -> tuple[Sequence[Message], list[int]]:
        """The messages, those that are left out in another form if that helps, and the numbers of those that still are."""
        missing = self._missing(messages, options)
        if not missing:
            return messages, missing
        changed = list(messages)
        for number in missing:
            if number >= len(messages):
                continue
            other = _as_text if isinstance(messages[number]["content"], list) else _as_parts
            changed[number] = other(messages[number])
        try:
            return changed, self._missing(changed, options)
        except Exception:  # it was not the form
            return messages, missing

    def _missing(self, messages: Sequence[Message], options: Mapping[str, Any]) -> list[int]:
        """Numbers of the messages of which some text is left out, or whose list of parts is written out as such."""
        marked = [_marked(message, number) for number, message in enumerate(messages)]
        tools = [f"zq{len(messages) + number}m0qz" for number in range(len(options.get("tools") or ()))]
        named = {"tools": [_named(tool, name) for tool, name in zip(options["tools"], tools, strict=True)]} if tools else {}
        prompt = self._apply([each.message for each in marked], {**options, **named})
        found = set(_MARK.findall(prompt.lower()))  # some templates write in capitals
        missing = [
            number
            for number, each in enumerate(marked)
            if not found.issuperset(each.wanted) or each.unwanted in found or written_as_python(each.message, prompt)
        ]
        return missing + [len(messages) + number for number, name in enumerate(tools) if name not in found]

    def _apply(self, messages: Sequence[Message], options: Mapping[str, Any]) -> str:
        return str(self._tokenizer.apply_chat_template(list(messages), tokenize=False, **options))


class _Marked(NamedTuple):
    """A message with marks in its text, all of which must come out, and the name of a key of its parts, which must not."""

    message: Message
    wanted: Sequence[str]
    unwanted: str


def flaw(template: str) -> str | None:
    """What is wrong with a chat template whatever is put into it; None for nothing."""
    if not template.strip():
        return "it is empty"
    try:
        render_jinja_template(conversations=[[]], chat_template=template)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    except Exception:  # it wants messages
        return None
    return None


def _marked(message: Message, number: int) -> _Marked:
    wanted: list[str] = []
    key = f"zq{number}key"
    # An assistant's text may be thinking or begin with it, which many templates drop from all turns but the last.
    places_in = _before_last if message["role"] == "assistant" else _inside

    def mark(text: str) -> str:
        for place in reversed(places_in(text)):
            wanted.append(f"zq{number}m{len(wanted)}qz")
            text = text[:place] + wanted[-1] + text[place:]
        return text

    content = message["content"]
    marked: Any = (
        mark(content) if isinstance(content, str) else [{**part, "text": mark(part["text"]), key: 0} for part in content]
    )
    changed: Message = {**message, "content": marked}
    if calls := message.get("tool_calls"):
        names = [f"zq{number}m{len(wanted) + place}qz" for place in range(len(calls))]
        wanted += names
        changed = with_names(changed, names)
    return _Marked(changed, wanted, key)


def _named(tool: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return {**tool, "function": {**tool["function"], "name": name}}


def _inside(text: str) -> tuple[int, ...]:
    """Two places inside a text, behind its first character or tag and before its last one; none in a blank text.

    Templates look at how a text begins and ends, and often trim it.
    """
    begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
    if begin >= end:
        return ()
    first, last = begin + 1, end - 1
    if text[begin] == "<" and (close := text.find(">", begin, begin + _LONGEST_TAG)) >= 0:
        first = close + 1
    if text[last] == ">" and (start := text.rfind("<", max(begin, end - _LONGEST_TAG), end)) >= 0:
        last = start
    return (first, last) if first <= last else (first, first)


def _before_last(text: str) -> tuple[int, ...]:
    """The place before a text's last character, inside a tag if it ends with one; none in a blank text."""
    end = len(text.rstrip())
    return (end - 1,) if end else ()


def _text_of(message: Message) -> str:
    content = message["content"]
    return "\n".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def _systems_joined(messages: Sequence[Message]) -> list[Message] | None:
    """A conversation whose first messages of the system are one, as many templates want it; None for one that has no such two."""
    first = list(takewhile(lambda each: each["role"] == "system" and each.keys() == {"role", "content"}, messages))
    if len(first) < 2:
        return None
    text = "\n\n".join(filter(None, map(_text_of, first)))
    return [{**first[0], "content": text}, *messages[len(first) :]]


def _as_sent(message: Message) -> Message:
    """The message, with text for content that says nothing."""
    content = message["content"]
    says = content and (isinstance(content, str) or any(part["text"] for part in content))
    return message if says else {**message, "content": ""}


def _as_text(message: Message) -> Message:
    return {**message, "content": _text_of(message)}


def _as_parts(message: Message) -> Message:
    if isinstance(message["content"], list):
        return message
    return {**message, "content": [{"type": "text", "text": _text_of(message)}]}

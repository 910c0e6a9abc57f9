"""A model's tokenizer, as suites and the runner see it."""

from __future__ import annotations

from typing import Any

from specontext.errors import ChatTemplateError
from specontext.evaluation.suites.example import TextTools
from specontext.models.chat_template import ChatTemplate

_TEXT = "x7q"  # of a message, to see what a template writes around one


def text_tools(tokenizer: Any) -> TextTools:
    """The tools of a Hugging Face tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    template = ChatTemplate(tokenizer)

    def encode(text: str) -> list[int]:
        if backend is not None:  # many times as fast as the wrapper on short texts
            return list(backend.encode(text, add_special_tokens=False).ids)
        return list(tokenizer.encode(text, add_special_tokens=False))

    def chat(text: str) -> str:
        if not tokenizer.chat_template:
            return text
        return template.render([{"role": "user", "content": text}])

    def truncate_middle(text: str, most: int) -> str:
        ids = encode(text)
        if len(ids) <= most:
            return text
        start, end = most // 2, most - most // 2
        return "".join(tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:start], ids[-end:]))

    return TextTools(lambda text: len(encode(text)), chat, truncate_middle)


def _opening(tokenizer: Any) -> str:
    """What the chat template writes in front of a user's text; nothing where there is none, or it takes no such message."""
    if not tokenizer.chat_template:
        return ""
    try:
        written = ChatTemplate(tokenizer).render([{"role": "user", "content": _TEXT}])
    except ChatTemplateError:
        return ""
    before, found, _ = written.partition(_TEXT)
    return before if found else ""


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Tokens of an example's prompt: a chat template has put special tokens there already, plain text gets the tokenizer's.

    Templates that begin with no special token want none, as where they are served.
    """
    templated = prompt.startswith(_opening(tokenizer) or tuple(tokenizer.all_special_tokens))
    return list(tokenizer(prompt, add_special_tokens=not templated)["input_ids"])

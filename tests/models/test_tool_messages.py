"""Tools, calls and their results in chat templates: written out in the form that each template wants, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from specontext.errors import ChatTemplateError
from specontext.models.chat_template import ChatTemplate
from specontext.server.settings import BUILT_IN_TEMPLATES

TOOLS = [{"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}}}]
CALL = {"id": "call_0123456789", "type": "function", "function": {"name": "look", "arguments": {"left": True}}}
TALK: list[Any] = [
    {"role": "user", "content": "look!"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "a tree", "tool_call_id": "call_0123456789"},
]
LOOP = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
END = "{% endfor %}"


def rendered(tokenizer: Any, template: str, messages: Any = TALK, **options: Any) -> str:
    tokenizer.chat_template = template
    try:
        return ChatTemplate(tokenizer).render(messages, **{"tools": TOOLS} | options)
    finally:
        tokenizer.chat_template = None


@pytest.fixture
def own(tokenizer: Any) -> Any:
    before = tokenizer.chat_template
    yield tokenizer
    tokenizer.chat_template = before


def test_the_template_for_chatml(own: Any) -> None:
    text = rendered(own, BUILT_IN_TEMPLATES["hermes"].read_text())
    assert '<tool_call>\n{"name": "look", "arguments": {"left": true}}\n</tool_call>' in text
    assert "<tool_response>\na tree\n</tool_response>" in text and '"description": "Look."' in text
    assert text.endswith("<|im_start|>assistant\n")
    plain = rendered(own, BUILT_IN_TEMPLATES["hermes"].read_text(), TALK[:1], tools=None)
    assert plain == "<|im_start|>user\nlook!<|im_end|>\n<|im_start|>assistant\n"
    system = [{"role": "system", "content": "be kind"}, *TALK]
    assert rendered(own, BUILT_IN_TEMPLATES["hermes"].read_text(), system).startswith("<|im_start|>system\nbe kind\n\n# Tools")


def test_arguments_are_objects_or_texts_as_the_template_wants(own: Any) -> None:
    objects = LOOP + "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}" + END
    assert 'look{"left": true}' in rendered(own, objects)
    plain = LOOP + "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments }}{% endfor %}" + END
    assert 'look{"left": true}' in rendered(own, plain), "and not as Python writes it"
    texts = LOOP + "{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}" + END
    assert 'look{"left": true}' in rendered(own, texts)


def test_ids_are_shortened_where_the_template_insists(own: Any) -> None:
    strict = (
        LOOP + "{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}{{ raise_exception('nine letters!') }}{% endif %}"
        "{{ c.function.name }}#{{ c.id }}{% endfor %}{% if m.tool_call_id %}@{{ m.tool_call_id }}{% endif %}" + END
    )
    text = rendered(own, strict)
    given = text.split("#")[1][:9]
    assert given.isalnum() and f"@{given}" in text and text == rendered(own, strict)


@pytest.mark.parametrize(
    ("template", "words", "tools"),
    [
        (
            "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}" + END,
            "tools",
            True,
        ),
        (LOOP + END, "message 1", False),
        ("{{ raise_exception('no tools, please') }}", "no tools, please", False),
    ],
)
def test_what_would_be_dropped_is_refused(own: Any, template: str, words: str, tools: bool) -> None:
    with pytest.raises(ChatTemplateError, match=words) as refused:
        rendered(own, template)
    assert refused.value.tools is tools


def test_calls_in_channels_come_one_by_one_with_their_results_and_thinking(own: Any) -> None:
    template = (Path(__file__).parents[1] / "server" / "harmony.jinja").read_text()
    other = {"id": "b", "type": "function", "function": {"name": "look", "arguments": {"left": False}}}
    talk = [
        {"role": "user", "content": "look!"},
        {"role": "assistant", "content": "Well.", "reasoning_content": "Hm.", "tool_calls": [CALL, other]},
        {"role": "tool", "content": "a bush", "tool_call_id": "b"},
        {"role": "tool", "content": "a tree", "tool_call_id": "call_0123456789"},
        {"role": "assistant", "content": None, "reasoning_content": "Once more.", "tool_calls": [CALL]},
        {"role": "tool", "content": "a wall", "tool_call_id": "call_0123456789"},
    ]
    text = rendered(own, template, talk)
    wanted = ("Well.", "true", "a tree", "false", "a bush", "Once more.", "true", "a wall", "<|start|>assistant")
    places = [0]
    for word in wanted:
        places.append(text.find(word, places[-1]))
    assert -1 not in places and places == sorted(places)

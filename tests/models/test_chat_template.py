"""Whatever a chat template does with messages, their text is in the prompt, or an error names the message."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import specontext.models
from specontext.errors import ChatTemplateError
from specontext.models.chat_template import ChatTemplate

NANO: Any = AutoTokenizer.from_pretrained(Path(specontext.models.__file__).parent / "nano")

EACH = "{{% for m in messages %}}[{{{{ m.role }}}}]{}{{% endfor %}}{{% if add_generation_prompt %}}>{{% endif %}}"
STRINGS = EACH.format("{{ m.content }}")
TRIMMED = EACH.format("{{ m.content | trim }}")
ADDED = EACH.format("{{ m.content + ';' }}")  # lists are a TypeError
METHODS = EACH.format("{{ m.content.strip() }}")
JSON = EACH.format("{{ m.content | tojson }}")
CAPITALS = EACH.format("{{ m.content | upper }}")
PARTS = EACH.format("{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}")
ADDED_PARTS = EACH.format("{% for p in m['content'] %}{{ p['text'] + ';' }}{% endfor %}")  # characters are an error
FIRST_PART = EACH.format("{{ m.content[0].text }}")
BOTH = EACH.format(
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
)
SYSTEM_STRING = EACH.format(
    "{% if m.role == 'system' %}{{ m.content | trim }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
)
SHOWN = "[{{ m.role }}]{{ m.content }}"
KNOWN = "{% for m in messages if m.role in ['system', 'user', 'assistant'] %}" + SHOWN + "{% endfor %}"
DEVELOPERS = KNOWN.replace("'system'", "'developer'")
FIRST_SYSTEM = (
    "{% if messages[0].role == 'system' %}[system]{{ messages[0].content }}{% endif %}"
    "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)
LAST_ONLY = "[{{ messages[-1].role }}]{{ messages[-1].content }}"
CUT = EACH.format("{{ m.content[:40] }}")
THINKERS = (  # as Qwen3's, DeepSeek's and others': earlier thinking goes
    EACH.format("{{ m.content.split('</think>')[-1].lstrip() if m.role == 'assistant' else m.content }}"),
    EACH.format("{{ (m.content.split('</think>') | last) if '</think>' in m.content else m.content }}"),
)


def render(template: str, *messages: tuple[str, Any], **options: Any) -> str:
    tokenizer = copy.copy(NANO)
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer).render([{"role": role, "content": content} for role, content in messages], **options)


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (STRINGS, "[user]apple\npear>"),
        (TRIMMED, "[user]apple\npear>"),
        (ADDED, "[user]apple\npear;>"),
        (METHODS, "[user]apple\npear>"),
        (JSON, '[user]"apple\\npear">'),
        (CAPITALS, "[user]APPLE\nPEAR>"),
        (PARTS, "[user]applepear>"),
        (ADDED_PARTS, "[user]apple;pear;>"),
        (FIRST_PART, "[user]apple\npear>"),
        (BOTH, "[user]applepear>"),
        (SYSTEM_STRING, "[user]applepear>"),
    ],
)
def test_templates_get_the_form_that_they_take(template: str, expected: str) -> None:
    assert render(template, ("user", parts("apple", "pear"))) == expected
    one = expected.replace("\\n", "").replace("\n", "").replace("pear", "").replace("PEAR", "").replace(";;", ";")
    assert render(template, ("user", "apple")) == render(template, ("user", parts("apple"))) == one
    talk = (("system", "sun"), ("user", parts("apple")), ("assistant", "moon"), ("user", "pear"))
    prompt = render(template, *talk).lower()
    places = [prompt.find(word) for word in ("sun", "apple", "moon", "pear")]
    assert places == sorted(places) and places[0] > 0 and "type" not in prompt


def test_developers_are_systems_where_nobody_knows_them() -> None:
    assert render(KNOWN, ("user", "apple"), ("developer", "pear")) == "[user]apple[system]pear"
    assert render(STRINGS, ("developer", "pear")) == "[system]pear>"  # any role would do, but models know none of that name
    assert render(DEVELOPERS, ("developer", "pear")) == "[developer]pear"
    assert render(PARTS, ("developer", "pear"), ("user", parts("apple"))) == "[system]pear[user]apple>"
    neither = "{# no developer #}" + FIRST_SYSTEM.replace("messages if m.role != 'system'", "messages if m.role == 'user'")
    assert render(neither, ("developer", "pear"), ("user", "apple")) == "[system]pear[user]apple"


def test_messages_of_the_system_are_one_where_no_second_one_is_taken() -> None:
    said = (("system", "apple"), ("developer", parts("pear")), ("system", ""), ("user", "a"))
    strict = "{% for m in messages[1:] if m.role == 'system' %}{{ raise_exception('only one') }}{% endfor %}"
    for template in (FIRST_SYSTEM, strict + FIRST_SYSTEM):
        assert render(template, *said) == "[system]apple\n\npear[user]a"
    assert render(KNOWN, *said[:2], said[3]) == "[system]apple[system]pear[user]a"


@pytest.mark.parametrize(
    ("template", "messages", "number", "role"),
    [
        (KNOWN, (("user", "apple"), ("tool", "pear")), 1, "tool"),
        (KNOWN, (("user", "pear"), ("tool", "pear")), 1, "tool"),
        (KNOWN, (("user", "tool"), ("tool", "user")), 1, "tool"),
        (KNOWN, (("user", "apple"), ("tool", parts("a", "b"))), 1, "tool"),
        (FIRST_SYSTEM, (("user", "apple"), ("system", "pear")), 1, "system"),
        (FIRST_SYSTEM, (("system", "apple"), ("user", "a"), ("system", "pear")), 2, "system"),
        (FIRST_SYSTEM, (("user", "apple"), ("developer", "pear")), 1, "developer"),
        (LAST_ONLY, (("user", "apple"), ("assistant", "a"), ("user", "pear")), 0, "user"),
        (CUT, (("user", "apple"), ("user", "0123456789" * 5)), 1, "user"),
        (PARTS.replace("p.text", "'[text]'"), (("user", "apple"),), 0, "user"),
    ],
)
def test_what_is_left_out_is_refused_by_name(template: str, messages: Any, number: int, role: str) -> None:
    with pytest.raises(ChatTemplateError, match=f"message {number}, whose role is '{role}'") as refused:
        render(template, *messages)
    assert refused.value.message == number


@pytest.mark.parametrize("form", [str, parts])
def test_a_template_s_own_errors_are_shown(form: Any) -> None:
    with pytest.raises(ChatTemplateError, match="roles must alternate") as refused:
        render(ALTERNATING, ("user", form("a")), ("user", form("b")))
    assert refused.value.message is None
    for broken in (
        "{{ 1 // 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% if %}",
        "{{ messages[5].content.x.y }}",
    ):
        with pytest.raises(ChatTemplateError, match=r"refuses|is broken"):
            render(broken, ("user", "a"))
    with pytest.raises(ChatTemplateError) as long:
        render("{{ raise_exception('x' * 100000) }}", ("user", "a"))
    assert len(str(long.value)) < 1000


@pytest.mark.parametrize("template", THINKERS)
def test_earlier_thinking_may_go(template: str) -> None:
    talk = [("user", "a"), ("assistant", "<think>hm</think>5"), ("assistant", "<think>only</think>"), ("user", "b")]
    assert render(template, *talk) == "[user]a[assistant]5[assistant][user]b>"


TEXTS = ["", " ", "\n\n", "5", " 5 ", "<b>", "</think>", "<x><y>", "zq0m0", "{{ x }}", "é中🍎", "'\"\\", "[INST]"]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_of_all_kinds(text: str) -> None:
    for template in (STRINGS, TRIMMED, PARTS, BOTH, KNOWN):
        for content in (text, parts(text), parts(text, "and"), parts("and", text)):
            prompt = render(template, ("user", content), ("assistant", text))
            assert text.strip() in prompt and "[user]" in prompt and "'type'" not in prompt


def test_nothing_said() -> None:
    for content in ("", None, [], parts("")):
        assert render(STRINGS, ("user", "a"), ("assistant", content)) == "[user]a[assistant]>"
        assert render(PARTS, ("user", parts("a")), ("assistant", content)) == "[user]a[assistant]>"


def test_endings() -> None:
    for template in (STRINGS, PARTS):
        talk = (("user", "a"), ("assistant", "the answer "))
        assert render(template, *talk) == "[user]a[assistant]the answer >"
        assert render(template, *talk, add_generation_prompt=False) == "[user]a[assistant]the answer "
        assert render(template, *talk, continue_final_message=True) == "[user]a[assistant]the answer "
    assert render("{{ x }}" + STRINGS, ("user", "a"), x=5) == "5[user]a>"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages }}\n{% if %}", "is broken, line 2"),
        ({"rag": STRINGS, "tool_use": STRINGS}, r"several chat templates \(rag, tool_use\) and none that is called default"),
    ],
)
def test_a_template_that_takes_no_messages_at_all_is_blamed_itself(template: Any, said: str) -> None:
    tokenizer = copy.copy(NANO)
    tokenizer.chat_template = template
    with pytest.raises(ChatTemplateError, match=said):
        ChatTemplate(tokenizer).render([{"role": "user", "content": "apple"}])

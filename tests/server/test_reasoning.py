"""Thinking and answer are told apart, in the same way however the text is cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specontext.core import Thinking
from specontext.engine.thinking import ThinkingReader
from specontext.server.reasoning import starts_inside
from tests.server.serving import make_engine, running
from tests.server.test_chat import MESSAGES, PATH
from tests.server.test_completions import events


def split(text: str, *, inside: bool, cuts: tuple[int, ...] = ()) -> tuple[str, str]:
    reader, places = ThinkingReader(Thinking(inside)), sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    answer = "".join(reader.feed(text[a:b]) for a, b in itertools.pairwise(places)) + reader.feed("", last=True)
    return reader.text, answer


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "content"),
    [
        ("<think>\nhm, 5\n</think>\n\nfive", False, "hm, 5", "five"),
        ("\n<think>hm</think>five", False, "hm", "five"),
        ("hm\n</think>\nfive", True, "hm", "five"),
        ("<think>hm</think>five", True, "hm", "five"),
        ("five", False, "", "five"),
        (" five <think>not</think>", False, "", " five <think>not</think>"),
        ("hm", True, "hm", ""),
        ("<think>hm </thi", False, "hm </thi", ""),
        ("<thin", False, "", "<thin"),
        ("", False, "", ""),
        ("<think>a < b </x></think></think>c", False, "a < b </x>", "</think>c"),
        ("<think></think>a", False, "", "a"),
    ],
)
def test_examples(text: str, inside: bool, reasoning: str, content: str) -> None:
    assert split(text, inside=inside) == (reasoning, content)
    assert split(text, inside=inside, cuts=tuple(range(len(text)))) == (reasoning, content)


WORDS = st.lists(st.sampled_from(["<think>", "</think>", "<", "</th", "a", " ", "\n", "think>", "b c"]), max_size=12)


@given(WORDS.map("".join), st.booleans(), st.lists(st.integers(0, 200), max_size=30))
def test_cuts_change_nothing(text: str, inside: bool, cuts: list[int]) -> None:
    assert split(text, inside=inside, cuts=tuple(cuts)) == split(text, inside=inside)


def test_where_an_output_begins() -> None:
    assert starts_inside("deepseek_r1", "<assistant>") and not starts_inside("qwen3", "<assistant>")
    assert starts_inside("qwen3", "<assistant><think>\n") and starts_inside("deepseek_r1", "<assistant><think>\n")
    assert starts_inside("deepseek_r1", "say </think><assistant>") and not starts_inside("qwen3", "say <think><assistant>")
    assert starts_inside("qwen3", "<assistant><think>\nI think", continued="<think>\nI think")
    assert starts_inside("qwen3", "<assistant><think>\nI think", continued="I think")  # the template has opened it
    assert starts_inside("deepseek_r1", "<assistant>I think", continued="I think")
    assert not starts_inside("qwen3", "say <think><assistant>I think", continued="I think")
    assert not starts_inside("deepseek_r1", "<assistant><think>I think</think> It", continued="<think>I think</think> It")
    assert not starts_inside("deepseek_r1", "<assistant><think>\n\n</think>\n\nIt", continued="It")
    assert starts_inside("qwen3", "<assistant><think>\n" + "long " * 100, continued="<think>\n" + "long " * 100)
    assert not starts_inside("qwen3", "<think>\n\n</think>\n\n") and not starts_inside("deepseek_r1", "<think>\n\n</think>\n\n")


def test_thinking_in_answers() -> None:
    with running(make_engine(), reasoning_parser="deepseek_r1") as server:
        body = {"messages": MESSAGES, "temperature": 0}
        message = server.post(PATH, body).json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("apple = 417.", "")
        deltas = [choice["delta"] for chunk in events(server, PATH, body) for choice in chunk["choices"]]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "apple = 417."
        assert not any(delta.get("content") for delta in deltas)

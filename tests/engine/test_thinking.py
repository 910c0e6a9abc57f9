"""Thinking and answer are told apart, in the same way however the text is cut, and whatever the marks are to the tokenizer."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import specontext.models
from specontext.engine.detokenizer import Detokenizer
from specontext.engine.thinking import ThinkingReader
from specontext.sampling_params import SamplingParams, Thinking


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


def tokenizer_with_marks(special: bool | None) -> Any:
    """nano's, in which the marks are special tokens, plain added tokens, or (None) several tokens each."""
    tokenizer: Any = AutoTokenizer.from_pretrained(Path(specontext.models.__file__).parent / "nano")
    if special is not None:
        tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    return tokenizer


TOKENIZERS = {special: tokenizer_with_marks(special) for special in (True, False, None)}


def read(special: bool | None, text: str | Sequence[int], inside: bool = False, **options: Any) -> tuple[str, str, int, bool]:
    """Thinking, answer, tokens of the thinking, and whether a stop string was met; the same whole and token by token."""
    tokenizer = TOKENIZERS[special]
    begin, end = (None, None) if special is None else tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    params = SamplingParams(thinking=Thinking(inside, begin_id=begin, end_id=end), **options)
    ids = tokenizer.encode(text, add_special_tokens=False) if isinstance(text, str) else list(text)
    results = []
    for size in (1, len(ids) or 1):
        detokenizer = Detokenizer(tokenizer, params, [5])
        assert detokenizer.thinking is not None
        shown = [("", "")]
        for begin_at in range(0, len(ids), size):
            stopped = detokenizer.append(ids[begin_at : begin_at + size])
            shown.append((detokenizer.thinking.text, detokenizer.text))
            if stopped:
                break
        answer = detokenizer.finish()
        shown.append((detokenizer.thinking.text, answer))
        for (thought, said), (more_thought, more_said) in itertools.pairwise(shown):
            assert more_thought.startswith(thought) and more_said.startswith(said)  # nothing is taken back
        results.append((detokenizer.thinking.text, answer, detokenizer.stop is not None))
    assert results[0] == results[1]
    return results[0][0], results[0][1], detokenizer.thinking.tokens, results[0][2]


@pytest.mark.parametrize("inside", [True, False])
def test_blanks_cost_no_more_than_their_length(inside: bool) -> None:
    reader, began = ThinkingReader(Thinking(inside)), time.process_time()
    blanks = " \n" * 40_000
    assert not any(reader.feed(blank) for blank in ("Hm." if inside else "") + blanks)
    assert reader.feed("." if inside else "So.", last=True) == ("" if inside else blanks + "So.")
    assert reader.text == (f"Hm.{blanks}." if inside else "")
    assert time.process_time() - began < 3


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("special", [True, False, None])
def test_the_marks_are_found_whatever_they_are_to_the_tokenizer(special: bool | None, skip: bool) -> None:
    text = "<think>\nthe sun é\n</think>\n\nthe moon 中"
    thought, answer, tokens, _ = read(special, text, skip_special_tokens=skip)
    assert (thought, answer) == ("the sun é", "the moon 中")
    marked = TOKENIZERS[special].encode("<think>\nthe sun é\n</think>", add_special_tokens=False)
    assert tokens in (len(marked), len(marked) + 1)  # a mark's last character may share its token with what follows
    assert read(special, "a</think>b", inside=True, skip_special_tokens=skip)[:2] == ("a", "b")
    assert read(special, "the sun", skip_special_tokens=skip) == ("", "the sun", 0, False)
    thought, answer, tokens, _ = read(special, "<think>the sun", skip_special_tokens=skip)
    assert (thought, answer) == ("the sun", "") and tokens  # max_tokens came first


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("special", [True, False, None])
def test_stop_strings_end_the_answer_not_the_thinking(special: bool | None, include: bool) -> None:
    options: dict[str, Any] = {"include_stop_str_in_output": include}
    text = "<think>one STOP two</think>three STOP four"
    assert read(special, text, stop=["STOP"], **options)[:2] == ("one STOP two", "three STOP" if include else "three ")
    assert read(special, "one STOP two</think>x", inside=True, stop="STOP", **options)[:2] == ("one STOP two", "x")
    assert read(special, "one STOP two", stop="STOP", **options)[1:] == ("one STOP" if include else "one ", 0, True)
    # Neither do the marks belong to the answer, nor can a stop string begin in the thinking and end in the answer.
    assert read(special, "<think>ab</think>cd", stop=["</think>", "think", "bc", "ab"], **options)[::3] == ("ab", False)


def test_a_mark_that_is_one_token_is_met_by_its_token_alone() -> None:
    tokenizer = TOKENIZERS[True]
    begin, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    spelt = [token for piece in ("</", "think", ">") for token in tokenizer.encode(piece, add_special_tokens=False)]
    words = tokenizer.encode("a", add_special_tokens=False)
    assert read(True, [begin, *words, *spelt, *words, end, *words])[:2] == ("a</think>a", "a")
    assert read(True, [*words, begin, *words, end, *words])[:2] == ("", "aaa")  # amid an answer it is a special token as any
    assert read(False, [*words, begin, *words, end, *words])[:2] == ("", "a<think>a</think>a")
    assert read(True, [begin, end, *words])[:2] == ("", "a") == read(True, [begin, begin, end, *words])[:2]


def test_half_a_character_before_a_mark_is_shown_as_such() -> None:
    tokenizer = TOKENIZERS[True]
    begin, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    half = tokenizer.encode("中", add_special_tokens=False)[:1]
    assert read(True, [begin, *half, end, *half])[:2] == ("\ufffd", "\ufffd")

"""Text while tokens arrive: equal to the full decode, never taken back, cut at stop strings."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import specontext.models
from specontext.engine.detokenizer import Detokenizer
from specontext.engine.stop_strings import StopStrings
from specontext.sampling_params import SamplingParams

NANO: Any = AutoTokenizer.from_pretrained(Path(specontext.models.__file__).parent / "nano")
PROMPT = NANO.encode("Find the word. Answer:")
WORDS = st.text(st.sampled_from("ab .né中文🍎👩🏽‍💻\ufffd") | st.characters(), max_size=40)
QUICK = settings(max_examples=60, deadline=None, derandomize=True)


def sentencepiece() -> Any:
    """A tokenizer whose decoder drops the first space and knows bytes as tokens, like Llama 2's."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Hello", "▁world", "wor", "ld", "!"]
    core = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


LLAMA = sentencepiece()


def pieces(*names: str | bytes) -> list[int]:
    ids: list[int] = []
    for name in names:
        ids += [byte + 3 for byte in name] if isinstance(name, bytes) else [LLAMA.convert_tokens_to_ids(name)]
    return ids


def encode(text: str) -> list[int]:
    ids: list[int] = NANO.encode(text, add_special_tokens=False)
    return ids


def stream(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    """What is shown after every token, and at last the final text."""
    shown = []
    for token in ids:
        stopped = detokenizer.append([token])
        shown.append(detokenizer.text)
        if stopped:
            break
    return [*shown, detokenizer.finish()]


def check_stream(shown: Sequence[str]) -> None:
    assert all(shown[-1].startswith(text) for text in shown)
    assert all(len(a) <= len(b) for a, b in pairwise(shown))


def test_the_space_of_the_first_token_is_kept() -> None:
    detokenizer = Detokenizer(NANO, SamplingParams(), PROMPT)
    assert not detokenizer.append(encode(" apple"))
    assert detokenizer.text == detokenizer.finish() == " apple"


@pytest.mark.parametrize("text", ["🍎", "中文", "a👩🏽‍💻b", "naïve é", "\u00a0\u3000", "end\ufffd", "🍎" * 30])
def test_characters_appear_when_their_last_byte_does(text: str) -> None:
    ids = encode(text)
    shown = stream(Detokenizer(NANO, SamplingParams(), PROMPT), ids)
    assert shown[-1] == text
    check_stream(shown)
    assert not any(part.endswith("\ufffd") for part in shown[:-1])
    for end, part in enumerate(shown[:-1], start=1):
        whole = NANO.decode(ids[:end])
        if not whole.endswith("\ufffd"):
            assert part == whole


@QUICK
@given(text=WORDS, chunk=st.integers(1, 5))
def test_any_text_equals_its_full_decode(text: str, chunk: int) -> None:
    ids = encode(text)
    detokenizer = Detokenizer(NANO, SamplingParams(), PROMPT)
    shown = []
    for start in range(0, len(ids), chunk):
        assert not detokenizer.append(ids[start : start + chunk])
        shown.append(detokenizer.text)
    assert detokenizer.finish() == NANO.decode(ids) == text
    check_stream([*shown, detokenizer.text])


@QUICK
@given(
    ids=st.lists(st.one_of(st.integers(0, len(NANO) + 5), st.sampled_from([*encode("🍎中é"), 0, 1, 2])), max_size=60),
    prompt=st.lists(st.sampled_from([*encode("a🍎 b"), 0, 3]), min_size=1, max_size=8),
    skip=st.booleans(),
)
def test_any_tokens_equal_their_full_decode(ids: list[int], prompt: list[int], skip: bool) -> None:
    shown = stream(Detokenizer(NANO, SamplingParams(skip_special_tokens=skip), prompt), ids)
    assert shown[-1] == NANO.decode(ids, skip_special_tokens=skip)
    check_stream(shown)


def test_invalid_bytes_without_end_do_not_pile_up() -> None:
    lead, tail = encode("中")[:2]
    unknown = len(NANO)
    for ids in ([tail] * 200, [lead] * 200, [lead, tail] * 100, [*[tail] * 7, lead, unknown, 1, *encode("中")[1:], tail]):
        detokenizer = Detokenizer(NANO, SamplingParams(), PROMPT)
        for token in ids:
            detokenizer.append([token])
            assert len(detokenizer._pending) <= 10
        assert detokenizer.finish() == NANO.decode(ids, skip_special_tokens=True)


def test_special_tokens_are_skipped_or_shown() -> None:
    ids = [*encode("a"), 1, *encode("🍎")[:2], 3, *encode("🍎")[2:], 1]
    assert stream(Detokenizer(NANO, SamplingParams(), PROMPT), ids)[-1] == "a🍎"
    kept = stream(Detokenizer(NANO, SamplingParams(skip_special_tokens=False), PROMPT), ids)
    assert kept[-1] == NANO.decode(ids) and kept[1] == "a<|end|>"


def test_a_prompt_that_ends_inside_a_character_adds_nothing() -> None:
    apple = encode("🍎")
    shown = stream(Detokenizer(NANO, SamplingParams(), [*PROMPT, *apple[:2]]), [*apple[2:], *encode(" b")])
    assert shown[-1] == NANO.decode([*apple[2:], *encode(" b")])


@pytest.mark.parametrize(
    "prompt", [("▁Hello",), ("<s>", "▁Hello"), ("▁",), ("▁Hello", "中文🍎".encode()), ("▁Hello", b"\xe4\xb8")]
)
def test_sentencepiece_keeps_spaces(prompt: tuple[str | bytes, ...]) -> None:
    ids = pieces("▁world", "!", "▁", "▁Hello", "</s>", "▁world", "🍎".encode(), "中".encode(), "▁Hello")
    shown = stream(Detokenizer(LLAMA, SamplingParams(), pieces(*prompt)), ids)
    assert shown[-1] == " world!  Hello world🍎中 Hello"
    assert shown[:4] == [" world", " world!", " world! ", " world!  Hello"]
    check_stream(shown)
    assert not any(part.endswith("\ufffd") for part in shown)


def test_sentencepiece_without_text_before_it_equals_decode() -> None:
    for ids in (pieces("▁Hello", "▁world"), pieces("▁", "▁Hello"), pieces("</s>", "▁Hello", "中".encode(), "ld")):
        shown = stream(Detokenizer(LLAMA, SamplingParams(), pieces("<s>")), ids)
        assert shown[-1] == LLAMA.decode(ids, skip_special_tokens=True)


def test_sentencepiece_shows_invalid_bytes_without_losing_text() -> None:
    shown = stream(
        Detokenizer(LLAMA, SamplingParams(), pieces("▁Hello")), pieces("中".encode(), b"\xe4", "▁world", b"\xff" * 40, "!")
    )
    assert shown[-1].startswith("中\ufffd world") and shown[-1].endswith("\ufffd!")
    check_stream(shown)


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_is_found_across_tokens(include: bool) -> None:
    ids = encode("One two. STOP three")
    params = SamplingParams(stop=[". STOP"], include_stop_str_in_output=include)
    detokenizer = Detokenizer(NANO, params, PROMPT)
    shown = stream(detokenizer, ids)
    assert shown[-1] == ("One two. STOP" if include else "One two")
    assert detokenizer.stop == ". STOP"
    check_stream(shown)
    assert detokenizer.append(encode("more")) and detokenizer.text == detokenizer.finish() == shown[-1]


def test_the_beginning_of_a_stop_string_is_held_back_until_decided() -> None:
    detokenizer = Detokenizer(NANO, SamplingParams(stop="\n\nQ:"), PROMPT)
    expected = [
        ("yes", "yes"),
        ("\n", "yes"),
        ("\n", "yes"),
        ("\n", "yes\n"),
        ("Q", "yes\n"),
        ("A", "yes\n\n\nQA"),
        ("\n", "yes\n\n\nQA"),
    ]
    for text, shown in expected:
        assert not detokenizer.append(encode(text))
        assert detokenizer.text == shown
    assert detokenizer.finish() == detokenizer.text == "yes\n\n\nQA\n"
    assert detokenizer.stop is None


def test_nothing_is_held_back_for_a_stop_string_that_would_be_shown() -> None:
    detokenizer = Detokenizer(NANO, SamplingParams(stop="\n\n", include_stop_str_in_output=True), PROMPT)
    assert not detokenizer.append(encode("a\n"))
    assert detokenizer.text == "a\n"


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (["c", "b"], "abc", "a"),
        (["xyz", "bc"], "abcxyz", "a"),
        (["bc", "abcd"], "1abcd", "1a"),  # "bc" is complete first
        (["bc", "abc"], "1abc", "1"),  # complete together
        (["🍎"], "a🍎b", "a"),
        (["文"], "中文字", "中"),
        (["aab"], "aaab", "a"),
        (["a"], "a", ""),
    ],
)
def test_the_earliest_occurrence_wins_however_tokens_are_cut(stops: list[str], text: str, expected: str) -> None:
    letters = [token for letter in text for token in encode(letter)]
    for ids in (encode(text), letters):
        for chunk in (1, 2, len(ids)):
            detokenizer = Detokenizer(NANO, SamplingParams(stop=stops), PROMPT)
            assert any([detokenizer.append(ids[start : start + chunk]) for start in range(0, len(ids), chunk)])
            assert detokenizer.text == detokenizer.finish() == expected


def naive_cut(text: str, stops: Sequence[str], include: bool) -> str:
    for end in range(1, len(text) + 1):
        for begin in range(end):
            if text[begin:end] in stops:
                return text[: end if include else begin]
    return text


@QUICK
@given(
    text=st.text("ab🍎 ", max_size=30),
    stops=st.lists(st.text("ab🍎 ", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_stopping_equals_reading_character_by_character(text: str, stops: list[str], include: bool) -> None:
    detokenizer = Detokenizer(NANO, SamplingParams(stop=stops, include_stop_str_in_output=include), PROMPT)
    shown = stream(detokenizer, encode(text))
    assert shown[-1] == naive_cut(text, stops, include)
    assert (detokenizer.stop is not None) == any(stop in text for stop in stops)
    check_stream(shown)
    if not include:
        assert not any(stop in part for part in shown for stop in stops)


class Counted(str):
    """A text that counts how often a character of it is looked at."""

    looks = 0

    def __getitem__(self, index: Any) -> str:
        Counted.looks += 1
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("#" * 100_000, "apple = 417.\n"),
        ("#" * 100_000, "#"),
        ("ab" * 50_000, "ab"),
        ("a" * 50_000 + "b", "a" * 10 + "c"),
        ("a" * 9 + "b" + "a" * 90_000, "a" * 9 + "b" + "a" * 8 + "c"),
    ],
    ids=["never", "always", "periodic", "nearly", "often"],
)
def test_matching_looks_at_a_stop_string_a_few_times_for_each_character(stop: str, text: str) -> None:
    """However long it is, and however much of it has been met."""
    read, Counted.looks = StopStrings([Counted(stop)]).read, 0
    pieces = [text[start : start + 3] for start in range(0, len(text), 3)] * (6000 // len(text))
    assert not any(map(read, pieces))
    assert Counted.looks <= 8 * sum(map(len, pieces))


@QUICK
@given(
    text=st.text("ab", max_size=60),
    stops=st.lists(st.text("ab", min_size=1, max_size=12), min_size=1, max_size=4),
    cuts=st.lists(st.integers(1, 9), min_size=1),
)
def test_what_is_found_and_begun_is_what_the_text_says(text: str, stops: list[str], cuts: list[int]) -> None:
    """After an occurrence that does not count as well."""
    strings, read, number = StopStrings(stops), "", 0
    while len(read) < len(text):
        piece = text[len(read) : len(read) + cuts[number % len(cuts)]]
        found, before, read, number = strings.read(piece), len(read), read + piece, number + 1
        ends = [(end, stop) for end in range(before + 1, len(read) + 1) for stop in stops if read[:end].endswith(stop)]
        first = min(ends, key=lambda one: (one[0], -len(one[1])), default=None)
        assert (found and (before + found.end, found.stop)) == first
        begun = [n for stop in stops for n in range(1, len(stop)) if n <= len(read) and stop.startswith(read[-n:])]
        assert strings.begun == max(begun, default=0)


def test_a_long_beginning_of_a_stop_string_is_held_and_let_go_in_one() -> None:
    stop = "a" * 5000 + "b"
    detokenizer = Detokenizer(NANO, SamplingParams(stop=stop), PROMPT)
    for _ in range(6000):
        assert not detokenizer.append(encode("a"))
    assert detokenizer.text == "a" * 1000
    assert not detokenizer.append(encode("c")) and detokenizer.text == "a" * 6000 + "c"
    assert not detokenizer.append(encode("a" * 4999))
    assert detokenizer.finish() == "a" * 6000 + "c" + "a" * 4999


def test_pieces_are_only_appended_to() -> None:
    detokenizer = Detokenizer(NANO, SamplingParams(stop=" STOP"), PROMPT)
    pieces = detokenizer.pieces
    for token in encode("One two. ST three STOP four"):
        before = list(pieces)
        detokenizer.append([token])
        assert detokenizer.pieces is pieces and pieces[: len(before)] == before
    assert "".join(pieces) == detokenizer.finish() == "One two. ST three"


def test_a_decoder_without_any_cut_does_not_pile_tokens_up() -> None:
    class Endless:
        """Whatever it decodes is undecided, and no cut gives the same text as the whole."""

        def decode(self, ids: Sequence[int], **options: Any) -> str:
            return f"{len(ids)}" * len(ids) + "\ufffd"

    detokenizer = Detokenizer(Endless(), SamplingParams(), [1])
    for _ in range(500):
        detokenizer.append([1])
        assert len(detokenizer.pieces) <= 500 and len(detokenizer._pending) <= 64


def test_stop_strings_wait_for_min_tokens() -> None:
    ids = [token for letter in "a.b.c" for token in encode(letter)]
    assert stream(Detokenizer(NANO, SamplingParams(stop="."), PROMPT), ids)[-1] == "a"
    shown = stream(Detokenizer(NANO, SamplingParams(stop=".", min_tokens=2), PROMPT), ids)
    assert shown[-1] == "a.b"
    check_stream(shown)


def test_a_stop_string_completed_by_the_flush_is_cut() -> None:
    detokenizer = Detokenizer(NANO, SamplingParams(stop="\ufffd"), PROMPT)
    assert not detokenizer.append([*encode("a"), encode("🍎")[0]])
    assert detokenizer.finish() == "a" and detokenizer.stop == "\ufffd"

"""Windows of texts: in one document, spread over all, and disjoint in what is looked at."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from specontext.evaluation.windows import ShortTextError, Text, reservations


def write(folder: Path, tokenizer: Any, tokens: int, name: str = "text.txt") -> Path:
    """A text of words that are tokens; with its end, but without the token that the tokenizer puts before it, so many."""
    words = [" sun", " moon", " river", " stone"]
    assert all(len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1 for word in words)
    path = folder / name
    path.write_text("".join(words[n * n % 4] for n in range(tokens - 1)))
    return path


def test_windows_are_spread_over_a_text(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path, tokenizer, 300)
    windows = Text(str(path), tokenizer, seed=0).windows(100, 3, 10)
    ids = [*tokenizer(path.read_text())["input_ids"], tokenizer.eos_token_id]
    assert [window.token_ids for window in windows] == [ids[:100], [ids[0], *ids[101:200]], [ids[0], *ids[202:301]]]
    assert all(window.wanted == [True] * 10 and len(window.prompt) == 89 and not window.joined for window in windows)


def numbered(path: Path, sizes: list[int]) -> Path:
    """A JSONL file in which each document repeats a word of its own, to so many tokens with the end."""
    words = [" sun", " moon", " river", " stone"]
    path.write_text("".join(json.dumps({"text": words[n] * (size - 1)}) + "\n" for n, size in enumerate(sizes)))
    return path


def test_windows_of_rows_lie_in_one_document(tmp_path: Path, tokenizer: Any) -> None:
    path = numbered(tmp_path / "rows.jsonl", [250, 99, 100, 450])
    windows = Text(str(path), tokenizer, seed=0).windows(51, 12, 10)
    assert [len(set(window.token_ids[1:])) for window in windows if window.token_ids[-1] != 1] == [1] * 9
    documents = [window.key.partition(",")[0] for window in windows]
    assert [documents.count(f"document {n}") for n in range(4)] == [5, 1, 2, 4]  # one each, then again from the first on
    assert not any(window.joined for window in windows)
    few = Text(str(path), tokenizer, seed=0).windows(200, 2, 10)
    assert [window.key for window in few] == ["document 0, from 0", "document 3, from 0"]
    with pytest.raises(ShortTextError, match=r"no document of .* has the 600 tokens of a window, the longest has 451"):
        Text(str(path), tokenizer, seed=0).windows(600, 2, 10)


def test_files_that_are_all_too_short_are_read_as_one(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, tokens in (("a", 60), ("b", 70), ("c", 90)):
        write(folder, tokenizer, tokens, name)
    text = Text(str(folder), tokenizer, seed=0)
    found = [(window.key, window.joined) for window in text.windows(80, 2, 10)]
    assert found == [("document 2, from 0", False), ("document 2, from 11", False)]
    (joined,) = text.windows(200, 1, 10)
    assert joined.joined and reservations([joined], 2) == [
        "no file is as long as a window: windows go over the ends of files",
        "there are 1 windows, fewer than the limit of 2",
    ]
    assert joined.token_ids.count(tokenizer.eos_token_id) == 2
    with pytest.raises(ShortTextError, match="has 221 tokens, too few for a window of 300"):
        text.windows(300, 1, 10)


def test_windows_of_a_short_text_overlap_outside_of_what_is_compared(tmp_path: Path, tokenizer: Any) -> None:
    windows = Text(str(write(tmp_path, tokenizer, 124)), tokenizer, seed=0).windows(100, 20, 10)
    ends = [int(window.key.removeprefix("from ")) + 99 for window in windows]
    assert ends[0] == 99 and ends[-1] == 124 and len(ends) == 3
    assert all(after - before >= 10 for before, after in pairwise(ends))
    (only,) = Text(str(write(tmp_path, tokenizer, 99)), tokenizer, seed=0).windows(100, 20, 10)
    assert len(only.token_ids) == 100


def test_a_text_that_is_too_short(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ShortTextError, match="has 99 tokens, too few for a window of 100"):
        Text(str(write(tmp_path, tokenizer, 98)), tokenizer, seed=0).windows(100, 1, 10)


def test_of_rows_only_answers_are_compared(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": " sun" * 30, "completion": " moon" * 7}) + "\n")
    (window,) = Text(str(path), tokenizer, seed=0).windows(39, 1, 12)
    assert window.wanted == [False] * 4 + [True] * 8  # the answer and its end
    path.write_text(json.dumps({"prompt": " sun" * 30, "completion": " moon"}) + "\n" + json.dumps({"text": ""}) + "\n")
    with pytest.raises(ShortTextError, match="hold none that the model has to say"):
        Text(str(path), tokenizer, seed=0).windows(20, 1, 5)


def test_generated_tasks(tokenizer: Any) -> None:
    text = Text("tasks:retrieval", tokenizer, seed=3)
    windows = text.windows(200, 3, 20)
    assert len(windows) == 3 and len({tuple(window.token_ids) for window in windows}) == 3
    for window in windows:
        assert 175 <= len(window.token_ids) <= 200 and len(window.wanted) == 20
        said = [token for token, wanted in zip(window.token_ids[-20:], window.wanted, strict=True) if wanted]
        assert said[-1] == tokenizer.eos_token_id
    with pytest.raises(ShortTextError):
        text.windows(8, 1, 4)

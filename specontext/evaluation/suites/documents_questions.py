"""Questions that a document answers by itself: how a passage in it goes on, and what stands behind a name.

Nothing is written by hand or by a model. A passage is asked for where it goes on with something rare, a name, a number, a path,
that could hardly be guessed; a value where a line of the document gives it to a name that is given only one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

BEFORE = 12  # words of a passage that are quoted
AFTER = 3  # words that are asked for
RARE = 2  # occurrences at most
LAST_PART = 0.9  # of a document; behind it stands what every method reads
LONGEST = 240  # characters of a quotation
# What is quoted stands behind the question and not in it, where it would go on with something else than in the document.
PASSAGE = "Which passage of the document is it that begins as follows? Quote it word for word."
VALUE = "What is the value of the following in the document? Quote it word for word."
_WORD = re.compile(r"\S+")
_SENTENCE_END = re.compile(r"[.!?:;][\"')\]]*$")
_NUMBER = re.compile(r"\d[\d.,:/-]*\d")
_IDENTIFIER = re.compile(r"[A-Za-z0-9]+(?:[._/-]+[A-Za-z0-9]+)+|[a-z]+[A-Z]\w+|--?[a-z][\w-]+")
_NAME = re.compile(r"[A-Z][a-z]{3,}")
_LINE = re.compile(
    r"^[ \t>*-]*(?P<key>[A-Za-z_][\w./-]{2,40}(?: [\w./-]{1,40}){0,2})(?P<mark>[ \t]*[:=][ \t]+)"
    r"(?P<value>[^\s{(\[\\][^\n]{0,60}?)[ \t]*[,;]?[ \t]*$",
    re.MULTILINE,
)
_ROW = re.compile(r"^\|[ \t]*(?P<key>[^|\n]{3,40}?)(?P<mark>[ \t]*\|[ \t]*)(?P<value>[^|\n]{1,60}?)[ \t]*\|", re.MULTILINE)
_SPEAKS = re.compile(r"\w")


@dataclass(frozen=True)
class Question:
    """Something that a document says.

    Attributes:
        asked: in words, as part of a prompt.
        begun: how the answer begins in the document; a model goes on from it.
        answer: what follows there.
    """

    asked: str
    begun: str
    answer: str


def passages(document: str) -> list[Question]:
    """Passages that go on with something rare, in the order of the document."""
    matches = list(_WORD.finditer(document))
    words = [match[0] for match in matches]
    counts, last = Counter(words), {word: place for place, word in enumerate(words)}
    starts = Counter(tuple(words[place - BEFORE : place]) for place in range(BEFORE, len(words)))
    found = []
    for place in range(2 * BEFORE, int(len(words) * LAST_PART) - AFTER):
        before, after = words[place - BEFORE : place], words[place : place + AFTER]
        rare = counts[after[0]] <= RARE and last[after[0]] == place and _is_rare_kind(after[0], before[-1])
        quoted = document[matches[place - BEFORE].start() : matches[place - 1].end()]
        if rare and starts[tuple(before)] == 1 and len(quoted) <= LONGEST and _can_be_said(after):
            found.append(Question(PASSAGE, quoted, " ".join(after)))
    return found


def _is_rare_kind(word: str, before: str) -> bool:
    if _NUMBER.search(word) or _IDENTIFIER.search(word):
        return True
    return _NAME.search(word) is not None and not _SENTENCE_END.search(before)


def _can_be_said(words: list[str]) -> bool:
    return all(_SPEAKS.search(word) for word in words) and len(" ".join(words)) <= LONGEST


def values(document: str) -> list[Question]:
    """Names that are given one value, in the order of the document: lines such as `timeout = 30`, and rows of tables."""
    stop = int(len(document) * LAST_PART)
    matches = sorted([*_LINE.finditer(document), *_ROW.finditer(document)], key=lambda match: match.start())
    keys = Counter(match["key"] for match in matches)
    found = []
    for match in matches:
        key, value = match["key"], match["value"]
        if keys[key] > 1 or document.count(key) > RARE or match.end() > stop or not _SPEAKS.search(value):
            continue
        begun = document[_line_before(document, match.start()) : match.end("mark")].strip()
        found.append(Question(VALUE, begun, " ".join(value.split()[:AFTER])))
    return found


def _line_before(document: str, start: int) -> int:
    """Where the line before the one at `start` begins; a name alone would be too little to go on from."""
    before = document[:start].rstrip()
    line = before.rfind("\n") + 1
    return line if len(before) - line <= LONGEST else start


KINDS: dict[str, Callable[[str], list[Question]]] = {"passages": passages, "values": values}

r"""Final answers of mathematics problems: finding them in an output, and comparing them with the right one.

Compared are values, not spellings: \frac12, 0.5 and 1/2 are one answer, as are 3\sqrt{2} and \sqrt{18}. Lists without brackets,
sets and unions are compared in any order, tuples, intervals and matrices in theirs, equations and inequalities up to a factor.
Left out of account are units and words behind a number, currency, percent and degree signs, thousands separators, and a name in
front ("x ="). "2 million" is 2000000, and 2 as well, since a problem may ask for millions.

Limits: units are never checked, nor is the number of decimals (0.33 is not 1/3); 50\% is 50, not 0.5; a form that a problem asks
for (factored, simplified) is not told from another of the same value; a base as in 52_8 must be written as in the reference;
sentences are compared as text.
"""

from __future__ import annotations

import re
from fractions import Fraction

from specontext.evaluation.suites.math_brackets import closings
from specontext.evaluation.suites.math_forms import Leaf, Named, read, same
from specontext.evaluation.suites.math_spelling import in_digits, plain
from specontext.evaluation.suites.math_values import Unreadable, value

_LONGEST = 400  # characters of an answer that is looked into
_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_BARE = re.compile(r"[^\s$.,]+")
_BETWEEN = re.compile(r"(?:[\s,;$]|\\q?quad|\\[,; ()\[\]]|\\(?:text|mbox)\{\s*,?\s*(?:and|or)\s*\}|\b(?:and|or)\b)*")
_SAID = re.compile(
    r"(?:\banswer\b\**\s*(?:is|:|=)\**\s*:?|####|<answer>\s*|\bfinal answer\**[ \t]*\n\s*)"
    r"[ \t]*\**[ \t]*(?=(?P<answer>[^\n]{1,500}))",
    re.IGNORECASE,
)
_FORMULA = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)")
_TELLING = re.compile(r"\d|[$\\^_=√π∞]|(?<!\w)[A-HJ-Zb-z](?!\w)")
_NUMBER = re.compile(r"(?<![\w.])-?\$?\d[\d,]*(?:\.\d+)?|(?<![\w.])-?\.\d+")


def final_answer(output: str, *, or_last_number: bool = False) -> str | None:
    r"""The answer in an output: the last complete \boxed{...}, else what follows the last "answer is", "####" or "<answer>".

    What stands below a line "Final answer" follows it.

    Args:
        or_last_number: where there is neither, the last number, as is usual for GSM8K.

    Returns:
        None where the output gives no answer.
    """
    if (boxed := last_boxed(output)) is not None:
        return boxed
    if said := [match["answer"] for match in _SAID.finditer(output)]:
        telling = [answer for answer in said if _TELLING.search(answer)]  # and not "the answer is easy to check"
        answer = re.split(r"\.(?:\s|$)|</answer>", (telling or said)[-1], maxsplit=1)[0].strip(' *`"')
        if answer := _formulas(answer) or answer:
            return answer
    if or_last_number and (numbers := _NUMBER.findall(output)):
        return str(numbers[-1]).strip("$,")
    return None


def _formulas(answer: str) -> str:
    """The first formula in a sentence, and those that only commas, "and" or "or" divide from it; '' where there is none."""
    parts: list[str] = []
    end = 0
    for match in _FORMULA.finditer(answer):
        if parts and not _BETWEEN.fullmatch(answer, end, match.start()):
            break
        parts.append(match[1] or match[2])
        end = match.end()
    return ", ".join(parts)


def last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} (or \fbox{...}, or \boxed 7), complete and not empty; None where there is none.

    Boxes with nothing but commas and "and" between them are one answer, a list; a box inside of another is part of its content.
    """
    parts: list[str] = []
    end = len(text)
    for start, content, closed in reversed(_boxes(text)):
        if parts and not _BETWEEN.fullmatch(text, closed, end):
            break
        parts.append(content)
        end = start
    return ", ".join(reversed(parts)) or None


def _boxes(text: str) -> list[tuple[int, str, int]]:
    """Where each box that is complete, not empty and in no other begins, what stands in it, and where it ends."""
    found: list[tuple[int, str, int]] = []
    closing, end = closings(text), 0
    for match in _BOX.finditer(text):
        start = match.end()
        if match.start() < end:
            continue
        if text[start : start + 1] == "{":
            closed = closing.get(start, -1) + 1
            content = text[start + 1 : closed - 1].strip()
        else:
            bare = _BARE.match(text, start)
            content, closed = (bare[0], bare.end()) if bare else ("", 0)
        if closed and (content := _BOX.sub("", content)):
            found.append((match.start(), content, closed))
            end = closed
    return found


def equivalent(answer: str, reference: str) -> bool:
    """Whether two answers are the same; see the top of this file for what that means."""
    if max(len(answer), len(reference)) > _LONGEST:
        return answer.strip() == reference.strip()
    given, written = (answer, reference), (in_digits(answer), in_digits(reference))
    sized = [text != before for text, before in zip(written, given, strict=True)]
    if any(sized) and same(*(read(plain(text)) for text in written)):
        return True
    return not all(sized) and same(*(read(plain(text)) for text in given))  # 2, in millions, is "2 million", too


def exact_number(answer: str) -> Fraction | None:
    """The number that an answer is; None where it is none, or an irrational one."""
    found = read(plain(answer))
    if isinstance(found, Named):
        found = found.value
    try:
        number = value(found.text) if isinstance(found, Leaf) else None
    except Unreadable:
        return None
    return number if isinstance(number, Fraction) else None

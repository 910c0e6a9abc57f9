r"""Final answers of mathematics problems: finding them in an output, and comparing them with the right one.

Compared are values, not spellings: \frac12, 0.5 and 1/2 are one answer, as are 3\sqrt{2} and \sqrt{18}. Lists without brackets,
sets and unions are compared in any order, tuples, intervals and matrices in theirs. Left out of account are units and words
behind a number, currency, percent and degree signs, thousands separators, and a leading "x =".

Limits: units are never checked, nor is the number of decimals (0.33 is not 1/3); 50\% is 50, not 0.5; a form that a problem asks
for (factored, simplified) is not told from another of the same value; a base as in 52_8 must be written as in the reference;
formulas with functions, inequalities and sentences are compared as text.
"""

from __future__ import annotations

import re
from fractions import Fraction

from specontext.evaluation.suites.math_values import Unreadable, same_value, value

_SPACING = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|quad|qquad|limits)(?![a-zA-Z])|(?<!\\)\\[,;:> ]|~")
_REPLACED = (
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree(?![a-zA-Z])|°"), ""),
    (re.compile(r"\\?[%$]|[£€]"), ""),
    (re.compile(r"(?<=\d)(?:\{,\}|\\,(?=\d{3}(?!\d)))(?=\d)|\\!"), ""),
    (re.compile(r"_\{(\w)\}"), r"_\1"),
    (re.compile(r"−|–"), "-"),
    (re.compile(r"π"), r"\\pi "),
    (re.compile(r"∞"), r"\\infty "),
    (re.compile(r"×"), r"\\times "),
    (re.compile(r"√"), r"\\sqrt "),
    (re.compile(r"\+\s*(?=\\infty)"), ""),
)
_TEXT = r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}"
_CONJUNCTION = re.compile(r"\\(?:text|mbox|textrm)\s*\{\s*,?\s*(?:and|or)\s*\}|(?<=[\w})])\s*,?\s+(?:and|or)\s+(?=[-\w\\({])")
_UNIT = re.compile(rf"(?P<number>.*[\d)}}].*?)\s*(?:{_TEXT}(?:\^\{{?-?\d\}}?)?[\s./]*)+")
_WORDS_BEHIND = re.compile(r"(?P<number>[-+]?[\d.,/]*\d)\s+[a-zA-Z]{2,}(?:[\s./-]+[a-zA-Z]+)*\.?")
_ASSIGNED = re.compile(r"[a-zA-Z](?:_\{?\w\}?|\([a-zA-Z]\))?\s*(?:=|\\in(?![a-zA-Z]))\s*(?P<value>[^=<>]+)")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_MATRIX = re.compile(r"\\begin\{[pbvBV]?matrix\}(.*)\\end\{[pbvBV]?matrix\}", re.DOTALL)
_LONGEST = 400  # characters of an answer that is looked into
_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_SAID = re.compile(r"(?:\banswer\b\**\s*(?:is|:|=)\**\s*:?|####)[ \t]*\**[ \t]*(?P<answer>[^\n]+)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.])-?\$?\d[\d,]*(?:\.\d+)?|(?<![\w.])-?\.\d+")


def final_answer(output: str, *, or_last_number: bool = False) -> str | None:
    r"""The answer that an output gives: its last complete \boxed{...}, else what follows its last "answer is" or "####".

    Args:
        or_last_number: where there is neither, the last number, as is usual for GSM8K.

    Returns:
        None where the output gives no answer.
    """
    if (boxed := last_boxed(output)) is not None:
        return boxed
    if said := list(_SAID.finditer(output)):
        answer = re.split(r"\.(?:\s|$)", said[-1]["answer"], maxsplit=1)[0].strip(" *")
        inside = re.search(r"\$([^$]+)\$|\\\((.+?)\\\)", answer)
        if inside:
            answer = inside[1] or inside[2]
        if answer:
            return answer
    if or_last_number and (numbers := _NUMBER.findall(output)):
        return str(numbers[-1]).strip("$,")
    return None


def last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} (or \fbox{...}, or \boxed 7), complete and not empty; None where there is none."""
    for match in reversed(list(_BOX.finditer(text))):
        if text[match.end() : match.end() + 1] == "{":
            content = _braced(text, match.end())
            if content is not None and content.strip():
                return content.strip()
        elif bare := re.match(r"[^\s$.,]+", text[match.end() :]):
            return bare[0]
    return None


def equivalent(answer: str, reference: str) -> bool:
    """Whether two answers are the same; see the top of this file for what that means."""
    if max(len(answer), len(reference)) > _LONGEST:
        return answer.strip() == reference.strip()
    return _same(_plain(answer), _plain(reference))


def exact_number(answer: str) -> Fraction | None:
    """The number that an answer is; None where it is none, or an irrational one."""
    try:
        number = value(_bare(_plain(answer)))
    except Unreadable:
        return None
    return number if isinstance(number, Fraction) else None


def _plain(text: str) -> str:
    """Without what has no bearing on the value."""
    text = re.sub(r"^\\[(\[]|\\[)\]]$", "", text.strip()).strip()
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    text = _SPACING.sub(" ", text)
    text = _CONJUNCTION.sub(",", text)
    if unit := _UNIT.fullmatch(text):
        text = unit["number"]
    text = re.sub(_TEXT, r"\1", text).strip().rstrip(".").strip()
    return text


def _same(first: str, second: str) -> bool:
    first, second = _bare(first), _bare(second)
    if _squeezed(first) == _squeezed(second) != "":
        return True
    parts = [_parts(text) for text in (first, second)]
    if parts[0] is not None or parts[1] is not None:
        if parts[0] is not None and parts[1] is not None and _same_parts(parts[0], parts[1]):
            return True
        numbers = [text.replace(",", "") if _THOUSANDS.fullmatch(text) else text for text in (first, second)]
        return numbers != [first, second] and all(_parts(text) is None for text in numbers) and _same_leaf(*numbers)
    return _same_leaf(first, second)


def _same_leaf(first: str, second: str) -> bool:
    words = [re.sub(r"^\((\w)\)$", r"\1", _squeezed(text)) for text in (first, second)]
    if any(len(word) > 1 and word.isalpha() for word in words):
        return words[0].casefold() == words[1].casefold()
    agree = same_value(first, second)
    return words[0] == words[1] != "" if agree is None else agree


Parts = tuple[str, list[str], bool]  # brackets or kind, the parts, whether their order counts


def _parts(text: str) -> Parts | None:
    """The parts of a list, set, tuple, interval, union or matrix; None for a single value."""
    if matrix := _MATRIX.fullmatch(text):
        rows = [row.split("&") for row in re.split(r"\\\\", matrix[1]) if row.strip()]
        return f"matrix of {[len(row) for row in rows]}", [cell.strip() for row in rows for cell in row], True
    if len(pieces := _split(text, r"\cup")) > 1:
        return "union", pieces, False
    if len(pieces := _split(text, ",")) > 1:
        return "list", pieces, False
    if r"\pm" in text or "±" in text:
        halves = [re.sub(r"\\pm(?![a-zA-Z])|±", sign, text) for sign in ("+", "-")]
        return "list", halves, False
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return "list", _split(text[2:-2], ","), False
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and len(inside := _split(text[1:-1], ",")) > 1:
        return text[0] + text[-1], inside, True
    return None


def _same_parts(first: Parts, second: Parts) -> bool:
    (kind, mine, ordered), (other_kind, theirs, _) = first, second
    if kind != other_kind or len(mine) != len(theirs):
        return False
    if ordered:
        return all(_same(a, b) for a, b in zip(mine, theirs, strict=True))
    left = list(theirs)
    for a in mine:
        match = next((b for b in left if _same(a, b)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _split(text: str, separator: str) -> list[str]:
    """The pieces between separators that stand outside all brackets; an interval may open and close with different ones."""
    pieces, depth, start, place = [], 0, 0, 0
    while place < len(text):
        if text[place] in "([{":
            depth += 1
        elif text[place] in ")]}":
            depth -= 1
        elif depth == 0 and text.startswith(separator, place):
            pieces.append(text[start:place].strip())
            place += len(separator)
            start = place
            continue
        place += 1
    return [*pieces, text[start:].strip()]


def _bare(text: str) -> str:
    """Without a name in front ("x =") and words behind."""
    if assigned := _ASSIGNED.fullmatch(text.strip()):
        text = assigned["value"]
    text = text.strip()
    words = _WORDS_BEHIND.fullmatch(text)
    return words["number"] if words else text


def _squeezed(text: str) -> str:
    """Without spaces, but for those between two digits."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)


def _braced(text: str, start: int) -> str | None:
    """The content of the braces that open at `start`; escaped ones do not count. None if they never close."""
    depth, place = 0, start
    while place < len(text):
        if text[place] == "\\":
            place += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + 1 : place]
        place += 1
    return None

r"""Answers to mathematics problems as what they are made of: lists, sets, tuples, intervals, matrices, equations, inequalities.

Read from the spelling of `math_spelling`. Lists without brackets, sets and unions are compared in any order, tuples, intervals
and matrices in theirs, equations and inequalities up to a factor; what has no parts is compared by `math_values`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from specontext.evaluation.suites.math_brackets import outside, split, squeezed, unbraced
from specontext.evaluation.suites.math_spelling import without_commas
from specontext.evaluation.suites.math_values import proportion, same_value

_MATRIX = re.compile(r"\(?\s*\\begin\{([pbvBV]?matrix)\}(.*)\\end\{\1\}\s*\)?", re.DOTALL)
_SIGN = r"\\(?:le|ge|ne|approx|in)(?![a-zA-Z])|[=<>]"
_SIGNS = {r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\approx": "~", r"\in": "in"}
_MIRRORED = {">": "<", ">=": "<="}
_CONDITION = re.compile(r"\s*[a-zA-Z]\s*(?:\\in\s*R\s*)?[|:](.*[<>=].*|.*\\[lg]e(?![a-zA-Z]).*)")  # { x | x > 3 }
_PRODUCT = re.compile(r"\s*[a-z]\s*[a-z]\s*")  # what may be a name of two letters or a product
_ALL_REALS = ("R", "allrealnumbers", "allreals")
_PLUS_MINUS = re.compile(r"\\([pm])([mp])(?![a-zA-Z])")


@dataclass(frozen=True)
class Leaf:
    """What has no parts: a number, a formula, words."""

    text: str


@dataclass(frozen=True)
class Group:
    """Several answers in one.

    Attributes:
        kind: the brackets, or "list" (also for sets), "union", ":" or the shape of a matrix.
        ordered: whether the order of the parts counts.
    """

    text: str
    kind: str
    parts: tuple[Answer, ...]
    ordered: bool


@dataclass(frozen=True)
class Named:
    """A value with a name in front, as in "x = 5"; `text` is both."""

    text: str
    name: str
    value: Answer


@dataclass(frozen=True)
class Relation:
    """Equations and inequalities, chains of them as several: left side, sign of =, <, <=, != and right side."""

    text: str
    links: tuple[tuple[str, str, str], ...]


Answer = Leaf | Group | Named | Relation


def read(text: str) -> Answer:
    """What an answer in the plain spelling is made of."""
    text = unbraced(text.strip())
    if matrix := _MATRIX.fullmatch(text):
        rows = [row.split("&") for row in re.split(r"\\\\", matrix[2]) if row.strip()]
        return Group(text, f"matrix of {[len(row) for row in rows]}", tuple(read(cell) for row in rows for cell in row), True)
    for separator in (",", ";"):
        if len(pieces := [piece for piece in split(text, separator) if piece]) > 1:
            return Group(text, "list", tuple(map(read, pieces)), False)
    if (signs := _relations(text)) is not None:
        return signs
    if len(pieces := split(text, r"\cup")) > 1:
        return Group(text, "union", tuple(map(read, pieces)), False)
    if _PLUS_MINUS.search(text):
        return Group(text, "list", (read(_PLUS_MINUS.sub(_upper, text)), read(_PLUS_MINUS.sub(_lower, text))), False)
    return _bracketed(text) or Leaf(text)


def same(first: Answer, second: Answer, *, by_name: bool = False) -> bool:
    """Whether two answers are one.

    Args:
        by_name: values with different names differ, as they do in "x = 1, y = 2".
    """
    if squeezed(first.text) == squeezed(second.text) != "":
        return True
    if isinstance(first, Named) and isinstance(second, Named):
        if squeezed(first.name) == squeezed(second.name):
            return same(first.value, second.value)
        renamed = not by_name and not _PRODUCT.fullmatch(first.name) and not _PRODUCT.fullmatch(second.name)
        return (renamed and same(first.value, second.value)) or _same_relations(_equation(first), _equation(second))
    if isinstance(first, Named) or isinstance(second, Named):
        if isinstance(first, Relation) or isinstance(second, Relation):
            return _same_relations(_equation(first), _equation(second))
        return same(_value(first), _value(second), by_name=by_name)
    if isinstance(first, Relation) and isinstance(second, Relation):
        return _same_relations(first, second)
    first, second = _interval(first), _interval(second)
    if isinstance(first, Group) and isinstance(second, Group):
        return _same_parts(first, second)
    if isinstance(first, Leaf) and isinstance(second, Leaf):
        return _same_leaf(first.text, second.text)
    if isinstance(first, Relation) or isinstance(second, Relation):
        return False
    first, second = _number(first), _number(second)
    return isinstance(first, Leaf) and isinstance(second, Leaf) and _same_leaf(first.text, second.text)


def _value(answer: Answer) -> Answer:
    return answer.value if isinstance(answer, Named) else answer


def _number(answer: Answer) -> Answer:
    """A list of digits in threes as the one number that it may be."""
    if isinstance(answer, Group) and answer.kind == "list" and (number := without_commas(answer.text)):
        return Leaf(number)
    return answer


def _upper(match: re.Match[str]) -> str:
    return "+" if match[1] == "p" else "-"


def _lower(match: re.Match[str]) -> str:
    return "-" if match[1] == "p" else "+"


def _bracketed(text: str) -> Answer | None:
    for opening, closing in ((r"\{", r"\}"), (r"\langle", r"\rangle")):
        if text.startswith(opening) and text.endswith(closing):
            inside = text[len(opening) : -len(closing)]
            if not inside.strip():
                return Leaf(r"\emptyset")
            if opening == r"\langle":
                return Group(text, "()", tuple(map(read, split(inside, ","))), True)
            content = read(condition[1] if (condition := _CONDITION.fullmatch(inside)) else inside)
            return Group(text, "list", content.parts, False) if isinstance(content, Group) and content.kind == "list" else content
    if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        for separator in (",", ";"):
            if len(pieces := split(text[1:-1], separator)) > 1:
                return Group(text, text[0] + text[-1], tuple(map(read, pieces)), True)
    if len(pieces := split(text, ":")) > 1 and all(pieces):
        return Group(text, ":", tuple(map(read, pieces)), True)
    return None


def _relations(text: str) -> Answer | None:
    """A value with its name, or equations and inequalities; None where there is no such sign outside of brackets."""
    pieces: list[str] = []
    signs: list[str] = []
    place = 0
    while (found := outside(text[place:], _SIGN)) is not None:
        pieces.append(text[place : place + found.start()].strip())
        sign = _SIGNS.get(found[0], found[0])
        if sign == "~" and (signs or not _is_name(pieces[0])):  # in front of a rounded value stands the exact one
            return read(text[: place + found.start()])
        signs.append("=" if sign == "~" else sign)
        place += found.end()
    if not signs:
        return None
    pieces.append(text[place:].strip())
    if not all(pieces[1:]) or not (pieces[0] or signs == ["="]):
        return Leaf(text)
    if set(signs) <= {"=", "in"} and (_is_name(pieces[0]) or _holds(pieces)):
        return Named(text, pieces[0], read(pieces[-1]))
    if "in" in signs:
        return Leaf(text)
    links = tuple(
        (right, _MIRRORED[sign], left) if sign in _MIRRORED else (left, sign, right)
        for left, sign, right in zip(pieces, signs, pieces[1:], strict=False)
    )
    return Relation(text, links)


def _is_name(text: str) -> bool:
    """Whether what stands in front of "=" is what is asked for, as in "x", "f(2)", "|AB|", "Area of ABC", not a formula."""
    bare = re.sub(r"(?<=[a-zA-Z])\([^()]*\)|_\{[^{}]*\}|\|(?=[A-Z]{2}\|)|(?<=[A-Z]{2})\|", "", text)
    return not re.search(r"[\d+\-*/^|!]", bare)


def _holds(pieces: list[str]) -> bool:
    """Whether all sides have one value, as in "2 + 3 = 5"."""
    return all(same_value(side, pieces[-1]) for side in pieces[:-1])


def _equation(answer: Answer) -> Answer:
    return Relation(answer.text, ((answer.name, "=", answer.value.text),)) if isinstance(answer, Named) else answer


def _same_relations(first: Answer, second: Answer) -> bool:
    if not isinstance(first, Relation) or not isinstance(second, Relation) or len(first.links) != len(second.links):
        return False
    left = list(second.links)
    for link in first.links:
        match = next((other for other in left if _same_link(link, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_link(first: tuple[str, str, str], second: tuple[str, str, str]) -> bool:
    if first[1] != second[1]:
        return False
    factor = proportion(*(f"({left})-({right})" for left, _, right in (first, second)))
    if factor is None:
        return [squeezed(side) for side in first] == [squeezed(side) for side in second]
    return factor > 0 if first[1] in ("<", "<=") else factor != 0


def _interval(answer: Answer) -> Answer:
    """The interval that an inequality of one name says; several of them are a union."""
    if isinstance(answer, Leaf) and squeezed(answer.text) in _ALL_REALS:
        return Group(answer.text, "()", (Leaf(r"-\infty"), Leaf(r"\infty")), True)
    if isinstance(answer, Group) and answer.kind == "list" and all(isinstance(part, Relation) for part in answer.parts):
        parts = tuple(map(_interval, answer.parts))
        return Group(answer.text, "union", parts, False) if all(isinstance(part, Group) for part in parts) else answer
    if not isinstance(answer, Relation) or any(sign not in ("<", "<=") for _, sign, _ in answer.links):
        return answer
    low, high = (r"-\infty", "<"), (r"\infty", "<")
    if len(answer.links) == 1:
        ((left, sign, right),) = answer.links
        if _is_name(right) == _is_name(left):
            return answer
        low, high = (low, (right, sign)) if _is_name(left) else ((left, sign), high)
    elif len(answer.links) == 2:
        links = answer.links if answer.links[0][2] == answer.links[1][0] else answer.links[::-1]
        (left, below, name), (other, above, right) = links
        if name != other or not _is_name(name):
            return answer
        low, high = (left, below), (right, above)
    else:
        return answer
    brackets = ("[" if low[1] == "<=" else "(") + ("]" if high[1] == "<=" else ")")
    return Group(answer.text, brackets, (read(low[0]), read(high[0])), True)


def _same_parts(first: Group, second: Group) -> bool:
    if first.kind != second.kind or len(first.parts) != len(second.parts):
        return False
    if first.ordered:
        return all(same(a, b, by_name=True) for a, b in zip(first.parts, second.parts, strict=True))
    left = list(second.parts)
    for part in first.parts:
        match = next((other for other in left if same(part, other, by_name=True)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_leaf(first: str, second: str) -> bool:
    words = [re.sub(r"^\(?([a-zA-Z])[).:]?$", r"\1", squeezed(text)) for text in (first, second)]
    if any(word.isalpha() and (len(word) > 2 or word.casefold() == "no") for word in words):
        return words[0].casefold() == words[1].casefold()
    agree = same_value(first, second)
    return words[0] == words[1] != "" if agree is None else agree

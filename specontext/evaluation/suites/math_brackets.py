"""Brackets in answers to mathematics problems: what stands inside of them, what outside."""

from __future__ import annotations

import re


def braced(text: str, start: int) -> str | None:
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


def closings(text: str) -> dict[int, int]:
    """Where the brace that opens at each place closes, for those that do; escaped ones do not count."""
    found: dict[int, int] = {}
    opened: list[int] = []
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            found[opened.pop()] = match.start()
    return found


def unbraced(text: str) -> str:
    """Without braces around the whole."""
    while text.startswith("{") and (content := braced(text, 0)) is not None and len(content) + 2 == len(text):
        text = content.strip()
    return text


def split(text: str, separator: str) -> list[str]:
    """The pieces between separators that stand outside all brackets; an interval may open and close with different ones."""
    pieces, depth, start, place = [], 0, 0, 0
    while place < len(text):
        if text[place] in "([{" or text.startswith((r"\langle", r"\begin"), place):
            depth += 1
        elif text[place] in ")]}" or text.startswith((r"\rangle", r"\end"), place):
            depth -= 1
        elif depth == 0 and text.startswith(separator, place):
            pieces.append(text[start:place].strip())
            place += len(separator)
            start = place
            continue
        place += 1
    return [*pieces, text[start:].strip()]


def outside(text: str, pattern: str) -> re.Match[str] | None:
    """The first match of a pattern that stands outside all brackets."""
    depth = 0
    for match in re.finditer(rf"\\[{{}}]|[(\[{{]|[)\]}}]|{pattern}", text):
        if match[0].lstrip("\\") in tuple("([{"):
            depth += 1
        elif match[0].lstrip("\\") in tuple(")]}"):
            depth -= 1
        elif depth == 0:
            return match
    return None


def squeezed(text: str) -> str:
    """Without spaces, but for those between two digits."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)

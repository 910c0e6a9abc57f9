"""Stretches of an output that hold calls, from the mark that opens them to their end."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Protocol

from specontext.server.tools.json_call import JsonCall, JsonValue
from specontext.server.tools.pieces import CallArguments, CallBegin, Piece, Text

WholeCalls = Callable[[str], list[tuple[str, str]] | None]  # of complete text: names and arguments; None where it is no call
_BLANK = " \t\r\n"


class Block(Protocol):
    """One stretch being read."""

    def feed(self, text: str) -> tuple[list[Piece], str | None]:
        """Take more text. The pieces that are certain, and what comes behind the stretch once it has ended."""

    def finish(self) -> list[Piece]:
        """The output has ended inside the stretch."""


class JsonBlock:
    """Calls as JSON objects, one or several, alone or in a list.

    Args:
        names: of the tools; an object that names none of them is text.
        opened: the mark in front, which is text too if no call follows.
        close: the mark at the end; without one the stretch ends where something else than a call follows.
    """

    def __init__(self, names: Collection[str], *, opened: str, close: str = "") -> None:
        self._names, self._close = names, close
        self._raw: str | None = opened  # as long as no call has begun
        self._held = ""
        self._call: JsonCall | None = None

    def feed(self, text: str) -> tuple[list[Piece], str | None]:
        pieces: list[Piece] = []
        self._held += text
        place = 0
        while place < len(self._held):
            character = self._held[place]
            if self._call is None and character == "{":
                self._call = JsonCall(self._names)
            if self._call is not None:
                made = self._call.take(character)
                place += 1
                pieces += made
                self._note(character, made)
                if self._call.failed:
                    return pieces + self._as_text(), self._rest(place)
                self._call = None if self._call.done else self._call
                continue
            rest = self._held[place:]
            if self._close and rest.startswith(self._close):
                place += len(self._close)
                return pieces + self._as_text(self._close), self._rest(place)
            if self._close and self._close.startswith(rest):
                break  # perhaps the mark
            if character not in f"[],;{_BLANK}":
                return pieces + self._as_text(), self._rest(place)
            self._note(character, [])
            place += 1
        self._held = self._held[place:]
        return pieces, None

    def finish(self) -> list[Piece]:
        return self._as_text(self._held)

    def _note(self, character: str, made: list[Piece]) -> None:
        if self._raw is not None:
            self._raw = None if any(isinstance(piece, CallBegin) for piece in made) else self._raw + character

    def _as_text(self, more: str = "") -> list[Piece]:
        """What was taken and is no call; behind a call that is only the object at which reading ended."""
        if self._raw is not None:
            raw, self._raw = self._raw + more, None
        else:
            raw = self._call.raw if self._call is not None else ""
        return [Text(raw)] if raw else []

    def _rest(self, place: int) -> str:
        rest, self._held = self._held[place:], ""
        return rest


class WholeBlock:
    """Calls that are read when all of them are there.

    Args:
        opened: the mark in front.
        close: the mark at the end, which may be missing where the output ends.
        read: finds the calls.
    """

    def __init__(self, read: WholeCalls, *, opened: str, close: str) -> None:
        self._read, self._opened, self._close = read, opened, close
        self._held, self._looked = "", 0

    def feed(self, text: str) -> tuple[list[Piece], str | None]:
        self._held += text
        place = self._held.find(self._close, self._looked)
        self._looked = max(0, len(self._held) - len(self._close))
        if place < 0:
            return [], None
        inner, rest = self._held[:place], self._held[place + len(self._close) :]
        return self._calls(inner, self._close), rest

    def finish(self) -> list[Piece]:
        return self._calls(self._held, "")

    def _calls(self, inner: str, close: str) -> list[Piece]:
        found = self._read(inner)
        if not found:
            return [Text(self._opened + inner + close)]
        return [piece for name, arguments in found for piece in (CallBegin(name), CallArguments(arguments))]


class BareBlock:
    """A call whose first mark was left out, while the mark behind it may be there.

    Args:
        read, opened, close: as of `WholeBlock`.
        dropped: the mark that belongs to the one that is missing, which is no text behind a call.
    """

    def __init__(self, read: WholeCalls, *, opened: str, close: str, dropped: str) -> None:
        self._call = WholeBlock(read, opened=opened, close=close)
        self._dropped = dropped
        self._behind: str | None = None  # what follows the call, once it is complete, from its first character that is not blank

    def feed(self, text: str) -> tuple[list[Piece], str | None]:
        pieces: list[Piece] = []
        if self._behind is None:
            pieces, rest = self._call.feed(text)
            if rest is None or not any(isinstance(piece, CallBegin) for piece in pieces):
                return pieces, rest
            self._behind, text = "", rest
        self._behind = (self._behind + text).lstrip()
        if self._behind.startswith(self._dropped):
            return pieces, self._behind[len(self._dropped) :]
        return pieces, None if self._dropped.startswith(self._behind) else self._behind

    def finish(self) -> list[Piece]:
        if self._behind is None:
            return self._call.finish()
        return [Text(self._behind)] if self._behind else []


class BracketBlock:
    """Calls in the syntax of Python, `[f(a=1), g()]`, read when the bracket closes."""

    def __init__(self, read: WholeCalls) -> None:
        self._read, self._held, self._looked = read, "", 0
        self._depth, self._quote = 0, ""

    def feed(self, text: str) -> tuple[list[Piece], str | None]:
        self._held += text
        while self._looked < len(self._held):
            character = self._held[self._looked]
            self._looked += 1
            if self._quote:
                if character == "\\":
                    if self._looked == len(self._held):
                        self._looked -= 1
                        return [], None
                    self._looked += 1
                elif character == self._quote:
                    self._quote = ""
            elif character in "\"'":
                self._quote = character
            elif character in "([{":
                self._depth += 1
            elif character in ")]}":
                self._depth -= 1
                if self._depth <= 0:
                    return self._calls(self._held[: self._looked]), self._held[self._looked :]
        return [], None

    def finish(self) -> list[Piece]:
        return self._calls(self._held)

    def _calls(self, text: str) -> list[Piece]:
        found = self._read(text)
        if not found:
            return [Text(text)]
        return [piece for name, arguments in found for piece in (CallBegin(name), CallArguments(arguments))]


class NamedBlock:
    """A name, then its arguments as a JSON object: `name{...}`, with something between them.

    Args:
        between: a regular expression of what may stand between the two.
    """

    def __init__(self, names: Collection[str], between: str, *, opened: str = "") -> None:
        spelled = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or r"(?!)"
        self._head = re.compile(rf"\s*({spelled})(?:{between})(?=\{{)")
        self._longest = max(map(len, names), default=0) + 100
        self._opened, self._held = opened, ""
        self._value: JsonValue | None = None

    def feed(self, text: str) -> tuple[list[Piece], str | None]:
        self._held += text
        pieces: list[Piece] = []
        if self._value is None:
            head = self._head.match(self._held, 0, self._longest + 1)  # as if no more had come yet
            if head is None:
                if len(self._held) > self._longest or "{" in self._held:
                    return [Text(self._opened)], self._held
                return [], None
            self._value, self._held = JsonValue(), self._held[head.end() :]
            pieces.append(CallBegin(head[1]))
        for place, character in enumerate(self._held):
            if self._value.take(character):
                return [*pieces, CallArguments(self._held[: place + 1])], self._held[place + 1 :]
        pieces.append(CallArguments(self._held))
        self._held = ""
        return pieces, None

    def finish(self) -> list[Piece]:
        return [Text(self._opened + self._held)] if self._value is None else []

"""One call as JSON, `{"name": ..., "arguments": {...}}`, read character by character, so that its arguments can be passed on."""

from __future__ import annotations

import json
from collections.abc import Collection

from specontext.server.tools.pieces import CallArguments, CallBegin, Piece

_BLANK = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")


class JsonValue:
    """Finds where a JSON value ends; what is inside is not checked."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.first = ""
        self._depth = 0
        self._string = self._escaped = False

    def take(self, character: str) -> bool | None:
        """Take the next character. True: it was the last one; None: the value had ended before it, and it is not taken."""
        if not self.first:
            self.first = character
        elif self.first not in '"{[' and (character in _BLANK or character in ",}]"):
            return None
        self.text.append(character)
        if self._string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._string = False
                return not self._depth
            return False
        if character == '"':
            self._string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            return not self._depth
        return False


class JsonCall:
    """Reads one call, which begins with a brace.

    Attributes:
        done: the call is complete.
        failed: it is no call; `raw` is then what was taken.
        raw: all that was taken, as long as no call has begun; then the character at which it failed.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.done = self.failed = False
        self.raw = ""
        self._names = names
        self._begun = False
        self._state = "object"
        self._value = JsonValue()
        self._key = ""
        self._sent = 0  # characters of the arguments that were passed on
        self._early = ""  # arguments that came before the name
        self._given = False  # arguments were there

    def take(self, character: str) -> list[Piece]:
        """Take the next character."""
        if not self._begun:
            self.raw += character
        if self._state == "value" and self._value.first:
            return self._in_value(character)
        if character in _BLANK:
            return []
        expected = {"object": "{", "key": '"}', "colon": ":", "value": "", "comma": ",}"}[self._state]
        if expected and character not in expected:
            self.failed, self.raw = True, self.raw or character
            return self._without_arguments() if self._begun else []
        if self._state == "object":
            self._state = "key"
        elif self._state == "colon":
            self._state, self._value = "value", JsonValue()
        elif self._state == "value":
            return self._in_value(character)
        elif character == "}":
            return self._end()
        elif self._state == "comma":
            self._state = "key"
        else:
            self._state, self._key, self._value = "value", "", JsonValue()
            return self._in_value(character)
        return []

    def _in_value(self, character: str) -> list[Piece]:
        ended = self._value.take(character)
        pieces = self._pass_on()
        if ended is False:
            return pieces
        text = "".join(self._value.text)
        if not self._key:
            self._key, self._state = _as_text(text) or "?", "colon"
            if self._key in _ARGUMENTS and self._given:
                self._key = "?"  # the first ones count
            return pieces
        self._state = "comma"
        if self._key in _ARGUMENTS:
            pieces += self._arguments(text)
        elif not self._begun and (self._key == "name" or (self._key == "function" and _as_text(text) in self._names)):
            pieces += self._begin(_as_text(text))
        return pieces + (self.take(character) if ended is None else [])

    def _pass_on(self) -> list[Piece]:
        """Arguments that are an object go on as they come."""
        if not self._begun or self._key not in _ARGUMENTS or self._value.first != "{":
            return []
        new = "".join(self._value.text[self._sent :])
        self._sent, self._given = len(self._value.text), True
        return [CallArguments(new)]

    def _begin(self, name: str | None) -> list[Piece]:
        if name not in self._names:
            self.failed = True
            return []
        assert name is not None
        self._begun, self.raw = True, ""
        return [CallBegin(name), CallArguments(self._early)]

    def _arguments(self, text: str) -> list[Piece]:
        if self._value.first == "{" and self._begun:
            return []
        inner = (_as_text(text) or "") if self._value.first == '"' else text  # some models write the object as a text
        if text in ("null", '""'):  # as where there are none
            return []
        if not inner.lstrip().startswith("{"):
            inner = text  # no object, which whoever called for it must see
        self._given = True
        if self._begun:
            return [CallArguments(inner)]
        self._early += inner
        return []

    def _end(self) -> list[Piece]:
        if not self._begun:
            self.failed = True
            return []
        self.done = True
        return self._without_arguments()

    def _without_arguments(self) -> list[Piece]:
        """What a call that has ended without arguments says."""
        return [] if self._given else [CallArguments("{}")]


def _as_text(text: str) -> str | None:
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, str) else None

"""The channels of gpt-oss: thinking, words before a call, calls and the answer are messages of one output, each with a header.

    <|channel|>analysis<|message|>...<|end|>
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}

A call ends the output with <|call|>, an answer with <|return|>; both are end tokens.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from specontext.engine.held_text import HeldText, without_start_of
from specontext.server.tools.pieces import CallArguments, CallBegin, Piece, Text, Thought, joined

START, CHANNEL, MESSAGE, END, CALL, RETURN = "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"
CONSTRAIN = "<|constrain|>"
THOUGHT = f"{CHANNEL}analysis{MESSAGE}"  # how thinking begins
ENDS = (CALL, RETURN)
_AFTER_BODY = (END, CALL, RETURN, START, CHANNEL)
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_NAMED = re.compile(rf"{re.escape(CHANNEL)}\s*([A-Za-z]+)")


class HarmonyReader:
    """Reads the messages of one output. Text without a header is the answer's, as where the prompt ends amid a message.

    Args:
        names: of the tools; a message to anybody else is text.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held, self._looked = "", 0  # a header without its end has been looked through so far
        self._waiting = HeldText()  # between two pieces, what is held
        self._in_header, self._begun, self._said = True, False, False
        self._kind: type[Text] | type[Thought] | type[CallArguments] = Text
        self._empty = True  # nothing of the message has come yet

    def feed(self, text: str) -> list[Piece]:
        held = self._waiting.more(text)
        if held is None:
            return []
        self._held = held
        pieces: list[Piece] = []
        while self._held and (self._header(pieces) if self._in_header else self._body(pieces)):
            pass
        self._waiting.keep(self._held)
        return joined(pieces)

    def finish(self) -> list[Piece]:
        """What is left; a header without a message says nothing."""
        pieces: list[Piece] = []
        self._held = str(self._waiting)
        if not self._in_header:
            self._say(self._held, pieces)
            self._end(pieces)
        elif not self._held.startswith("<|") and self._begun is False:
            pieces.append(Text(self._held))
        self._waiting.keep("")
        return joined(pieces)

    def _header(self, pieces: list[Piece]) -> bool:
        """Read up to the message; whether there is more to do."""
        if not self._begun and not self._could_be_header():
            self._open(Text)
            return True
        place = self._held.find(MESSAGE, self._looked)
        self._looked = max(0, len(self._held) - len(MESSAGE))
        if place < 0:
            return False
        header, self._held = self._held[:place], self._held[place + len(MESSAGE) :]
        channel, recipient = _NAMED.search(header), _RECIPIENT.search(header)
        name = recipient[1].removeprefix("functions.") if recipient is not None else ""
        if name in self._names:
            pieces.append(CallBegin(name))
            self._said = False  # what follows is apart anyhow
            self._open(CallArguments)
        elif recipient is None and channel is not None and channel[1] == "analysis":
            self._open(Thought)
        else:
            self._open(Text)
            if recipient is not None:
                self._say(header + MESSAGE, pieces)
        return True

    def _could_be_header(self) -> bool:
        ahead = self._held.lstrip()
        return any(ahead.startswith(mark) or mark.startswith(ahead) for mark in (START, CHANNEL, MESSAGE, "to="))

    def _body(self, pieces: list[Piece]) -> bool:
        """Read up to the end of the message; whether there is more to do."""
        places = [(self._held.find(mark), mark) for mark in _AFTER_BODY]
        place, mark = min(((place, mark) for place, mark in places if place >= 0), default=(-1, ""))
        if place >= 0:
            self._say(self._held[:place], pieces)
            self._end(pieces)
            kept = mark in (START, CHANNEL)
            self._held, self._in_header, self._begun = self._held[place + (0 if kept else len(mark)) :], True, True
            self._looked = 0
            return True
        sure = min((without_start_of(mark, self._held) for mark in _AFTER_BODY), key=len)
        self._say(sure, pieces)
        self._held = self._held[len(sure) :]
        return False

    def _open(self, kind: type[Text] | type[Thought] | type[CallArguments]) -> None:
        self._in_header, self._begun, self._kind, self._empty = False, True, kind, True

    def _say(self, text: str, pieces: list[Piece]) -> None:
        if not text:
            return
        if self._kind is Text:
            text, self._said = ("\n\n" if self._empty and self._said else "") + text, True
        pieces.append(self._kind(text))
        self._empty = False

    def _end(self, pieces: list[Piece]) -> None:
        if self._kind is CallArguments and self._empty:
            pieces.append(CallArguments("{}"))
        self._kind = Text

"""Reads an output: text, stretches of calls, text."""

from __future__ import annotations

from collections.abc import Callable

from specontext.engine.held_text import HeldText, without_start_of
from specontext.server.tools.blocks import Block
from specontext.server.tools.pieces import CallBegin, Piece, Text, joined


class BlockReader:
    """Text up to a mark, and behind it what a block makes of it; several blocks may follow each other.

    Blanks beside calls are no text.

    Args:
        make: makes the block that a mark opens, given the mark.
        marks: what opens a block. One character alone opens one only as the first of the output that is not blank.
        skipped: marks that are dropped wherever they stand.
    """

    def __init__(self, make: Callable[[str], Block], *, marks: tuple[str, ...], skipped: tuple[str, ...] = ()) -> None:
        self._make = make
        self._first = tuple(mark for mark in marks if len(mark) <= 1)
        self._marks = tuple(mark for mark in marks if len(mark) > 1)
        self._skipped = skipped
        self._block: Block | None = None
        self._held = ""
        self._waiting = HeldText()  # between two pieces, what is held
        self._begun = False  # something but blanks was there
        self._called = False  # blanks behind a call are dropped

    def feed(self, text: str) -> list[Piece]:
        held = self._waiting.more(text)
        if held is None:
            return []
        self._held = held
        pieces: list[Piece] = []
        while self._held:
            if self._block is not None:
                given, self._held = self._held, ""
                made, rest = self._block.feed(given)
                pieces += self._noted(made)
                if rest is None:
                    break
                self._block, self._held = None, rest
            elif not self._outside(pieces):
                break
        self._waiting.keep(self._held)
        return joined(pieces)

    def finish(self) -> list[Piece]:
        pieces: list[Piece] = []
        if self._block is not None:
            pieces += self._noted(self._block.finish())
        rest = str(self._waiting)
        if rest and not (self._called and not rest.strip()):
            pieces.append(Text(rest))
        self._block = None
        self._waiting.keep("")
        return joined(pieces)

    def _outside(self, pieces: list[Piece]) -> bool:
        """Read text up to a mark; whether there is more to do."""
        ahead = self._held.lstrip()
        if not self._begun and not ahead:
            return False
        for mark in self._skipped:
            if ahead.startswith(mark):
                self._held = ahead[len(mark) :]
                return True
            if mark.startswith(ahead):
                return False
        if not self._begun:
            for mark in self._first:
                if ahead.startswith(mark):
                    self._begun, self._held = True, ahead
                    self._block = self._make("")
                    return True
        places = [(self._held.find(mark), mark) for mark in (*self._marks, *self._skipped)]
        found = min(((place, mark) for place, mark in places if place >= 0), default=None)
        if found is not None:
            place, mark = found
            before, self._held = self._held[:place], self._held[place + len(mark) :]
            text = before.rstrip()
            self._text(text, pieces)
            if mark not in self._skipped:  # the blanks are text again where no call follows
                self._begun, self._block = True, self._make(before[len(text) :] + mark)
            return True
        sure = self._held
        for mark in (*self._marks, *self._skipped):
            sure = min(sure, without_start_of(mark, self._held), key=len)
        sure = sure.rstrip()
        self._text(sure, pieces)
        self._held = self._held[len(sure) :]
        return False

    def _text(self, text: str, pieces: list[Piece]) -> None:
        if self._called:
            text = text.lstrip()
        if text:
            self._begun, self._called = True, False
            pieces.append(Text(text))

    def _noted(self, made: list[Piece]) -> list[Piece]:
        for piece in made:
            self._called = (self._called and not (isinstance(piece, Text) and piece.text)) or isinstance(piece, CallBegin)
        return made


class PlainReader:
    """For outputs that hold no calls."""

    def feed(self, text: str) -> list[Piece]:
        return [Text(text)] if text else []

    def finish(self) -> list[Piece]:
        return []

"""Stop strings in a text that arrives piece by piece.

Every string is matched by the algorithm of Knuth, Morris and Pratt: each character is looked at once, and what is known of a
string grows with how far it has been matched. So the work is linear in the text, whatever the length of the strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Occurrence(NamedTuple):
    """The end of a stop string, in characters of the piece that completed it."""

    end: int
    stop: str


class StopStrings:
    """Where stop strings are complete in a text.

    Attributes:
        begun: length of the longest end of the text so far that is the beginning of a stop string, and not the whole of it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._matches = [_Match(stop) for stop in dict.fromkeys(stops)]
        self.begun = 0

    def read(self, piece: str) -> Occurrence | None:
        """Go on with a piece of text; the occurrence that is complete first, of several at once the longest."""
        found = [Occurrence(end, match.text) for match in self._matches if (end := match.read(piece))]
        self.begun = max((match.length for match in self._matches), default=0)
        return min(found, key=lambda one: (one.end, -len(one.stop)), default=None)


class _Match:
    """How far a string has been matched at the end of a text.

    Attributes:
        length: characters of it that the text ends with; it is never complete between two pieces.
    """

    def __init__(self, text: str) -> None:
        self.text, self.length = text, 0
        # _borders[k]: the longest proper beginning of text[: k + 1] that is its end too, as far as was needed.
        self._borders = [0]

    def read(self, piece: str) -> int:
        """The end of the first occurrence that a piece completes, 0 where it completes none. It is read whole in any case."""
        text, length, first, place = self.text, self.length, 0, 0
        while place < len(piece):
            if not length:  # nothing has begun: a search in C finds where something does
                place = piece.find(text[0], place)
                if place < 0:
                    break
            while length and piece[place] != text[length]:
                length = self._borders[length - 1]
            if piece[place] == text[length]:
                length += 1
            place += 1
            if length > len(self._borders):
                self._extend(length)
            if length == len(text):
                first = first or place
                length = self._borders[length - 1]
        self.length = length
        return first

    def _extend(self, length: int) -> None:
        """Make the borders of the first `length` characters known."""
        text, borders = self.text, self._borders
        while len(borders) < length:
            border = borders[-1]
            while border and text[len(borders)] != text[border]:
                border = borders[border - 1]
            borders.append(border + (text[len(borders)] == text[border]))

"""Sequences from documents: windows of long ones, and rows of several short ones."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator

from specontext.distill.data.documents import Document, Documents
from specontext.distill.data.encoder import Encoder
from specontext.distill.data.held_out import Split
from specontext.distill.data.source import DataError, Row, Sequences, check_size, collate

CACHED_TOKENS = 1 << 25


class DocumentSource:
    """Rows of documents, each document as likely as any other.

    A document that is longer than what is left of a row gives a window of it, at a random place, or for a document with
    marks at one where something is to be said; shorter ones follow one another, separated by the end token, until the
    row is full. No document comes twice in a row, so data too short for a row leaves padding.

    Args:
        name: what the data is called in errors.
        key: names this source among all random streams.
        held_out: draw from the part that is kept from training, else from the rest; see `Split`.

    Raises:
        DataError: the part has fewer than two tokens, or nothing in it is to be said.
    """

    def __init__(self, documents: Documents, encoder: Encoder, *, name: str, key: str, held_out: bool) -> None:
        self.documents, self.encoder, self.name, self.key = documents, encoder, name, key
        self.split = Split(len(documents), documents.running, held_out)
        self._cache: OrderedDict[int, Document] = OrderedDict()
        self._cached = 0
        self._check()

    def draw(self, step: int, length: int, rows: int) -> Sequences:
        check_size(step, length, rows)
        drawn = [self._row(length, random.Random(f"{self.key}/{step}/{length}/{n}")) for n in range(rows)]
        return collate(drawn, length, self.encoder.pad)

    def _row(self, length: int, rng: random.Random) -> Row:
        row = Row()
        for number in shuffled(self.split.count, rng):
            document, first, last = self._part(number)
            if first == last or not self._says(document, first, last):
                continue
            if row.ids and row.ids[-1] != self.encoder.eos and self.encoder.eos is not None:
                row.add([self.encoder.eos], False)
            opening = document.opening if length - len(row) > len(document.opening) else ()
            room = length - len(row) - len(opening)
            if room <= 0:
                break
            row.add(opening, False)
            start = window(document, first, last, room, rng)
            end = min(start + room, last)
            said = True if document.said is None else document.said[start:end].tolist()
            row.add(document.ids[start:end].tolist(), said)
            if len(row) == length:
                break
        return row

    def _part(self, number: int) -> tuple[Document, int, int]:
        """A document of this part of the data, and the bounds of the tokens of it that belong to the part."""
        document = self._load(self.split.number(number))
        return document, *self.split.bounds(len(document))

    def _says(self, document: Document, first: int, last: int) -> bool:
        return document.said is None or bool(document.said[first:last].any())

    def _load(self, number: int) -> Document:
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        document = self._cache[number] = self.documents[number]
        self._cached += len(document)
        while self._cached > CACHED_TOKENS and len(self._cache) > 1:
            self._cached -= len(self._cache.popitem(last=False)[1])
        return document

    def _check(self) -> None:
        """Look at documents, from the first on, until there is enough for one sequence."""
        tokens, said = 0, False
        for number in range(self.split.count):
            document, first, last = self._part(number)
            tokens += last - first
            said = said or (first < last and self._says(document, first, last))
            if tokens >= 2 and said:
                return
        part = "held-out part" if self.split.held_out else "part for training"
        if tokens < 2:
            raise DataError(f"the {part} of {self.name} has {tokens} tokens: give more text")
        raise DataError(f"nothing in the {part} of {self.name} is to be said by the model: give at least two rows with answers")


def window(document: Document, first: int, last: int, room: int, rng: random.Random) -> int:
    """Where a window of `room` tokens of document[first:last] begins; `first` where all fits.

    Any place is as likely as another; in a document with marks, any that holds a token to be said drawn beforehand.
    """
    if last - first <= room:
        return first
    low, high = first, last - room
    if document.said is not None:
        places = document.said[first:last].nonzero().flatten()
        place = first + int(places[rng.randrange(len(places))])
        low, high = max(low, place + 1 - room), min(high, place)
    return rng.randint(low, high)


def shuffled(count: int, rng: random.Random) -> Iterator[int]:
    """The numbers 0 .. count - 1 in random order, at the cost of those that are taken."""
    seen = set[int]()
    while len(seen) < count:
        number = rng.randrange(count)
        if number not in seen:
            seen.add(number)
            yield number

"""Which part of the documents is kept from training."""

from __future__ import annotations

from dataclasses import dataclass

TENTH = 10


@dataclass(frozen=True)
class Split:
    """One of the two disjoint parts of a collection of documents; the same for every seed.

    Of ten or more documents every tenth one is held out. Of fewer files of running text the last tenth of the tokens
    of each is, and so of a single row; of fewer rows the last row.

    Attributes:
        documents: documents of the whole collection.
        running: they are running text, which may be cut anywhere.
        held_out: this is the part that is kept from training, else the rest.
    """

    documents: int
    running: bool
    held_out: bool

    @property
    def by_position(self) -> bool:
        """Documents are divided, so each belongs to both parts."""
        return self.documents < TENTH and (self.running or self.documents == 1)

    @property
    def count(self) -> int:
        """Documents that have tokens in this part."""
        if self.by_position:
            return self.documents
        held_out = max(1, self.documents // TENTH)
        return held_out if self.held_out else self.documents - held_out

    def number(self, index: int) -> int:
        """The number in the whole collection of document `index` of this part."""
        if self.by_position:
            return index
        if self.documents < TENTH:
            return self.documents - 1 if self.held_out else index
        return index * TENTH + TENTH - 1 if self.held_out else index + index // (TENTH - 1)

    def bounds(self, tokens: int) -> tuple[int, int]:
        """First token of this part in a document of so many tokens, and the one after its last."""
        if not self.by_position:
            return 0, tokens
        cut = tokens * (TENTH - 1) // TENTH
        return (cut, tokens) if self.held_out else (0, cut)

"""What a report consists of, before it is HTML or Markdown: sections of parts. All texts are plain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specontext.evaluation.report.statements import Statement


@dataclass(frozen=True)
class Table:
    """Cells are texts; the first `names` columns say what a row is, the others are numbers.

    Attributes:
        emphasis: rows by number that stand out, each with a kind: "worse", "better" or "reference".
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int = 1
    emphasis: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Pictures:
    """SVG texts side by side; Markdown has `words` instead."""

    svgs: tuple[str, ...]
    words: str


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Terms:
    """Terms and what they mean."""

    entries: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Heads:
    """The page of selections; `words` for those who only read."""

    words: str


@dataclass(frozen=True)
class Fold:
    """Parts that are shown when they are asked for."""

    title: str
    parts: tuple[Part, ...]


Part = Statement | Table | Pictures | Code | Terms | Heads | Fold


@dataclass(frozen=True)
class Section:
    """A chapter of a report with a name to link to."""

    name: str
    title: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]


def without_empty(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, keep: int, empty: str
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows without those columns behind the first `keep` that hold nothing."""
    kept = [i for i in range(len(columns)) if i < keep or any(row[i] != empty for row in rows)]
    return [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]

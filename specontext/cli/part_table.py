"""Tables of a report on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from specontext.evaluation.report.parts import Table as Part


def part_table(part: Part, columns: Sequence[str]) -> Table:
    """A table of a report with those of the named columns that it has."""
    made = Table(title=escape(part.title), box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, title_justify="left")
    places = [part.columns.index(name) for name in columns if name in part.columns]
    for place in places:
        left = part.columns[place] == "method"
        made.add_column(part.columns[place].strip(), justify="left" if left else "right", no_wrap=left)
    for row in part.rows:
        made.add_row(*(escape(row[place]) for place in places))
    return made

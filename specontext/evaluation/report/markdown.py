"""A report as Markdown: the same statements and tables; pictures are words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from specontext.evaluation.report.parts import Code, Document, Fold, Heads, Part, Pictures, Table, Terms
from specontext.evaluation.report.statements import Statement

SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~$&])")


def as_markdown(document: Document) -> str:
    """The text of `report.md`."""
    lines = [f"# {plain(document.title)}", "", plain(document.subtitle), ""]
    for section in document.sections:
        lines += [f"## {plain(section.title)}", ""]
        for part in section.parts:
            lines += _part(part)
    return "\n".join(lines).rstrip() + "\n"


def plain(text: str) -> str:
    """A text that Markdown shows as it is, on one line."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _part(part: Part) -> Iterator[str]:
    if isinstance(part, Statement):
        yield from _statement(part)
    elif isinstance(part, Table):
        yield from _table(part)
    elif isinstance(part, Pictures):
        yield from (f"*{plain(part.words)} The pictures are in report.html.*", "")
    elif isinstance(part, Code):
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", part.text)), default=0))
        yield from (fence, part.text, fence, "")
    elif isinstance(part, Terms):
        yield from (f"- **{plain(term)}**: {plain(meaning)}" for term, meaning in part.entries)
        yield ""
    elif isinstance(part, Heads):
        yield from (f"{plain(part.words)} Token by token this can be seen in report.html.", "")
    elif isinstance(part, Fold):
        yield from (f"### {plain(part.title)}", "")
        for inner in part.parts:
            yield from _part(inner)


def _statement(said: Statement) -> Iterator[str]:
    title = f"**{plain(said.title)}.** " if said.title else ""
    yield from (f"{'⚠ ' if said.kind == 'worse' else ''}{title}{plain(said.text)}", "")
    if said.items:
        yield from (f"- {plain(item)}" for item in said.items)
        yield ""


def _table(table: Table) -> Iterator[str]:
    yield from (f"**{plain(table.title)}**", "", _line(map(plain, table.columns)))
    yield _line(":--" if number < table.names else "--:" for number in range(len(table.columns)))
    yield from (_line(map(plain, row)) for row in table.rows)
    yield ""


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"

"""A report as one HTML file that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from specontext import __version__
from specontext.evaluation.report.parts import Code, Document, Heads, Part, Pictures, Section, Table, Terms
from specontext.evaluation.report.statements import Statement

HERE = Path(__file__).parent
LONG = 40  # characters of a cell that is broken into lines


def as_html(document: Document, selections: dict[str, Any] | None = None) -> str:
    """The text of `report.html`.

    Args:
        selections: what the page of selections shows, see `specontext.evaluation.selections`.
    """
    scripts = [_asset("report.js")]
    data = ""
    if selections is not None:
        scripts.append(_asset("heads.js"))
        packed = json.dumps(selections, separators=(",", ":"), ensure_ascii=False)
        for character in "<>&":  # a script element ends at the first `</script`, whatever it holds
            packed = packed.replace(character, f"\\u{ord(character):04x}")
        data = f'<script type="application/json" id="selections">{packed}</script>\n'
    links = "".join(f'<a href="#{section.name}">{_text(section.title)}</a>' for section in document.sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f'<title>{_text(document.title)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>\n{_asset('style.css')}</style>\n</head>\n"
        f'<body>\n<main>\n<header><h1>{_text(document.title)}</h1><p class="soft">{_text(document.subtitle)}</p></header>\n'
        f'<nav aria-label="chapters">{links}</nav>\n'
        + "\n".join(map(_section, document.sections))
        + f'\n<footer class="soft">SpeContext {_text(__version__)}</footer>\n</main>\n'
        + '<div id="tip" role="tooltip" hidden></div>\n'
        + f"{data}<script>\n{''.join(scripts)}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _text(text: str) -> str:
    return escape(text, quote=True)


def _section(section: Section) -> str:
    inner = "\n".join(_part(part) for part in section.parts)
    return f'<section id="{section.name}"><h2>{_text(section.title)}</h2>\n{inner}\n</section>'


def _part(part: Part) -> str:
    if isinstance(part, Statement):
        return _statement(part)
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Pictures):
        return f'<div class="pictures">{"".join(f"<figure>{svg}</figure>" for svg in part.svgs)}</div>'
    if isinstance(part, Code):
        return f'<pre tabindex="0">{_text(part.text)}</pre>'
    if isinstance(part, Terms):
        return f"<dl>{''.join(f'<dt>{_text(term)}</dt><dd>{_text(meaning)}</dd>' for term, meaning in part.entries)}</dl>"
    if isinstance(part, Heads):
        return f"<p>{_text(part.words)}</p>\n{_asset('heads.html')}"
    inner = "\n".join(_part(one) for one in part.parts)
    return f"<details><summary>{_text(part.title)}</summary>\n{inner}\n</details>"


def _statement(said: Statement) -> str:
    items = f"<ul>{''.join(f'<li>{_text(item)}</li>' for item in said.items)}</ul>" if said.items else ""
    title = f"<strong>{_text(said.title)}.</strong> " if said.title else ""
    text = f"<p>{title}{_text(said.text)}</p>{items}"
    return text if said.kind == "plain" else f'<div class="said {said.kind}">{text}</div>'


def _table(table: Table) -> str:
    emphasis = dict(table.emphasis)
    heads = "".join(f'<th scope="col"{_name(n, table)}>{_text(column)}</th>' for n, column in enumerate(table.columns))
    rows = "".join(
        f"<tr{f' class={chr(34)}{emphasis[number]}{chr(34)}' if number in emphasis else ''}>{''.join(_cells(row, table))}</tr>\n"
        for number, row in enumerate(table.rows)
    )
    title = _text(table.title)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title}"><table><caption>{title}</caption>'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
    )


def _cells(row: tuple[str, ...], table: Table) -> Iterator[str]:
    for number, cell in enumerate(row):
        if number == 0:
            yield f'<th scope="row">{_text(cell)}</th>'
        else:
            long = " long" if len(cell) > LONG else ""
            yield f"<td{_name(number, table, long)}>{_text(cell)}</td>"


def _name(number: int, table: Table, more: str = "") -> str:
    """Columns that name things are set to the left."""
    kinds = ("name" if number < table.names else "") + more
    return f' class="{kinds.strip()}"' if kinds else ""

"""A report on disk: `report.html` and `report.md` beside the `results.json` that they are made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from specontext.evaluation.report.html import as_html
from specontext.evaluation.report.markdown import as_markdown
from specontext.evaluation.report.results import ReportError, Results, read_results
from specontext.evaluation.report.sections import document
from specontext.evaluation.selections import FILE as SELECTIONS
from specontext.evaluation.selections import is_record

RESULTS = "results.json"


def write_report(directory: str | Path) -> list[Path]:
    """Write `report.html` and `report.md` of an evaluation, over older ones.

    Args:
        directory: holds `results.json`, `selections.json` (see `specontext.evaluation.selections`) or both.

    Returns:
        The two files.

    Raises:
        ReportError: nothing to report on, files that are damaged, or a directory that cannot be written.
    """
    folder = Path(directory)
    results = _read(folder)
    made = document(results)
    texts = {"report.html": as_html(made, results.selections), "report.md": as_markdown(made)}
    try:
        for name, text in texts.items():
            draft = folder / f".{name}"
            draft.write_text(text, encoding="utf-8")
            draft.replace(folder / name)
    except OSError as error:
        raise ReportError(f"the report cannot be written to {folder}: {error.strerror or error}") from error
    return [folder / name for name in texts]


def _read(folder: Path) -> Results:
    results, selections = _json(folder / RESULTS), _json(folder / SELECTIONS)
    if selections is not None and not is_record(selections):
        raise ReportError(f"{folder / SELECTIONS} is not a record of selections of this version: record it again")
    if results is None and selections is None:
        raise ReportError(
            f"there is no {RESULTS} in {folder}: name the directory of an evaluation, the DIR of `specontext eval ... -o DIR`"
        )
    if results is None:
        assert selections is not None
        return Results({"model": selections["model"], "head": selections["head"]}, selections=selections)
    return read_results(results, selections)


def _json(file: Path) -> Any:
    """The content of a file, None where there is none."""
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(
            f"{file} cannot be read ({error}): mend it, or run the command that wrote it into another directory"
        ) from error

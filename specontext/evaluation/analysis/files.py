"""An analysis on disk: `analysis.json` and its plots, whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

from specontext.evaluation.analysis.plots import PLOTS, draw_plots
from specontext.evaluation.analysis.settings import AnalysisError

FILE = "analysis.json"


def check_folder(folder: str | Path) -> None:
    """Raises AnalysisError, before anything is measured, for a folder that cannot be written."""
    draft = _draft(Path(folder).absolute())
    shutil.rmtree(draft)


def write_analysis(report: dict[str, Any], folder: str | Path) -> list[Path]:
    """Write report and plots to `folder`, over those of an older analysis.

    Everything is made in a temporary directory beside it and moved when it is complete, `analysis.json` last.

    Returns:
        the files, `analysis.json` first.

    Raises:
        AnalysisError: the folder cannot be written.
        PlotError: matplotlib is missing.
    """
    folder = Path(folder)
    place = folder.absolute()
    draft = _draft(place)
    try:
        plots = [plot.name for plot in draw_plots(report, draft)]
        (draft / FILE).write_text(as_json(report), encoding="utf-8")
        place.mkdir(parents=True, exist_ok=True)
        (place / FILE).unlink(missing_ok=True)
        for name in PLOTS:
            if name in plots:
                (draft / name).replace(place / name)
            else:
                (place / name).unlink(missing_ok=True)  # an older analysis had it
        (draft / FILE).replace(place / FILE)
    except OSError as error:
        raise AnalysisError(f"the analysis cannot be written to {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return [folder / name for name in (FILE, *plots)]


def _draft(place: Path) -> Path:
    """A fresh directory beside `place`, on the same disk."""
    draft = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
    try:
        if place.exists() and not place.is_dir():
            raise AnalysisError(f"{place.name} is a file: name a directory for the analysis")
        draft.mkdir(parents=True)
    except OSError as error:
        raise AnalysisError(f"the analysis cannot be written to {place}: {error.strerror or error}") from error
    return draft


def as_json(report: dict[str, Any]) -> str:
    """The report, with one line for each row and for each list of numbers."""
    rows = ",\n  ".join(json.dumps(row) for row in report["rows"])
    head = json.dumps({name: value for name, value in report.items() if name != "rows"}, indent=1)
    head = re.sub(r"\[\n[\s\d,]+\]", lambda numbers: json.dumps(json.loads(numbers[0])), head)
    return head.removesuffix("\n}") + f',\n "rows": [\n  {rows}\n ]\n}}\n'

"""`results.json`: what was run, with what, and a row for each cell; replaced as a whole, so it can be read at any time."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from specontext import __version__
from specontext.errors import shown
from specontext.evaluation.rows import Row
from specontext.evaluation.samples import EvaluationError

FILE = "results.json"
# Entries of `meta` that a run which goes on takes over, and what they are.
READ_AGAIN: dict[str, Callable[[Any], bool]] = {
    "settings": lambda value: isinstance(value, dict),
    "suite": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "notes": lambda value: isinstance(value, list) and all(isinstance(note, dict) and "why" in note for note in value),
    "heads": lambda value: isinstance(value, dict) and all(isinstance(found, str) for found in value.values()),
    "command": lambda value: value is None or isinstance(value, str),
}


def read_meta(folder: Path) -> dict[str, Any] | None:
    """What an earlier run has written about itself; None where there was none.

    Raises:
        EvaluationError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))["meta"]
        for name, fits in READ_AGAIN.items():
            if name in meta and not fits(meta[name]):
                raise ValueError(f"its {name} is {shown(meta[name])}")
        return dict(meta)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise EvaluationError(f"{path} cannot be read ({error}): mend it or choose another directory") from error


def write_results(folder: Path, meta: dict[str, Any], rows: Sequence[Row], pairs: Sequence[Row]) -> None:
    """Write everything, one row on a line.

    Raises:
        EvaluationError: the directory cannot be written.
    """
    head = json.dumps({"meta": meta}, indent=1, ensure_ascii=False).removesuffix("\n}")
    lists = (f' "{name}": [\n  {_lines(some)}\n ]' for name, some in (("rows", rows), ("pairs", pairs)))
    draft = folder / f".{FILE}"
    try:
        draft.write_text(f"{head},\n" + ",\n".join(lists) + "\n}\n", encoding="utf-8")
        os.replace(draft, folder / FILE)
    except OSError as error:
        raise EvaluationError(f"{folder / FILE} cannot be written: {error.strerror or error}") from error


def _lines(rows: Sequence[Row]) -> str:
    return ",\n  ".join(json.dumps(row) for row in rows)


def environment(device: torch.device) -> dict[str, Any]:
    """Date, machine and versions, for `meta`."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{torch.get_num_threads()} CPU threads, {platform.machine()}"
    versions = {"specontext": __version__, "python": platform.python_version()}
    versions |= {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"date": datetime.now(UTC).date().isoformat(), "machine": machine, "versions": versions}

"""What has been measured of a part so far, kept as it comes: who goes on after a kill measures only what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from specontext.errors import SpeContextError

Value = TypeVar("Value")
FILE = "progress.json"


class PaperError(SpeContextError):
    """A part that is not there, or results that cannot be kept."""


class Progress:
    """Numbers and rows by name, in a file.

    Args:
        folder: where the file is; None keeps nothing beyond this object.
        about: settings and card; what was measured with others does not count.

    Raises:
        PaperError: when it is to be written and cannot be.
    """

    def __init__(self, folder: Path | None = None, about: dict[str, Any] | None = None) -> None:
        self._file, self._about = None if folder is None else folder / FILE, about or {}
        self._found: dict[str, Any] = {}
        self._part = ""
        if self._file is not None:
            try:
                kept = json.loads(self._file.read_text())
                self._found = kept["found"] if kept["about"] == self._about else {}
            except (OSError, ValueError, KeyError, TypeError):
                self._found = {}

    def begin(self, part: str) -> int:
        """What follows is of this part; how much of it is there."""
        self._part = part
        return sum(name.startswith(f"{part}: ") for name in self._found)

    def end(self) -> None:
        """The part is kept elsewhere now."""
        self._found = {name: value for name, value in self._found.items() if not name.startswith(f"{self._part}: ")}
        self._write()

    def once(self, name: str, measure: Callable[[], Value], *, shared: bool = False) -> Value:
        """What was measured under a name, else what is measured now, which is kept unless it failed.

        Args:
            shared: other parts may use it, too: a number that was searched for, and none that rows are made of.
        """
        name = name if shared else f"{self._part}: {name}"
        if name in self._found:
            kept: Value = self._found[name]
            return kept
        value = measure()
        if not (isinstance(value, dict) and value.get("failed")):
            self._found[name] = value
            self._write()
        return value

    def _write(self) -> None:
        if self._file is not None and not self._found:
            self._file.unlink(missing_ok=True)
        elif self._file is not None:
            write_json(self._file, {"about": self._about, "found": self._found})


def write_json(file: Path, value: object) -> None:
    """Write an object, whole or not at all; raises PaperError where the folder takes none."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".part")
        draft.write_text(json.dumps(value, indent=1))
        draft.replace(file)
    except OSError as error:
        raise PaperError(f"the results cannot be kept in {file.parent}: {error.strerror or error}") from error

"""What has been measured of a part so far, kept as it comes: who goes on after a kill measures only what is missing."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from specontext.errors import SpeContextError

Value = TypeVar("Value")
SUFFIX = ".progress"


class PaperError(SpeContextError):
    """A part that is not there, or results that cannot be kept."""


class Progress:
    """Numbers and rows by name, in a file beside where the part's result will be: parts may run at the same time.

    Args:
        folder: where the files are; None keeps nothing beyond this object.
        about: settings and card; what was measured with others does not count.
        say: is told what was measured, and how long that took.

    Attributes:
        searched: numbers that parts have searched for already.
        own: those of them that this part has searched for.

    Raises:
        PaperError: when a file is to be written and cannot be.
    """

    def __init__(
        self, folder: Path | None = None, about: dict[str, Any] | None = None, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self._folder, self._about, self._say = folder, about or {}, say
        self.searched: dict[str, Any] = {}
        self._file: Path | None = None
        self._found: dict[str, Any] = {}
        self.own: dict[str, Any] = {}
        for file in sorted(folder.glob("*.json")) if folder is not None else []:
            self.searched |= self._kept(file, "searched")

    def _kept(self, file: Path, name: str) -> dict[str, Any]:
        try:
            kept = json.loads(file.read_text())
            same = all(kept.get(key) == value for key, value in self._about.items())
            return dict(kept.get(name, {})) if same else {}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def begin(self, file_name: str) -> int:
        """What follows is of the part with this file; how much of it is there."""
        self._file = None if self._folder is None else (self._folder / file_name).with_suffix(SUFFIX)
        self._found = {} if self._file is None else self._kept(self._file, "found")
        self.own = {} if self._file is None else self._kept(self._file, "searched")
        self.searched |= self.own
        return len(self._found)

    def end(self) -> None:
        """The part is kept elsewhere now."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def once(self, name: str, measure: Callable[[], Value]) -> Value:
        """What the part has measured under a name already, else what it measures now, which is kept unless it failed."""
        if name in self._found:
            kept: Value = self._found[name]
            return kept
        value = self._timed(name, measure)
        if not (isinstance(value, dict) and value.get("failed")):
            self._found[name] = value
            self._write()
        return value

    def search(self, name: str, find: Callable[[], Value]) -> Value:
        """A number that this part or another has searched for, else what is found now; rows are never made of it."""
        if name not in self.searched:
            self.searched[name] = self.own[name] = self._timed(name, find)
            self._write()
        found: Value = self.searched[name]
        return found

    def _timed(self, name: str, measure: Callable[[], Value]) -> Value:
        began = time.perf_counter()
        value = measure()
        self._say(f"  {name}: {time.perf_counter() - began:.1f} s")
        return value

    def _write(self) -> None:
        if self._file is not None:
            write_json(self._file, self._about | {"found": self._found, "searched": self.own})


def check_folder(folder: Path) -> None:
    """Make the folder of the results; raises PaperError where it takes none, which is to be known before they are measured."""
    with _kept_in(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


@contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PaperError(f"the results cannot be kept in {folder}: {error.strerror or error}") from error


def write_json(file: Path, value: object) -> None:
    """Write an object, whole or not at all, whoever else writes; raises PaperError where the folder takes none."""
    draft = None
    with _kept_in(file.parent):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".part", delete=False) as stream:
                draft = Path(stream.name)
                json.dump(value, stream, indent=1)
            draft.chmod(0o644)
            draft.replace(file)
        except OSError:
            if draft is not None:
                with suppress(OSError):
                    draft.unlink(missing_ok=True)
            raise

"""Rows of public data sets: JSONL and Parquet files, as they are or in a zip archive, and data sets of the Hugging Face Hub.

Here lives reading and checking of fields; what a row means to a suite does not.
"""

from __future__ import annotations

import importlib
import io
import json
import random
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from specontext.checkpoints.files import user_path
from specontext.distill.data.jsonl import EACH_ROW, read_line
from specontext.errors import HubError, SpeContextError
from specontext.hub import fetch_file, load_split
from specontext.installing import install_command

SUFFIXES = (".jsonl", ".ndjson", ".parquet")
LISTED = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"  # for messages
INSTALL = install_command("eval")
_HUB_NAME = re.compile(r"(?:hf:)?(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<subset>[\w.-]+))?(?::(?P<split>[^/]+))?")
_HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair; JSON can write one, UTF-8 cannot


class DataFileError(SpeContextError, ValueError):
    """Data that cannot be read or is not in the expected form; the message names file, line and field."""


@dataclass(frozen=True)
class Row:
    """One record of a data set.

    Attributes:
        where: place of the record in words, for error messages.
    """

    fields: Mapping[str, Any]
    where: str

    def text(self, *names: str, empty: bool = False) -> str:
        """The text in the first of these fields that the record has.

        Raises:
            DataFileError: none of them is there, it holds no text, or it is blank and `empty` is not given.
        """
        value = self._first(names)
        if not isinstance(value, str):
            raise self.error(f"field '{self._name(names)}' must be a text, not {_shown(value)}")
        if not (empty or value.strip()):
            raise self.error(f"field '{self._name(names)}' is empty")
        return value

    def number(self, name: str) -> int:
        """The whole number in a field.

        Raises:
            DataFileError: there is no such field, or it holds something else.
        """
        value = self._first((name,))
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"field '{name}' must be a whole number, not {_shown(value)}")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """The texts in a field that holds a list of at least one.

        Raises:
            DataFileError: there is no such field, or it holds something else.
        """
        value = self._first((name,))
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise self.error(f"field '{name}' must be a list of texts, not {_shown(value)}")
        if wrong := [item for item in value if not isinstance(item, str)]:
            raise self.error(f"field '{name}' must hold texts only, not {_shown(wrong[0])}")
        return tuple(value)

    def has(self, *names: str) -> bool:
        """Whether one of these fields is there and not null."""
        return any(self.fields.get(name) is not None for name in names)

    def error(self, message: str) -> DataFileError:
        return DataFileError(f"{self.where}: {message}")

    def _name(self, names: Sequence[str]) -> str:
        return next((name for name in names if name in self.fields), names[0])

    def _first(self, names: Sequence[str]) -> Any:
        for name in names:
            if name in self.fields:
                return self.fields[name]
        wanted = " or ".join(f"'{name}'" for name in names)
        raise self.error(f"there is no field {wanted}; the fields are {', '.join(self.fields) or 'none'}")


class RowSource(Protocol):
    """Where rows come from."""

    def rows(self) -> list[Row]:
        """All rows.

        Raises:
            DataFileError: they cannot be read, or there are none.
        """
        ...


@dataclass(frozen=True)
class DataFile:
    """A `.jsonl` or `.parquet` file.

    Attributes:
        member: its name inside the zip archive `path`; None where `path` is the file itself.
    """

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    @property
    def place(self) -> Path:
        """The path by which its name, kind and folders are told."""
        return Path(self.member) if self.member else self.path

    def rows(self) -> list[Row]:
        """All rows; blank lines of a JSONL file are passed over.

        Raises:
            DataFileError: the file cannot be read, a line is no JSON object, or there are no rows.
        """
        rows = list(self._parquet() if self.place.suffix.lower() == ".parquet" else self._json_lines())
        if not rows:
            raise DataFileError(f"{self} has no rows")
        return rows

    def _content(self) -> bytes:
        try:
            if self.member is None:
                return self.path.read_bytes()
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(self.member)
        except Exception as error:  # each method of compression has errors of its own
            raise DataFileError(f"cannot read {self}: {error or type(error).__name__}") from error

    def _json_lines(self) -> Iterator[Row]:
        for number, line in enumerate(self._content().split(b"\n"), 1):
            if not line.strip():
                continue
            where = f"line {number} of {self}"
            fields = read_line(line, where, DataFileError)
            if not isinstance(fields, dict):
                raise DataFileError(f"{where} must be a JSON object, not {_shown(fields)}; {EACH_ROW}")
            if half := _HALF.search(json.dumps(fields, ensure_ascii=False)):
                raise DataFileError(f"{where} has half of a character (\\u{ord(half[0]):04x}): mend or remove the line")
            yield Row(fields, where)

    def _parquet(self) -> Iterator[Row]:
        try:
            parquet = importlib.import_module("pyarrow.parquet")
        except ImportError as error:
            raise DataFileError(f"{self} needs the package pyarrow: {INSTALL}") from error
        try:
            records = parquet.read_table(io.BytesIO(self._content())).to_pylist()
        except Exception as error:  # pyarrow has many kinds
            if isinstance(error, DataFileError):
                raise
            raise DataFileError(f"cannot read {self}: {error}") from error
        for number, record in enumerate(records, 1):
            yield Row(record, f"row {number} of {self}")


@dataclass(frozen=True)
class HubData:
    """One split of a data set of the Hugging Face Hub, read by the optional package `datasets`."""

    name: str
    subset: str | None
    split: str

    def __str__(self) -> str:
        return f"{self.name}{f'/{self.subset}' if self.subset else ''}:{self.split}"

    def rows(self) -> list[Row]:
        """All rows.

        Raises:
            DataFileError: `datasets` is not installed, or the data set cannot be loaded or has no rows.
        """
        try:
            records = load_split(self.name, self.subset, self.split, extra="eval")
        except HubError as error:
            raise DataFileError(f"cannot load {self} from the Hub (and no file of that name is here): {error}") from error
        rows = [Row(record, f"row {number} of {self}") for number, record in enumerate(records, 1)]
        if not rows:
            raise DataFileError(f"{self} has no rows")
        return rows


@dataclass(frozen=True)
class HubArchive:
    """One data file in a zip archive that a data set of the Hub keeps.

    Attributes:
        stem: of the data file.
    """

    name: str
    archive: str
    stem: str

    def __str__(self) -> str:
        return f"{self.name}/{self.archive}:{self.stem}"

    def rows(self) -> list[Row]:
        """All rows; the archive is downloaded unless it is here.

        Raises:
            DataFileError: it cannot be had, or has no such file.
        """
        try:
            path = fetch_file(self.name, self.archive)
        except HubError as error:
            raise DataFileError(f"cannot download {self.archive} of the Hub's {self.name}: {error}") from error
        found = [file for file in data_files(path) if file.place.stem == self.stem]
        if len(found) != 1:
            raise DataFileError(f"{path} has {len(found)} files called {self.stem}, there must be one")
        return found[0].rows()


@dataclass(frozen=True)
class HubName:
    """A data set of the Hub, with subset and split where the user gave them: `[hf:]organisation/name[/subset][:split]`."""

    name: str
    subset: str | None
    split: str | None


def locate(data: str) -> Path | HubName:
    """A path if it exists, else the name of a data set of the Hub.

    Raises:
        DataFileError: neither.
    """
    path = user_path(data, DataFileError)
    if path.exists():
        return path
    match = _HUB_NAME.fullmatch(data)
    if not match or data.startswith(".") or path.suffix.lower() in (*SUFFIXES, ".zip"):
        raise DataFileError(f"no file or directory at {data}; data of the Hub is written organisation/name[/subset][:split]")
    return HubName(match["name"], match["subset"], match["split"])


def data_files(path: Path) -> list[DataFile]:
    """The JSONL and Parquet files at a path: a file, a zip archive, or a directory with any of these at any depth.

    Raises:
        DataFileError: there are none, or an archive cannot be read.
    """
    if path.is_dir():
        paths = sorted(found for found in path.rglob("*") if found.is_file() and found.suffix.lower() in (*SUFFIXES, ".zip"))
    elif path.suffix.lower() in (*SUFFIXES, ".zip"):
        paths = [path]
    else:
        raise DataFileError(f"{path} is no data file: expected one that ends in {', '.join(SUFFIXES)} or .zip, or a directory")
    files: list[DataFile] = []
    for found in paths:
        files += _members(found) if found.suffix.lower() == ".zip" else [DataFile(found)]
    if not files and (path / f"{path.name}.py").is_file():
        raise DataFileError(f"{path} is kept as a loading script ({path.name}.py), which is not run: give rows as {LISTED} files")
    if not files:
        raise DataFileError(f"there is no {LISTED} file in {path}")
    return files


def _members(path: Path) -> list[DataFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(archive.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        raise DataFileError(f"cannot read {path}: {error}") from error
    return [DataFile(path, name) for name in names if Path(name).suffix.lower() in SUFFIXES and "__MACOSX" not in name]


def draw(rows: Sequence[Row], n: int, seed: int) -> list[tuple[int, Row]]:
    """The first `n` rows, with their numbers, of an order drawn from the seed: a larger `n` only adds rows."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return [(number, rows[number]) for number in order[:n]]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."

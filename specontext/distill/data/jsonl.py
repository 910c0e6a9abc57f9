"""JSONL files as collections of documents."""

from __future__ import annotations

import json
from array import array
from pathlib import Path

from specontext.distill.data.documents import Document
from specontext.distill.data.encoder import Encoder
from specontext.distill.data.rows import document
from specontext.distill.data.source import DataError
from specontext.errors import SpeContextError

EACH_ROW = "each row must be an object in a line of its own"


class JsonLines:
    """Every line that is not blank is one row; what is kept of the file is where its lines begin.

    Raises:
        DataError: the file cannot be read, or has no rows.
    """

    running = False

    def __init__(self, path: Path, encoder: Encoder) -> None:
        self.path, self.encoder = path, encoder
        self._offsets, self._lines = array("Q"), array("Q")
        offset = 0
        try:
            with path.open("rb") as file:
                for line, text in enumerate(file, 1):
                    if text.strip():
                        self._offsets.append(offset)
                        self._lines.append(line)
                    offset += len(text)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error
        if not self._offsets:
            raise DataError(f"{path} has no rows")

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, number: int) -> Document:
        """Read and encode one row.

        Raises:
            DataError: it is no JSON, or a row of an unknown form; the message names the line.
        """
        where = f"line {self._lines[number]} of {self.path}"
        try:
            with self.path.open("rb") as file:
                file.seek(self._offsets[number])
                line = file.readline()
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror or error}") from error
        return document(read_line(line, where, DataError), self.encoder, where)


def read_line(line: bytes, where: str, failure: type[SpeContextError]) -> object:
    """What a line holds, which should be a row.

    Args:
        where: names the line in errors.

    Raises:
        failure: it is no JSON, or no UTF-8 text.
    """
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise failure(f"{where} is not UTF-8 text: byte {error.start} cannot be decoded; convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:  # of JSON, and of what is nested too deeply
        raise failure(f"{where} is no JSON: {error}; {EACH_ROW}") from error

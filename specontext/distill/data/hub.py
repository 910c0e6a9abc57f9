"""Data sets of the Hugging Face Hub and Parquet files as collections of documents, by the optional package `datasets`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from specontext.distill.data.documents import Document
from specontext.distill.data.encoder import Encoder
from specontext.distill.data.rows import document
from specontext.distill.data.source import DataError
from specontext.errors import HubError
from specontext.hub import load_parquet, load_split

FORM = "hf:ORGANISATION/NAME, hf:ORGANISATION/NAME:SPLIT or hf:ORGANISATION/NAME:SPLIT:FIELD (NAME/SUBSET for one with subsets)"


class TableRows:
    """The rows of a table of `datasets`, read from the copy on disk that it keeps.

    Rows have the forms that JSONL rows have, or with a field its value is taken: a text, or a list of messages.

    Raises:
        DataError: no rows, or no such field.
    """

    running = False

    def __init__(self, where: str, table: Any, encoder: Encoder, field: str | None = None) -> None:
        self.where, self.rows, self.encoder, self.field = where, table, encoder, field
        if not len(table):
            raise DataError(f"{where} has no rows")
        if field is not None and field not in table.column_names:
            raise DataError(f"{where} has no field '{field}': its fields are {', '.join(table.column_names)}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Document:
        """Read and encode one row.

        Raises:
            DataError: a row of an unknown form; the message names it.
        """
        row, where = self.rows[number], f"row {number} of {self.where}"
        if self.field is not None:
            value = row[self.field]
            row = {"messages" if isinstance(value, list) else "text": value}
        return document(row, self.encoder, where)


def hub_rows(spec: str, encoder: Encoder) -> TableRows:
    """The rows of one split of a data set of the Hub, which is downloaded whole.

    Args:
        spec: `hf:org/name`, `hf:org/name:split` or `hf:org/name:split:field`, the name with a third part `/subset` where the data
            set has several; the split is `train` where none is given.

    Raises:
        DataError: `datasets` is not installed, the data set cannot be loaded, or has no rows or no such field.
    """
    name, split, field = parse(spec)
    parts = name.split("/")
    try:
        table = load_split("/".join(parts[:2]), parts[2] if len(parts) > 2 else None, split, extra="datasets")
    except HubError as error:
        raise DataError(f"cannot load {spec}: {error}") from error
    return TableRows(spec, table, encoder, field)


def parquet_rows(path: Path, encoder: Encoder) -> TableRows:
    """The rows of a Parquet file.

    Raises:
        DataError: `datasets` is not installed, or the file cannot be read or has no rows.
    """
    try:
        table = load_parquet(path, extra="datasets")
    except HubError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return TableRows(str(path), table, encoder)


def parse(spec: str) -> tuple[str, str, str | None]:
    """Name, split and field of a spec; colons in brackets belong to the split, as in `train[:10%]`.

    Raises:
        DataError: a spec of another form.
    """
    name, *rest = re.split(r":(?![^\[]*\])", spec.removeprefix("hf:"))
    if not all(name.split("/")) or name.count("/") > 2 or len(rest) > 2 or not all(rest):
        raise DataError(f"cannot read '{spec}': write {FORM}")
    return name, rest[0] if rest else "train", rest[1] if len(rest) > 1 else None

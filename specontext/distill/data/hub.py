"""Data sets of the Hugging Face Hub as collections of documents, by the optional package `datasets`."""

from __future__ import annotations

import re
from typing import Any

from specontext.distill.data.documents import Document
from specontext.distill.data.encoder import Encoder
from specontext.distill.data.rows import document
from specontext.distill.data.source import DataError

FORM = "hf:ORGANISATION/NAME, hf:ORGANISATION/NAME:SPLIT or hf:ORGANISATION/NAME:SPLIT:FIELD (NAME/SUBSET for one with subsets)"


class HubRows:
    """The rows of one split, read from the copy on disk that `datasets` keeps.

    Args:
        spec: `hf:org/name`, `hf:org/name:split` or `hf:org/name:split:field`, the name with a third part `/subset` where the data
            set has several; the split is `train` where none is given. Rows have the forms that JSONL rows have, or with a
            field its value is taken: a text, or a list of messages.

    Raises:
        DataError: `datasets` is not installed, the data set cannot be loaded, or has no rows or no such field.
    """

    running = False

    def __init__(self, spec: str, encoder: Encoder) -> None:
        self.spec, self.encoder = spec, encoder
        name, split, self.field = parse(spec)
        try:
            import datasets
        except ImportError as error:
            raise DataError(f'{spec} needs the package datasets: pip install "specontext[datasets]"') from error
        organisation_name = name.split("/")
        try:
            loaded: Any = datasets.load_dataset("/".join(organisation_name[:2]), *organisation_name[2:], split=split)
        except Exception as error:  # the library and what it calls raise many kinds
            raise DataError(f"cannot load {spec}: {error}") from error
        self.rows = loaded
        if not len(loaded):
            raise DataError(f"{spec} has no rows")
        if self.field is not None and self.field not in loaded.column_names:
            raise DataError(f"{spec} has no field '{self.field}': its fields are {', '.join(loaded.column_names)}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Document:
        """Read and encode one row.

        Raises:
            DataError: a row of an unknown form; the message names it.
        """
        row, where = self.rows[number], f"row {number} of {self.spec}"
        if self.field is not None:
            value = row[self.field]
            row = {"messages" if isinstance(value, list) else "text": value}
        return document(row, self.encoder, where)


def parse(spec: str) -> tuple[str, str, str | None]:
    """Name, split and field of a spec; colons in brackets belong to the split, as in `train[:10%]`.

    Raises:
        DataError: a spec of another form.
    """
    name, *rest = re.split(r":(?![^\[]*\])", spec.removeprefix("hf:"))
    if not all(name.split("/")) or name.count("/") > 2 or len(rest) > 2 or not all(rest):
        raise DataError(f"cannot read '{spec}': write {FORM}")
    return name, rest[0] if rest else "train", rest[1] if len(rest) > 1 else None

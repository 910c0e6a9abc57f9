"""Documents, and collections of them that are read one by one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from specontext.distill.data.encoder import Encoder, UnknownTokenError
from specontext.distill.data.source import DataError


@dataclass(frozen=True)
class Document:
    """The tokens of one document.

    Attributes:
        ids: int32 [T], without `opening`.
        said: bool [T], tokens that the model has to say; None: all.
        opening: tokens to put before the document and before any window of it.
    """

    ids: Tensor
    said: Tensor | None
    opening: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


class Documents(Protocol):
    """A collection of documents that is no more than an index until one is asked for.

    Attributes:
        running: whether documents are running text, which may be cut anywhere.
    """

    running: bool

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Document: ...


class TextFiles:
    """Every file is one document: running text, all of which the model has to say, and its end."""

    running = True

    def __init__(self, paths: Sequence[Path], encoder: Encoder) -> None:
        self.paths, self.encoder = tuple(paths), encoder

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Document:
        """Read and encode one file.

        Raises:
            DataError: it cannot be read, is no UTF-8 text, or has a token that the model cannot read.
        """
        path = self.paths[number]
        try:
            return plain(path.read_text(encoding="utf-8-sig"), self.encoder)
        except UnknownTokenError as error:
            raise DataError(f"{path}: {error}") from error
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is no UTF-8 text (byte {error.start}): convert it, or give another file") from error


class Joined:
    """Several collections as one, in their order."""

    def __init__(self, parts: Sequence[Documents]) -> None:
        self.parts = tuple(parts)
        self.running = all(part.running for part in parts)
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> Document:
        part = bisect_right(self._ends, number)
        return self.parts[part][number - (self._ends[part - 1] if part else 0)]


def plain(text: str, encoder: Encoder) -> Document:
    """Running text as a document that ends with the tokenizer's end token; an empty text has no tokens."""
    ids = encoder.ids(text)
    if ids and encoder.eos is not None and ids[-1] != encoder.eos:
        ids.append(encoder.eos)
    return Document(torch.tensor(ids, dtype=torch.int32), None, encoder.opening)


def marked(ids: Sequence[int], said: Sequence[bool], opening: tuple[int, ...]) -> Document:
    """Marked tokens as a document; where they begin with `opening`, that is taken off, else the document has none."""
    skipped = len(opening) if tuple(ids[: len(opening)]) == opening else 0
    return Document(
        torch.tensor(ids[skipped:], dtype=torch.int32), torch.tensor(said[skipped:], dtype=torch.bool), tuple(ids[:skipped])
    )

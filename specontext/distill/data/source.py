"""What a source of training sequences is, and the batch that it draws.

Shapes: N sequences, S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from specontext.errors import SpeContextError


class DataError(SpeContextError, ValueError):
    """Training data that cannot be found, read or used; the message says where and what would work."""


@dataclass(frozen=True)
class Sequences:
    """Token sequences, padded at the end only.

    Attributes:
        ids: int64 [N, S].
        lengths: int64 [N], real tokens of each sequence.
        wanted: bool [N, S], positions whose next token the model has to say: there queries are taken. The last real
            position of a sequence and its padding are never wanted.
    """

    ids: Tensor
    lengths: Tensor
    wanted: Tensor

    def __post_init__(self) -> None:
        assert self.ids.dim() == 2 and self.ids.shape == self.wanted.shape and self.lengths.shape == (len(self.ids),)


class Source(Protocol):
    """Where sequences come from."""

    def draw(self, step: int, length: int, rows: int) -> Sequences:
        """Sequences [rows, length] of one training step.

        A pure function: the same source, opened with the same seed, gives the same batch for the same arguments, whatever
        was drawn before, so a stopped training continues exactly.

        Raises:
            DataError: data that cannot be read, or a length that cannot hold it.
        """
        ...


@dataclass
class Row:
    """One sequence while it is put together.

    Attributes:
        said: for every token whether the model has to say it.
    """

    ids: list[int] = field(default_factory=list)
    said: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, ids: Sequence[int], said: bool | Sequence[bool]) -> None:
        self.ids += ids
        self.said += [said] * len(ids) if isinstance(said, bool) else said
        assert len(self.ids) == len(self.said)


def collate(rows: Sequence[Row], length: int, pad: int) -> Sequences:
    """Rows of at most `length` tokens as one batch [rows, length], filled up with the token `pad`."""
    ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    wanted = torch.zeros((len(rows), length), dtype=torch.bool)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = torch.tensor(row.ids, dtype=torch.int64)
        if len(row) > 1:
            wanted[n, : len(row) - 1] = torch.tensor(row.said[1:])
    return Sequences(ids, torch.tensor([len(row) for row in rows]), wanted)


def check_size(step: int, length: int, rows: int) -> None:
    """Refuse arguments of `Source.draw` that no batch can have.

    Raises:
        DataError: a negative step, sequences of fewer than two tokens, or no rows.
    """
    if step < 0 or length < 2 or rows < 1:
        raise DataError(f"cannot draw {rows} sequences of {length} tokens for step {step}: ask for 1 or more, of 2 or more")

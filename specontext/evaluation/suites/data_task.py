"""What the tasks with data of their own share: rows read once, drawn from a seed, and fitted to the model's length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

from specontext.evaluation.suites.data_files import Row, RowSource, draw
from specontext.evaluation.suites.example import Example, TextTools
from specontext.tasks import LengthError

SPARE_TOKENS = 8  # special tokens, and what a cut text may grow by when it is encoded again


@dataclass(frozen=True)
class DataTask(ABC):
    """A task whose problems are the rows of files or of a data set of the Hub.

    Attributes:
        sources: where the rows come from, one after another.
        max_length: longest context of the model in tokens, prompt and answer together; None is no bound.
    """

    suite: str
    name: str
    sources: tuple[RowSource, ...]
    max_length: int | None

    def examples(self, *, length: int | None, n: int, seed: int, text: TextTools) -> list[Example]:
        """The first `n` problems in an order drawn from `seed`; fewer where the data has fewer.

        Args:
            length: tokens that prompt and answer may take together, besides the model's own bound.

        Raises:
            DataFileError: the data cannot be read or is not in the expected form.
            LengthError: a problem does not fit.
        """
        bounds = [bound for bound in (length, self.max_length) if bound is not None]
        room = min(bounds) - SPARE_TOKENS if bounds else None
        return [self.ask(str(number), row, length, room, text) for number, row in draw(self.rows, n, seed)]

    @cached_property
    def rows(self) -> list[Row]:
        """All rows, checked."""
        rows = [row for source in self.sources for row in source.rows()]
        for row in rows:
            self.check(row)
        return rows

    @abstractmethod
    def check(self, row: Row) -> None:
        """Raises DataFileError for a row that is not in the expected form."""

    @abstractmethod
    def ask(self, key: str, row: Row, length: int | None, room: int | None, text: TextTools) -> Example:
        """One problem; prompt and answer have `room` tokens together, None is no bound."""

    @abstractmethod
    def score(self, example: Example, output: str) -> dict[str, float]: ...


def answer_tokens(row: Row, prompt: str, most: int, length: int | None, room: int | None, text: TextTools) -> int:
    """Tokens that are left for an answer of at most `most`; 1 for a prompt that is too long for the model, which shows there.

    Raises:
        LengthError: a length was asked for in which the prompt has no room.
    """
    if room is None:
        return most
    left = room - text.count_tokens(prompt)
    if left < 1 and length is not None:
        raise LengthError(f"{row.where} has no room for an answer: its prompt needs {room - left} of {room} tokens")
    return max(1, min(most, left))

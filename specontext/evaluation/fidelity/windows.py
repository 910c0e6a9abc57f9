"""Windows of text: what the model is given, and where in the last part of it distributions are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specontext.distill.data import DataError, Source, open_sources
from specontext.distill.data.documents import Documents
from specontext.distill.data.encoder import Encoder
from specontext.distill.data.specs import open_documents
from specontext.evaluation.analysis.settings import shown
from specontext.evaluation.analysis.texts import FILLED

DRAWS = 24  # generated texts that are looked at for each one that is wanted


class ShortTextError(DataError):
    """A text that cannot fill a window of some length, or has nothing in it to compare."""


@dataclass(frozen=True)
class Window:
    """Tokens of a text.

    Attributes:
        key: names the window among those of its length.
        wanted: for each of the last tokens, whether the model has to say it; one at least is. There distributions are compared.
    """

    key: str
    token_ids: list[int]
    wanted: list[bool]

    @property
    def prompt(self) -> list[int]:
        """What is computed densely: the first logits of a method are those after the token that follows."""
        return self.token_ids[: -len(self.wanted) - 1]


class Text:
    """One text that methods are compared on.

    Args:
        spec: as of `specontext.distill.data.open_sources`: 'tasks', a text or JSONL file, a directory, a data set of the Hub.
        vocab_size: as there.

    Attributes:
        name: how results call it.

    Raises:
        DataError: there is no such text.
    """

    def __init__(self, spec: str, tokenizer: Any, *, seed: int, vocab_size: int | None = None) -> None:
        self.name, self.spec = shown(spec), spec
        self._encoder = Encoder(tokenizer, vocab_size)
        self._source: Source | None = None
        self._documents: Documents | None = None
        if spec == "tasks" or spec.startswith("tasks:"):
            self._source = open_sources(spec, tokenizer=tokenizer, seed=seed, held_out=True, vocab_size=vocab_size)
        else:
            self._documents = open_documents(spec, self._encoder)

    def windows(self, length: int, count: int, compared: int) -> list[Window]:
        """Up to `count` windows of `length` tokens, of which the last `compared` are looked at.

        Generated tasks give texts of at most `length` tokens and at least 7/8 of it. Documents are read one after another, with
        end tokens between them, from the first on; windows follow each other, or overlap evenly in a text that is shorter, but
        never in what is looked at.

        Raises:
            ShortTextError: there is not even one.
            DataError: the text cannot be read.
        """
        if self._documents is None:
            assert self._source is not None
            return self._drawn(self._source, length, count, compared)
        return self._cut(self._documents, length, count, compared)

    def _drawn(self, source: Source, length: int, count: int, compared: int) -> list[Window]:
        windows: list[Window] = []
        for step in range(DRAWS * count):
            try:
                drawn = source.draw(step, length, 1)
            except DataError as error:
                raise ShortTextError(str(error)) from error
            tokens = int(drawn.lengths[0])
            wanted = drawn.wanted[0, tokens - compared - 1 : tokens - 1].tolist()  # marks the token before
            if tokens >= FILLED * length and any(wanted):
                windows.append(Window(str(step), drawn.ids[0, :tokens].tolist(), wanted))
            if len(windows) == count:
                break
        if not windows:
            raise ShortTextError(f"{self.spec} gives no texts of {length} tokens under this tokenizer: raise the length")
        return windows

    def _cut(self, documents: Documents, length: int, count: int, compared: int) -> list[Window]:
        opening = list(self._encoder.opening)
        room = length - len(opening)
        ids, said = self._read(documents, room * count)
        if len(ids) < room:
            raise ShortTextError(f"{self.spec} has {len(ids)} tokens, too few for a window of {length}: give more text")
        spare = len(ids) - room
        count = min(count, spare // compared + 1)
        starts = [spare * number // max(count - 1, 1) for number in range(count)]
        windows = [
            Window(f"from {start}", [*opening, *ids[start : start + room]], said[start + room - compared : start + room])
            for start in starts
        ]
        windows = [window for window in windows if any(window.wanted)]
        if not windows:
            raise ShortTextError(
                f"the last {compared} of {length} tokens of {self.spec} hold none that the model has to say: compare more tokens"
            )
        return windows

    def _read(self, documents: Documents, most: int) -> tuple[list[int], list[bool]]:
        """The first `most` tokens of all documents, and whether the model has to say them."""
        eos = self._encoder.eos
        ids: list[Tensor] = []
        said: list[Tensor] = []
        tokens = 0
        for number in range(len(documents)):
            document = documents[number]
            marks = torch.ones(len(document), dtype=torch.bool) if document.said is None else document.said
            ends = eos is None or not len(document) or int(document.ids[-1]) == eos
            end: Sequence[int] = [] if ends or eos is None else [eos]
            ids += [document.ids, document.ids.new_tensor(end)]
            said += [marks, marks.new_zeros(len(end))]
            tokens += len(document) + len(end)
            if tokens >= most:
                break
        return torch.cat(ids)[:most].tolist(), torch.cat(said)[:most].tolist()

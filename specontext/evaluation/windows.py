"""Windows of text that a model is given: of a file, of the rows of a data set, of generated tasks.

A window lies in one document; half of it from another would be context that nothing in it is about. Files that are all too short
(the code of a project, say) are read as one text instead, and such windows say so; rows never are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specontext.distill.data import DataError, Source, open_sources
from specontext.distill.data.documents import Document, Documents
from specontext.distill.data.encoder import Encoder
from specontext.distill.data.specs import open_documents
from specontext.evaluation.analysis.settings import shown
from specontext.evaluation.analysis.texts import FILLED

DRAWS = 24  # generated texts that are looked at for each one that is wanted
KEPT = 1 << 25  # tokens of documents that are kept, for the windows of further lengths


class ShortTextError(DataError):
    """A text that cannot fill a window of some length, or has nothing in it to compare."""


@dataclass(frozen=True)
class Window:
    """Tokens of a text.

    Attributes:
        key: names the window among those of its length.
        wanted: for each of the last tokens, whether the model has to say it; one at least is. There distributions are compared.
        joined: it goes over the end of a document.
    """

    key: str
    token_ids: list[int]
    wanted: list[bool]
    joined: bool = False

    @property
    def prompt(self) -> list[int]:
        """What is computed densely: the first logits of a method are those after the token that follows."""
        return self.token_ids[: -len(self.wanted) - 1]


@dataclass(frozen=True)
class _Run:
    """Tokens that windows are cut from: a document, or several in a row.

    Attributes:
        name: begins the keys of its windows.
    """

    name: str
    document: Document
    joined: bool = False

    def room(self, length: int) -> int:
        """Tokens of it in a window of `length` tokens."""
        return length - len(self.document.opening)

    def spare(self, length: int) -> int:
        """Tokens beside one window; negative where it is too short."""
        return len(self.document) - self.room(length)

    def windows(self, length: int, count: int, compared: int) -> list[Window]:
        """So many windows, evenly spread from the first token to the last."""
        ids, said = self.document.ids.tolist(), self.document.said
        room, spare = self.room(length), self.spare(length)
        windows = []
        for number in range(count):
            start = spare * number // max(count - 1, 1)
            stop = start + room
            marks = [True] * compared if said is None else said[stop - compared : stop].tolist()
            key, tokens = f"{self.name}from {start}", [*self.document.opening, *ids[start:stop]]
            windows.append(Window(key, tokens, marks, self.joined))
        return windows


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
        self.name, self.spec, self.tokenizer = shown(spec), spec, tokenizer
        self._encoder = Encoder(tokenizer, vocab_size)
        self._source: Source | None = None
        self._documents: Documents | None = None
        self._kept: dict[int, Document] = {}
        self._kept_tokens = 0
        if spec == "tasks" or spec.startswith("tasks:"):
            self._source = open_sources(spec, tokenizer=tokenizer, seed=seed, held_out=True, vocab_size=vocab_size)
        else:
            self._documents = open_documents(spec, self._encoder)

    @property
    def generated(self) -> bool:
        """Whether the text is that of generated tasks, and no document."""
        return self._documents is None

    def windows(self, length: int, count: int, compared: int) -> list[Window]:
        """Up to `count` windows of `length` tokens, of which the last `compared` are looked at.

        Generated tasks give texts of at most `length` tokens and at least 7/8 of it. Of documents the first `count` that are
        long enough give one window each; where there are fewer they give several, which overlap only where the documents
        are too short, and never in what is looked at.

        Raises:
            ShortTextError: there is not even one.
            DataError: the text cannot be read.
        """
        if self._documents is None:
            assert self._source is not None
            return self._drawn(self._source, length, count, compared)
        runs = self._runs(self._documents, length, count)
        shares = _shares([run.spare(length) // run.room(length) + 1 for run in runs], count)
        if sum(shares) < count:
            shares = _shares([run.spare(length) // compared + 1 for run in runs], count)
        windows = [one for run, share in zip(runs, shares, strict=True) for one in run.windows(length, share, compared)]
        windows = [window for window in windows if any(window.wanted)]
        if not windows:
            raise ShortTextError(
                f"the last {compared} of {length} tokens of {self.spec} hold none that the model has to say: compare more tokens"
            )
        return windows

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

    def _runs(self, documents: Documents, length: int, most: int) -> list[_Run]:
        """The first documents, `most` at most, that can fill a window; or short files one after another.

        Raises:
            ShortTextError: there are none.
        """
        several = len(documents) > 1
        runs: list[_Run] = []
        longest = 0
        for number in range(len(documents)):
            document = self._document(documents, number)
            run = _Run(f"document {number}, " if several else "", document)
            longest = max(longest, len(document) + len(document.opening))
            if run.spare(length) >= 0 and len(document):
                runs.append(run)
            if len(runs) == most:
                break
        if runs:
            return runs
        if not several:
            raise ShortTextError(f"{self.spec} has {longest} tokens, too few for a window of {length}: give more text")
        if not documents.running:
            raise ShortTextError(
                f"no document of {self.spec} has the {length} tokens of a window, the longest has {longest}: give longer "
                "documents, or a smaller length"
            )
        joined = _Run("all, ", self._joined(documents, length * most), joined=True)
        if joined.spare(length) < 0:
            tokens = len(joined.document) + len(joined.document.opening)
            raise ShortTextError(f"{self.spec} has {tokens} tokens, too few for a window of {length}: give more text")
        return [joined]

    def _document(self, documents: Documents, number: int) -> Document:
        """One document, encoded once as far as memory is not filled by it."""
        if number in self._kept:
            return self._kept[number]
        document = documents[number]
        if self._kept_tokens + len(document) <= KEPT:
            self._kept[number] = document
            self._kept_tokens += len(document)
        return document

    def _joined(self, documents: Documents, most: int) -> Document:
        """The first `most` tokens of files, an end token after each."""
        eos = self._encoder.eos
        ids: list[Tensor] = []
        tokens = 0
        for number in range(len(documents)):
            document = self._document(documents, number)
            assert document.said is None, "of running text the model has to say everything"
            ends = eos is None or not len(document) or int(document.ids[-1]) == eos
            end: Sequence[int] = [] if ends or eos is None else [eos]
            ids += [document.ids, document.ids.new_tensor(end)]
            tokens += len(document) + len(end)
            if tokens >= most:
                break
        return Document(torch.cat(ids)[:most], None, self._encoder.opening)


def reservations(windows: Sequence[Window], wanted: int) -> list[str]:
    """What a reader must know of windows of which so many were wanted."""
    said = []
    if any(window.joined for window in windows):
        said.append("no file is as long as a window: windows go over the ends of files")
    if len(windows) < wanted:
        said.append(f"there are {len(windows)} windows, fewer than the limit of {wanted}")
    return said


def _shares(most: Sequence[int], count: int) -> list[int]:
    """`count` shared out evenly, the first ones getting one more where that does not go out, nobody more than his `most`."""
    shares = [0] * len(most)
    while sum(shares) < min(count, sum(most)):
        for number, limit in enumerate(most):
            if shares[number] < limit and sum(shares) < count:
                shares[number] += 1
    return shares

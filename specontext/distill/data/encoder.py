"""A tokenizer as the sources need it: plain ids, marks of spans, and the tokens around a document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from specontext.distill.data.source import DataError
from specontext.models.token_ids import unknown_token

CHUNK = 1 << 16  # characters of a long text that are encoded by themselves: the time for one grows faster than its length
BATCH = 16  # chunks encoded at once: encodings take about a hundred bytes a token while they are made


class UnknownTokenError(DataError):
    """Data with a token that the model cannot read, or a text that no tokenizer can."""


class Encoder:
    """Encodes texts without the special tokens that the tokenizer would put around them.

    Args:
        vocab_size: rows of the embedding of the model that will read the tokens; None where that is the tokenizer's affair.

    Attributes:
        opening: tokens that the tokenizer puts before a text; they begin every document and every window of one.
        eos: token that ends a document, None where the tokenizer has none.
        pad: token that fills rows up; any that the model knows will do, since padding stands at the end and is never looked at.

    Raises:
        UnknownTokenError: as every method that gives tokens, for one that the model cannot read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> None:
        self.tokenizer: Any = tokenizer  # its own annotations are too loose to help
        self.vocab_size = vocab_size
        self.eos: int | None = tokenizer.eos_token_id
        self.known([] if self.eos is None else [self.eos])
        fills = [token for token in (tokenizer.pad_token_id, self.eos) if token is not None]
        self.pad = next((token for token in fills if vocab_size is None or token < vocab_size), 0)
        backend = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
        # Another user of the tokenizer may have left truncation or padding on; then only the tokenizer itself can be asked.
        self._quick = backend if backend is not None and backend.truncation is None and backend.padding is None else None
        self.opening = self._opening()

    def _opening(self) -> tuple[int, ...]:
        plain, full = self.ids("a"), self.known(list(self.tokenizer("a")["input_ids"]))
        starts = [k for k in range(len(full) - len(plain) + 1) if full[k : k + len(plain)] == plain]
        return tuple(full[: starts[0]]) if starts else ()

    def known(self, ids: list[int]) -> list[int]:
        """The same ids; raises UnknownTokenError for one that the model cannot read."""
        wrong = unknown_token(ids, self.vocab_size, self.tokenizer) if self.vocab_size is not None else None
        if wrong is not None:
            raise UnknownTokenError(wrong)
        return ids

    def ids(self, text: str) -> list[int]:
        """Token ids of a text of any length; one of more than `CHUNK` characters is encoded in parts."""
        check_unicode(text)
        parts = list(chunks(text, CHUNK))
        if self._quick is None:
            return self.known([token for part in parts for token in self._encode(part)["input_ids"]])
        ids: list[int] = []
        for start in range(0, len(parts), BATCH):
            for encoding in self._quick.encode_batch_fast(parts[start : start + BATCH], add_special_tokens=False):
                ids += encoding.ids
        return self.known(ids)

    def marked(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Token ids of a text, and for each whether it shares a character with one of the character spans, which ascend."""
        if not self.tokenizer.is_fast:
            return self._marked_pieces(text, spans)
        check_unicode(text)
        encoding = self._encode(text, return_offsets_mapping=True)
        marks, number = [], 0
        for start, end in encoding["offset_mapping"]:
            while number < len(spans) and spans[number][1] <= start:
                number += 1
            marks.append(number < len(spans) and start < end and end > spans[number][0])
        return self.known(list(encoding["input_ids"])), marks

    def _marked_pieces(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """As `marked` for tokenizers that tell no offsets: spans and what is between them are encoded one by one."""
        bounds = [0, *(place for span in spans for place in span), len(text)]
        ids: list[int] = []
        marks: list[bool] = []
        for number, (start, end) in enumerate(pairwise(bounds)):
            piece = self.ids(text[start:end])
            ids += piece
            marks += [number % 2 == 1] * len(piece)
        return ids, marks

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self._quick.encode(text, add_special_tokens=False).ids) if self._quick is not None else len(self.ids(text))

    def single(self, word: str) -> bool:
        """Whether a text is one token, and a known one."""
        ids = self.ids(word)
        return len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id

    def _encode(self, text: str, **options: bool) -> dict[str, list]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False, **options)


def check_unicode(text: str) -> None:
    """Raises UnknownTokenError for half a character, which JSON can write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnknownTokenError(f"the text is not Unicode: half a character at {error.start}") from error


def chunks(text: str, size: int) -> Iterator[str]:
    """A text in parts of about `size` characters, cut after the last line break or else space of each where there is one."""
    start = 0
    while len(text) - start > size:
        found = (text.rfind(mark, start, start + size) for mark in "\n ")
        end = next((place + 1 for place in found if place >= 0), start + size)
        yield text[start:end]
        start = end
    yield text[start:]

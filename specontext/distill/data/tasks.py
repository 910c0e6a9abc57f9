"""Sequences from the generated tasks, under any tokenizer."""

from __future__ import annotations

import random
from collections.abc import Sequence

from specontext.distill.data.encoder import Encoder
from specontext.distill.data.source import DataError, Row, Sequences, check_size, collate
from specontext.tasks.problem import LengthError, TokenCounter
from specontext.tasks.training import KINDS, NANO_TURNS, NO_TURNS, sequence
from specontext.tasks.words import count_words, vocabulary

ATTEMPTS = 16


class TaskSource:
    """Texts of `specontext.tasks.training`, whose answers are what the model has to say.

    A tokenizer with nano's turn words as single tokens gets them in the text; any other gets plain text and its own end token.

    Args:
        kinds: of `KINDS`, each as likely as the others.
        key: names this source among all random streams; training and held-out problems have different ones.

    Raises:
        DataError: an unknown kind.
    """

    def __init__(self, kinds: Sequence[str], encoder: Encoder, *, key: str) -> None:
        if unknown := [kind for kind in kinds if kind not in KINDS]:
            raise DataError(f"there are no tasks {', '.join(map(repr, unknown))}: choose of {', '.join(KINDS)}")
        self.kinds, self.encoder, self.key = tuple(kinds), encoder, key
        self.turns = NANO_TURNS if all(map(encoder.single, NANO_TURNS)) else NO_TURNS
        # Counting words is much faster than encoding, and the same where every word of the tasks is a token.
        words_are_tokens = all(map(encoder.single, vocabulary()))
        self.count_tokens: TokenCounter = count_words if words_are_tokens else encoder.count

    def draw(self, step: int, length: int, rows: int) -> Sequences:
        check_size(step, length, rows)
        drawn = [self._row(length, random.Random(f"{self.key}/{step}/{length}/{n}")) for n in range(rows)]
        return collate(drawn, length, self.encoder.pad)

    def _row(self, length: int, rng: random.Random) -> Row:
        encoder, kind = self.encoder, rng.choice(self.kinds)
        end = [] if self.turns[2] or encoder.eos is None else [encoder.eos]
        room = length - len(encoder.opening) - len(end) - sum(map(bool, self.turns))
        for _ in range(ATTEMPTS):
            try:
                text, spans = sequence(kind, room, rng, self.count_tokens, turns=self.turns)
            except LengthError:  # some shapes of a kind need more than others
                continue
            row = Row()
            row.add(encoder.opening, False)
            row.add(*encoder.marked(text, spans))
            row.add(end, True)
            if len(row) <= length:
                return row
            room -= len(row) - length  # tokens of parts do not always add up to those of the whole
        raise DataError(f"{length} tokens do not hold a task of kind '{kind}' under this tokenizer: raise the length")

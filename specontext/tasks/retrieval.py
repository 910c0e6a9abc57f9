"""Retrieval tasks: key-value needles among filler, in RULER's kinds (single, multi-key, multi-query, multi-value)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from specontext.tasks.problem import Problem, TokenCounter, assemble
from specontext.tasks.words import NOUNS

HEADER = "Remember the facts in this text."


@dataclass(frozen=True)
class RetrievalTask:
    """Facts ` key = value.` hidden in filler; the question names keys and the answer repeats their facts.

    A fact may list several values, ` key = 417, 88, 923.`

    Attributes:
        name: task name.
        keys: number of distinct keys hidden in the text, a range.
        asked: number of keys that one question asks for, a range.
        values: number of values that a fact lists, a range.
        questions: number of questions, a range; all but the last are given with their answers.
        filler: probability that the text has filler at all.
    """

    name: str
    keys: tuple[int, int]
    asked: tuple[int, int]
    values: tuple[int, int] = (1, 1)
    questions: tuple[int, int] = (1, 1)
    filler: float = 1.0

    def sample(self, length: int, rng: random.Random, count_tokens: TokenCounter) -> Problem:
        """Draw one problem whose prompt and answer take at most `length` tokens.

        Raises:
            LengthError: the task needs more tokens than that.
        """
        groups = [rng.randint(*self.asked) for _ in range(rng.randint(*self.questions))]
        names = rng.sample(NOUNS, max(rng.randint(*self.keys), sum(groups)))
        facts = {name: self._fact(name, rng) for name in names}
        dialogue = []
        for group in groups:
            keys, names = names[:group], names[group:]
            question = f"\nQuestion: {' '.join(keys)}?\nAnswer:"
            dialogue.append((question, "".join(facts[key] for key in keys)))
        hidden = list(facts.values())
        rng.shuffle(hidden)
        return assemble(self.name, HEADER, hidden, dialogue, length, rng, count_tokens, self.filler)

    def _fact(self, name: str, rng: random.Random) -> str:
        values = rng.sample(range(100, 1000), rng.randint(*self.values))
        return f" {name} = {', '.join(map(str, values))}."


SINGLE = RetrievalTask("niah_single", keys=(1, 1), asked=(1, 1))
MULTI_KEY = RetrievalTask("niah_multikey", keys=(16, 32), asked=(1, 1))
MULTI_QUERY = RetrievalTask("niah_multiquery", keys=(16, 32), asked=(2, 4))
MULTI_VALUE = RetrievalTask("niah_multivalue", keys=(8, 16), asked=(1, 1), values=(2, 4))

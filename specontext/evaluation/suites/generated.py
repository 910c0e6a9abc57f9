"""What the generated tasks of the suites share: problems drawn one by one from a seed, and sized to a length."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from specontext.errors import SpeContextError
from specontext.evaluation.suites.example import Example, TextTools
from specontext.tasks import LengthError
from specontext.tasks.words import vocabulary

MOST_TRIES = 20  # of sizes; four to seven are usual


class SuiteError(SpeContextError, ValueError):
    """A suite or task that cannot be run as asked; the message says what to do."""


@dataclass(frozen=True)
class GeneratedTask(ABC):
    """A task whose problems are drawn at any length for any tokenizer.

    Attributes:
        default_lengths: lengths in tokens, prompt and answer together, where none are asked for.
    """

    suite: str
    name: str

    default_lengths: ClassVar[tuple[int, ...]] = (4096,)

    def examples(self, *, length: int | None, n: int, seed: int, text: TextTools) -> list[Example]:
        """The first `n` problems of `seed`.

        Raises:
            SuiteError: no length was given.
            LengthError: the length cannot hold a problem.
        """
        if length is None:
            raise SuiteError(f"{self.suite}/{self.name} is generated and needs a length in tokens: give one with --lengths")
        rngs = (random.Random(f"{self.suite}/{self.name}/{length}/{seed}/{i}") for i in range(n))
        return [self.draw(f"{seed}-{i}", length, rng, text) for i, rng in enumerate(rngs)]

    @abstractmethod
    def draw(self, key: str, length: int, rng: random.Random, text: TextTools) -> Example:
        """One problem of at most `length` tokens, its answer's `max_tokens` included."""

    @abstractmethod
    def score(self, example: Example, output: str) -> dict[str, float]: ...

    def unfit(self, text: TextTools) -> str | None:
        """Why the task is left out for a model unless it is asked for by name; None where it is not."""
        if speaks_tasks_only(text):
            return "the model's vocabulary is that of the trained tasks: it has never seen this one"
        return None


@lru_cache(maxsize=4)
def speaks_tasks_only(text: TextTools) -> bool:
    """Whether a tokenizer was made for `specontext.tasks`: each of their words and numbers is a single token."""
    return all(text.count_tokens(word) == 1 for word in vocabulary())


def most_units(tokens_with: Callable[[int], int], room: int, *, least: int) -> int:
    """About the greatest number of units (sentences, documents ...) that a text has room for; never too many.

    Args:
        tokens_with: tokens of the text with so many units, growing about evenly.
        room: tokens that the text may take.
        least: units without which the text makes no sense.

    Raises:
        LengthError: not even `least` units fit.
    """
    low, used = least, tokens_with(least)
    if used > room:
        raise LengthError(f"it needs {used} tokens at least and only {room} are there: ask for a greater length")
    high: int | None = None
    step = 32
    for _ in range(MOST_TRIES):
        guess = low + step if high is None else min(low + step, high - 1)
        if guess <= low:
            return low
        tokens = tokens_with(guess)
        each = max((tokens - used) / (guess - low), 0.1)
        if tokens <= room:
            low, used = guess, tokens
        else:
            high = guess
        if room - used < max(each, room / 200):
            return low
        step = max(1, int((room - used) / each))
    return low

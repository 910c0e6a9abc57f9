"""RULER's aggregation tasks: the most common words of a list, the most frequent words of a coded text."""

from __future__ import annotations

import math
import random
import string
from dataclasses import dataclass

from specontext.evaluation.suites.example import Example, TextTools
from specontext.evaluation.suites.generated import GeneratedTask, most_units
from specontext.evaluation.suites.matching import match_all
from specontext.evaluation.suites.prose import distinct_words

COMMON_TOKENS = 120
FREQUENT_TOKENS = 50
SHORT = 4096  # below it RULER repeats words less often
EXAMPLE_WORDS = 20


@dataclass(frozen=True)
class CommonWordsTask(GeneratedTask):
    """A numbered list in which ten words come often and all others rarely; one answered example stands before it.

    Attributes:
        common: words that come often.
        often, rarely: how often they and the others come, at lengths of 4,096 tokens and more; 6 times and once below.
    """

    common: int = 10
    often: int = 30
    rarely: int = 3

    def draw(self, key: str, length: int, rng: random.Random, text: TextTools) -> Example:
        often, rarely = (self.often, self.rarely) if length >= SHORT else (6, 1)
        example, answers = self._list(EXAMPLE_WORDS, 3, 1, length, rng)
        shown = f"{_common_question(example, self.common)}\n{_common_answer(self.common)} {_numbered(answers)}\n\n"
        words_seed = rng.random()

        def drawn(units: int) -> tuple[str, list[str]]:
            listed, common = self._list(units, often, rarely, length, random.Random(words_seed))
            return f"{text.chat(shown + _common_question(listed, self.common))} {_common_answer(self.common)}", common

        room = length - COMMON_TOKENS
        prompt, common = drawn(most_units(lambda n: text.count_tokens(drawn(n)[0]), room, least=1))
        return Example(self.suite, self.name, key, prompt, tuple(common), COMMON_TOKENS, length)

    def score(self, example: Example, output: str) -> dict[str, float]:
        return {"score": match_all(output, example.references)}

    def _list(self, others: int, often: int, rarely: int, length: int, rng: random.Random) -> tuple[str, list[str]]:
        words = distinct_words(self.common + others, rng, length=length)
        common = words[: self.common]
        listed = common * often + words[self.common :] * rarely
        rng.shuffle(listed)
        return _numbered(listed), common


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


def _common_question(listed: str, count: int) -> str:
    return (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        f"Memorize the ones that appear most often.\n{listed}\n"
        f"Question: What are the {count} most common words in the above list?"
    )


def _common_answer(count: int) -> str:
    return f"Answer: The top {count} words that appear most often in the list are:"


@dataclass(frozen=True)
class FrequentWordsTask(GeneratedTask):
    """Coded words with Zipf's frequencies, 1 / rank^2; the first rank is dots, and the next three are asked for."""

    asked: int = 3

    def draw(self, key: str, length: int, rng: random.Random, text: TextTools) -> Example:
        coded = self._coded_words(max(length // 50, 2 * self.asked), rng)
        order_seed = rng.random()

        def prompt(words: int) -> str:
            shares = (6 / math.pi**2 / rank**2 for rank in range(1, len(coded) + 2))
            counts = [int(words * share) for share in shares]
            listed = [word for word, count in zip(["....", *coded], counts, strict=True) for _ in range(count)]
            random.Random(order_seed).shuffle(listed)
            message = (
                "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
                f"appeared coded words. {' '.join(listed)}\nQuestion: Do not provide any explanation. Please ignore the dots "
                "'....'. What are the three most frequently appeared words in the above coded text?"
            )
            return (
                f"{text.chat(message)} Answer: According to the coded text above, the three most frequently appeared words are:"
            )

        # With 60 words the ranks asked for already come at different frequencies.
        words = most_units(lambda n: text.count_tokens(prompt(n)), length - FREQUENT_TOKENS, least=60)
        return Example(self.suite, self.name, key, prompt(words), tuple(coded[: self.asked]), FREQUENT_TOKENS, length)

    def score(self, example: Example, output: str) -> dict[str, float]:
        return {"score": match_all(output, example.references)}

    def _coded_words(self, count: int, rng: random.Random) -> list[str]:
        words = dict[str, None]()
        while len(words) < count:
            words["".join(rng.choices(string.ascii_lowercase, k=6))] = None
        return list(words)

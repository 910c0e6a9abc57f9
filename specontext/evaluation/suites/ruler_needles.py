"""RULER's needle-in-a-haystack tasks: one sentence among many, several keys, values or questions."""

from __future__ import annotations

import random
from dataclasses import dataclass

from specontext.evaluation.suites.example import Example, TextTools
from specontext.evaluation.suites.generated import GeneratedTask, most_units
from specontext.evaluation.suites.matching import match_all
from specontext.evaluation.suites.prose import NOISE, distinct_words, paragraphs, prose_sentence, random_uuid, scatter

ANSWER_TOKENS = 128


@dataclass(frozen=True)
class NeedleTask(GeneratedTask):
    """`One of the special magic numbers for quiet-otter is: 3819274.` in a haystack.

    Attributes:
        haystack: `noise` (five sentences again and again), `essay` (drawn prose) or `needles` (of other keys).
        keys, values: kinds of key and value: `words`, `numbers` or `uuids`.
        needles: keys in the text besides those of a haystack of needles.
        values_per_key: values of each key.
        asked: keys that the question names.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    needles: int = 1
    values_per_key: int = 1
    asked: int = 1

    def draw(self, key: str, length: int, rng: random.Random, text: TextTools) -> Example:
        names = self._distinct(self.keys, self.needles, length, rng)
        facts = [(name, value) for name in names for value in self._distinct(self.values, self.values_per_key, length, rng)]
        asked = rng.sample(names, self.asked)
        references = tuple(value for name in asked for chosen, value in facts if chosen == name)
        hidden = [self._needle(name, value) for name, value in facts]
        rng.shuffle(hidden)
        noise_seed = rng.random()

        def prompt(units: int) -> str:
            fresh = random.Random(noise_seed)
            context = self._context(hidden, units, set(names), length, fresh)
            return self._prompt(context, asked, len(references), text)

        units = most_units(lambda n: text.count_tokens(prompt(n)), length - ANSWER_TOKENS, least=1)
        return Example(self.suite, self.name, key, prompt(units), references, ANSWER_TOKENS, length)

    def score(self, example: Example, output: str) -> dict[str, float]:
        return {"score": match_all(output, example.references)}

    def _context(self, hidden: list[str], units: int, taken: set[str], length: int, rng: random.Random) -> str:
        if self.haystack == "noise":
            return "\n".join(scatter([NOISE] * units, hidden, rng))
        if self.haystack == "essay":
            return paragraphs(scatter([prose_sentence(rng) for _ in range(units)], hidden, rng), rng)
        others = [name for name in self._distinct(self.keys, units + len(taken), length, rng) if name not in taken][:units]
        values = self._distinct(self.values, len(others), length, rng)
        return " ".join(scatter([self._needle(name, value) for name, value in zip(others, values, strict=True)], hidden, rng))

    def _needle(self, name: str, value: str) -> str:
        return f"One of the special magic {self.values} for {name} is: {value}."

    def _prompt(self, context: str, asked: list[str], answers: int, text: TextTools) -> str:
        query = ", ".join(asked[:-1]) + f", and {asked[-1]}" if len(asked) > 1 else asked[0]
        some, what, verb = ("A", self.values[:-1], "is") if answers == 1 else ("Some", self.values, "are")
        question = (
            f"What {verb if answers == 1 else 'are all'} the special magic {what} for {query} mentioned in the provided text?"
        )
        message = (
            f"{some} special magic {what} {verb} hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {what} afterwards.\n{context}\n{question}"
        )
        return f"{text.chat(message)} The special magic {what} for {query} mentioned in the provided text {verb}"

    @staticmethod
    def _distinct(kind: str, count: int, length: int, rng: random.Random) -> list[str]:
        if kind == "words":
            return distinct_words(count, rng, length=length)
        if kind == "numbers":
            return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]
        return [random_uuid(rng) for _ in range(count)]

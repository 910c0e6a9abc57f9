"""RULER's variable tracking: a chain of assignments hidden in noise."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

from specontext.evaluation.suites.example import Example, TextTools
from specontext.evaluation.suites.generated import GeneratedTask, most_units
from specontext.evaluation.suites.matching import match_all
from specontext.evaluation.suites.prose import NOISE, scatter

ANSWER_TOKENS = 30
EXAMPLE_UNITS = 2


@dataclass(frozen=True)
class ChainTask(GeneratedTask):
    """`VAR AXQPL = 38192`, `VAR KWEJR = VAR AXQPL` ...: the question asks for all variables with one value.

    One answered example stands before the question, as in RULER.

    Attributes:
        chains: chains in the text, one of which is asked for.
        hops: assignments from variable to variable in each.
    """

    chains: int = 1
    hops: int = 4

    def draw(self, key: str, length: int, rng: random.Random, text: TextTools) -> Example:
        shown, shown_names, shown_value = self._facts(rng)
        shown_text = _question("\n".join(scatter([NOISE] * EXAMPLE_UNITS, shown, rng)), shown_value)
        example = f"{shown_text}\n{_answer(len(shown_names), shown_value)}{' '.join(shown_names)}\n\n"
        hidden, names, value = self._facts(rng)
        noise_seed = rng.random()

        def prompt(units: int) -> str:
            context = "\n".join(scatter([NOISE] * units, hidden, random.Random(noise_seed)))
            return f"{text.chat(example + _question(context, value))} {_answer(len(names), value)}"

        units = most_units(lambda n: text.count_tokens(prompt(n)), length - ANSWER_TOKENS, least=1)
        return Example(self.suite, self.name, key, prompt(units), tuple(names), ANSWER_TOKENS, length)

    def score(self, example: Example, output: str) -> dict[str, float]:
        return {"score": match_all(output, example.references)}

    def _facts(self, rng: random.Random) -> tuple[list[str], list[str], str]:
        """Assignments in an order in which each can be understood, the names of the first chain, and its value."""
        letters = set[str]()
        while len(letters) < self.chains * (self.hops + 1):
            letters.add("".join(rng.choices(string.ascii_uppercase, k=5)))
        names = sorted(letters)
        rng.shuffle(names)
        size = self.hops + 1
        values = [str(value) for value in rng.sample(range(10_000, 100_000), self.chains)]
        lists = [
            [f"VAR {names[c * size + i]} = {values[c] if i == 0 else f'VAR {names[c * size + i - 1]}'} " for i in range(size)]
            for c in range(self.chains)
        ]
        turns = [c for c in range(self.chains) for _ in range(size)]
        rng.shuffle(turns)
        return [lists[c].pop(0) for c in turns], names[:size], values[0]


def _question(context: str, value: str) -> str:
    return (
        f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
        f"Question: Find all variables that are assigned the value {value} in the text above."
    )


def _answer(count: int, value: str) -> str:
    return (
        "Answer: According to the chain(s) of variable assignment in the text above, "
        f"{count} variables are assigned the value {value}, they are: "
    )

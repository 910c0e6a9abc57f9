"""What the long-reasoning tasks for any model share: steps to be written one a line, a final answer, and their scores."""

from __future__ import annotations

import random
import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from specontext.evaluation.suites.example import Example, TextTools
from specontext.evaluation.suites.generated import GeneratedTask, most_units

SPARE = 1.25  # room for answers that are wordier than the one expected
SPARE_TOKENS = 64
STEP = re.compile(r"^\W*step\s+(\d+)\b(.*)$", re.IGNORECASE | re.MULTILINE)
FINAL = re.compile(r"final(?:\s+answer)?\W*[:=]\W*(\w+)", re.IGNORECASE)
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Puzzle:
    """A problem of many steps.

    Attributes:
        message: what the model is told, format of the answer included.
        worked: the expected lines, without `Step i: `.
        results: words that each line must end with.
        final: the final answer, a word.
    """

    message: str
    worked: tuple[str, ...]
    results: tuple[tuple[str, ...], ...]
    final: str

    @property
    def answer(self) -> str:
        """The expected output."""
        lines = [f"Step {i}: {line}" for i, line in enumerate(self.worked, start=1)]
        return "\n".join([*lines, f"Final: {self.final}"])


@dataclass(frozen=True)
class StepsTask(GeneratedTask):
    """A puzzle whose answer is about as long as its prompt or longer, in the model's chat template."""

    default_lengths: ClassVar[tuple[int, ...]] = (1024, 2048)

    @abstractmethod
    def puzzle(self, steps: int, rng: random.Random) -> Puzzle:
        """A puzzle of so many steps."""

    def draw(self, key: str, length: int, rng: random.Random, text: TextTools) -> Example:
        seed = rng.random()

        def sized(steps: int) -> tuple[Puzzle, str, int]:
            puzzle = self.puzzle(steps, random.Random(seed))
            return puzzle, text.chat(puzzle.message), int(SPARE * text.count_tokens(puzzle.answer)) + SPARE_TOKENS

        def tokens(steps: int) -> int:
            _, prompt, most = sized(steps)
            return text.count_tokens(prompt) + most

        puzzle, prompt, most = sized(most_units(tokens, length, least=2))
        details = {"results": puzzle.results, "answer": puzzle.answer}
        return Example(self.suite, self.name, key, prompt, (puzzle.final,), most, length, details=details)

    def score(self, example: Example, output: str) -> dict[str, float]:
        """`score` and `final`: the last `Final: ...` is right; `steps`: share of steps whose last statement is right."""
        said = {int(number): WORD.findall(line.lower()) for number, line in STEP.findall(output)}
        expected = [[word.lower() for word in words] for words in example.details["results"]]
        right = sum(said.get(i, [])[-len(words) :] == words for i, words in enumerate(expected, start=1))
        finals = FINAL.findall(output)
        final = float(bool(finals) and finals[-1].lower() == example.references[0].lower())
        return {"score": final, "final": final, "steps": right / len(expected)}

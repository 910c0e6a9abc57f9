"""Long reasoning: a short program is evaluated line by line, every step looking up values the model itself wrote."""

from __future__ import annotations

import operator
import random
from dataclasses import dataclass

from specontext.evaluation.tasks.problem import LengthError, Problem, TokenCounter
from specontext.evaluation.tasks.words import NOUNS

MODULUS = 7
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
HEADER = f"Run this program modulo {MODULUS}.\n"
FOOTER = "\nRun:"


@dataclass(frozen=True)
class Line:
    """One program line `target <- left operator right`; operands are variables or digits."""

    target: str
    left: str
    operator: str
    right: str

    def source(self) -> str:
        return f" {self.target} <- {self.left} {self.operator} {self.right};"

    def run(self, values: dict[str, int]) -> str:
        """The worked line, in which operands are replaced by their values and the result is stated."""
        left, right = (values[x] if x in values else int(x) for x in (self.left, self.right))
        result = OPERATORS[self.operator](left, right) % MODULUS
        values[self.target] = result
        return f"{self.source()[:-1]} : {left} {self.operator} {right} : {self.target} = {result};"


@dataclass(frozen=True)
class ProgramTask:
    """Straight-line programs modulo a small number: a short prompt and an output more than twice as long.

    The prompt takes 6 tokens a line and the answer 14, so a length of N tokens holds about N / 20 lines.
    """

    name: str

    def sample(self, length: int, rng: random.Random, count_tokens: TokenCounter) -> Problem:
        """Draw one problem whose prompt and answer take at most `length` tokens."""
        line_tokens = count_tokens(" sun <- sun + 1;") + count_tokens(" sun <- sun + 1 : 1 + 1 : sun = 1;")
        lines = min((length - count_tokens(HEADER + FOOTER) - 2) // line_tokens, len(NOUNS))
        if lines < 2:
            raise LengthError(f"{self.name}: {length} tokens do not hold two program lines")
        targets = rng.sample(NOUNS, lines)
        program, values, worked = [], dict[str, int](), list[str]()
        for i, target in enumerate(targets):
            operands = [rng.choice(targets[:i]) if i and rng.random() < 0.85 else str(rng.randrange(MODULUS)) for _ in range(2)]
            # Products are rare because zero absorbs: with many of them most values would be zero.
            line = Line(target, operands[0], rng.choices("+-*", weights=(5, 3, 2))[0], operands[1])
            program.append(line.source())
            worked.append(line.run(values))
        prompt, answer = HEADER + "".join(program) + FOOTER, "".join(worked).lstrip(" ")
        return Problem(self.name, prompt, answer, count_tokens(prompt) + count_tokens(" " + answer))


def correct_steps(problem: Problem, output: str) -> float:
    """Share of the worked lines of the answer that stand at their place in the output."""
    expected, found = problem.answer.split(";")[:-1], output.split(";")
    return sum(a.strip() == b.strip() for a, b in zip(expected, found, strict=False)) / len(expected)


PROGRAM = ProgramTask("program")

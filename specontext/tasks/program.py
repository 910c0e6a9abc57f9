"""Long reasoning: a short program is evaluated line by line, every step looking up values the model itself wrote."""

from __future__ import annotations

import operator
import random
from dataclasses import dataclass

from specontext.tasks.problem import LengthError, Problem, TokenCounter
from specontext.tasks.words import NOUNS

MODULUS = 7
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
HEADER = f"Run this program modulo {MODULUS}.\n"
FOOTER = "\nRun:"


@dataclass(frozen=True)
class Line:
    """One program line `target <- left operator right`; operands are variables or digits.

    Attributes:
        before: target of the line before, by which the line is introduced; None for the first line.
    """

    target: str
    left: str
    operator: str
    right: str
    before: str | None

    def source(self) -> str:
        opening = "" if self.before is None else f" after {self.before}"
        return f"{opening} {self.target} <- {self.left} {self.operator} {self.right};"

    def run(self, values: dict[str, int]) -> str:
        """The worked line, in which operands are replaced by their values and the result is stated."""
        left, right = (values[x] if x in values else int(x) for x in (self.left, self.right))
        result = OPERATORS[self.operator](left, right) % MODULUS
        values[self.target] = result
        return f"{self.source()[:-1]} : {left} {self.operator} {right} : {self.target} = {result};"


@dataclass(frozen=True)
class ProgramTask:
    """Straight-line programs modulo a small number: a short prompt and an output twice as long.

    The prompt takes 8 tokens a line and the answer 16, so a length of N tokens holds about N / 24 lines.
    Every line but the first is introduced by the target of the line before, and no two lines begin their expression
    alike, so that copying the next line is unambiguous.
    """

    name: str

    def sample(self, length: int, rng: random.Random, count_tokens: TokenCounter) -> Problem:
        """Draw one problem whose prompt and answer take at most `length` tokens.

        Raises:
            LengthError: not even two lines fit.
        """
        example = Line("sun", "sun", "+", "1", "sun")
        line_tokens = count_tokens(example.source()) + count_tokens(example.run({"sun": 1}))
        lines = min((length - count_tokens(HEADER + FOOTER) - 2) // line_tokens, len(NOUNS))
        if lines < 2:
            raise LengthError(f"{self.name}: {length} tokens do not hold two program lines")
        program, values, worked = self.lines(rng.sample(NOUNS, lines), rng), dict[str, int](), list[str]()
        for line in program:
            worked.append(line.run(values))
        prompt = HEADER + "".join(line.source() for line in program) + FOOTER
        answer = "".join(worked).lstrip(" ")
        return Problem(self.name, prompt, answer, count_tokens(prompt) + count_tokens(" " + answer))

    def lines(self, targets: list[str], rng: random.Random) -> list[Line]:
        """A program that assigns `targets` in order."""
        program: list[Line] = []
        begun = set[tuple[str, str]]()
        while len(program) < len(targets):
            i = len(program)
            left, right = (
                rng.choice(targets[:i]) if i and rng.random() < 0.85 else str(rng.randrange(MODULUS)) for _ in range(2)
            )
            # Products are rare because zero absorbs: with many of them most values would be zero.
            sign = rng.choices("+-*", weights=(5, 3, 2))[0]
            if (left, sign) in begun:
                continue
            begun.add((left, sign))
            program.append(Line(targets[i], left, sign, right, targets[i - 1] if i else None))
        return program


def correct_steps(problem: Problem, output: str) -> float:
    """Share of the worked lines of the answer that stand at their place in the output."""
    expected, found = problem.answer.split(";")[:-1], output.split(";")
    return sum(a.strip() == b.strip() for a, b in zip(expected, found, strict=False)) / len(expected)


PROGRAM = ProgramTask("program")

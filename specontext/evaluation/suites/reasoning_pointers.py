"""Pointer chasing: a long walk through a table, each step of which looks up one row."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

from specontext.evaluation.suites.reasoning_steps import Puzzle, StepsTask


@dataclass(frozen=True)
class PointersTask(StepsTask):
    """Rows `K417 -> K88` in random order; the walk starts at one of them and goes on for a given number of steps.

    A second walk of the same length stands among the rows, so that not every row is used.
    """

    def puzzle(self, steps: int, rng: random.Random) -> Puzzle:
        nodes = [f"K{number}" for number in rng.sample(range(10, 10 * (2 * steps + 2) + 10), 2 * steps + 2)]
        walk, other = nodes[: steps + 1], nodes[steps + 1 :]
        rows = [f"{a} -> {b}" for path in (walk, other) for a, b in pairwise(path)]
        rng.shuffle(rows)
        table = "\n".join(rows)
        message = (
            f"Here is a table of arrows.\n\n{table}\n\nStart at {walk[0]} and follow {steps} arrows. Write one line for each "
            f"arrow, exactly in this form:\nStep 1: K5 -> K9\nAfter step {steps} write where you are as\nFinal: K9\n"
            "Write nothing else."
        )
        results = tuple(pairwise(walk))
        return Puzzle(message, tuple(f"{a} -> {b}" for a, b in results), results, walk[-1])

"""Program evaluation for any model: the programs of `specontext.tasks`, with the format explained."""

from __future__ import annotations

import random
from dataclasses import dataclass

from specontext.evaluation.suites.reasoning_steps import Puzzle, StepsTask
from specontext.tasks import PROGRAM
from specontext.tasks.program import MODULUS


@dataclass(frozen=True)
class ProgramTask(StepsTask):
    """A straight-line program modulo a small number; every step looks up a line and two values worked out before."""

    def puzzle(self, steps: int, rng: random.Random) -> Puzzle:
        targets = [f"v{number}" for number in rng.sample(range(10, 10 * steps + 10), steps)]
        values = dict[str, int]()
        worked, results = [], []
        program = PROGRAM.lines(targets, rng)
        for line in program:
            line.run(values)
            left, right = (values.get(x, x) for x in (line.left, line.right))
            asked = f"{line.left} {line.operator} {line.right}"
            worked.append(f"{asked} -> {left} {line.operator} {right} -> {line.target} = {values[line.target]}")
            results.append((line.target, str(values[line.target])))
        source = "\n".join(f"{line.target} <- {line.left} {line.operator} {line.right}" for line in program)
        message = (
            f"Run this program. All values are integers modulo {MODULUS}, from 0 to {MODULUS - 1}.\n\n{source}\n\n"
            "Work through every line in order and write one line for each, exactly in this form:\n"
            "Step 1: v3 + v8 -> 5 + 4 -> v21 = 2\n"
            "After the last line of the program write its value as\nFinal: 2\nWrite nothing else."
        )
        return Puzzle(message, tuple(worked), tuple(results), str(values[targets[-1]]))

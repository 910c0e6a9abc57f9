"""The tasks of `specontext.tasks` as the suites ask them: in exactly the words that models such as `nano` are trained on."""

from __future__ import annotations

import re
from dataclasses import dataclass

from specontext.evaluation.suites.example import Example, TextTools
from specontext.evaluation.suites.generated import SuiteError, speaks_tasks_only
from specontext.evaluation.suites.matching import match_words
from specontext.tasks import Task, correct_steps, sample_problems
from specontext.tasks.problem import Problem

SPARE_TOKENS = 16  # beyond the answer


@dataclass(frozen=True)
class TrainedTask:
    """A generated task in plain text, without a chat template.

    Attributes:
        asked_otherwise: whether the suite asks the same of other models in its own words; this form is for trained models then.
        default_lengths: lengths in tokens, prompt and answer together, where none are asked for.
    """

    suite: str
    task: Task
    asked_otherwise: bool
    default_lengths: tuple[int, ...] = (4096,)

    @property
    def name(self) -> str:
        return self.task.name

    def examples(self, *, length: int | None, n: int, seed: int, text: TextTools) -> list[Example]:
        """The problems that `specontext tasks sample` draws.

        Raises:
            SuiteError: no length was given.
            LengthError: the length cannot hold a problem.
        """
        if length is None:
            raise SuiteError(f"{self.suite}/{self.name} is generated and needs a length in tokens: give one with --lengths")
        problems = sample_problems(self.name, length=length, seed=seed, n=n, count_tokens=text.count_tokens)
        return [self._example(f"{seed}-{i}", length, problem, text) for i, problem in enumerate(problems)]

    def _example(self, key: str, length: int, problem: Problem, text: TextTools) -> Example:
        most = text.count_tokens(" " + problem.answer) + SPARE_TOKENS
        return Example(self.suite, self.name, key, problem.prompt, self._references(problem), most, length, details=vars(problem))

    def _references(self, problem: Problem) -> tuple[str, ...]:
        if self.name.startswith("niah"):
            return tuple(re.findall(r"\d+", problem.answer))
        return tuple(re.findall(r"\w+", problem.answer)) if self.name == "variable_tracking" else (problem.answer,)

    def score(self, example: Example, output: str) -> dict[str, float]:
        """Retrieval and tracking: the share of values or variables found, and `exact`, the whole answer word by word.

        Programs: `score` and `final`, the last worked line at the output's end; `steps`, the share of worked lines that are
        right at their place; `exact`.
        """
        problem = Problem(**example.details)
        exact = float(problem.solved_by(output))
        if self.name != "program":
            return {"score": match_words(output, example.references), "exact": exact}
        last = problem.answer.rstrip(";").rpartition(";")[2].strip()
        final = float(output.strip().rstrip(";").rpartition(";")[2].strip() == last)
        return {"score": final, "final": final, "steps": correct_steps(problem, output), "exact": exact}

    def unfit(self, text: TextTools) -> str | None:
        """Why the task is left out for a model unless it is asked for by name; None where it is not."""
        if self.asked_otherwise and not speaks_tasks_only(text):
            return "the plain form for models trained on it, such as nano; the suite asks the same in other words"
        return None

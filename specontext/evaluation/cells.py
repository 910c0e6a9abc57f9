"""The problems of an evaluation, drawn before anything runs: a cell for each task and length, and what had to be left out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from specontext.evaluation.samples import EvaluationError
from specontext.evaluation.settings import EvaluationSettings
from specontext.evaluation.suites import SUITES, EvalTask, Example, TextTools
from specontext.evaluation.text_tools import prompt_ids
from specontext.evaluation.windows import Text
from specontext.tasks import LengthError

Note = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """An example as tokens."""

    example: Example
    token_ids: list[int]


@dataclass(frozen=True)
class EvalCell:
    """The problems of a task at a length."""

    task: EvalTask
    length: int | None
    problems: tuple[Problem, ...]


def choose_tasks(
    settings: EvaluationSettings, text: TextTools, max_length: int, notes: list[Note], texts: Sequence[Text] = ()
) -> list[EvalTask]:
    """The tasks of all suites: those asked for by name, or all that fit the model.

    Args:
        texts: that were given, for the suites that are about texts.
        max_length: longest context of the model in tokens.
        notes: gets what is left out, and why.

    Raises:
        EvaluationError: a name that no suite has, or nothing left.
        SpeContextError: data that cannot be read.
    """
    chosen: list[EvalTask] = []
    known: set[str] = set()
    for suite in settings.suites:
        tasks = _tasks_of(suite, settings, max_length, texts)
        known |= {task.name for task in tasks}
        reasons = [(task, _why_unfit(task, text)) for task in tasks]
        fit = {task.name for task, why in reasons if why is None}
        for task, why in reasons:
            named = settings.tasks is not None and task.name in settings.tasks
            if why is None and (named or settings.tasks is None):
                chosen.append(task)
            elif named and task.name not in fit:
                chosen.append(task)
                notes.append(_note(task, why=f"run although it does not fit, since it was asked for: {why}"))
            elif settings.tasks is None and task.name not in fit:
                notes.append(_note(task, why=f"left out: {why}"))
    if missing := [name for name in settings.tasks or () if name not in known]:
        raise EvaluationError(f"no task '{missing[0]}' in {', '.join(settings.suites)}: choose among {', '.join(sorted(known))}")
    if not chosen:
        raise EvaluationError("no task is left: " + "; ".join(sorted({note["why"] for note in notes})))
    return chosen


def _tasks_of(suite: str, settings: EvaluationSettings, max_length: int, texts: Sequence[Text]) -> list[EvalTask]:
    """The tasks of a suite, told what its factory has parameters for."""
    factory = SUITES[suite]
    known = inspect.signature(factory).parameters
    if settings.judge is not None and "judge" not in known:
        raise EvaluationError(f"a judge was named and the answers of '{suite}' are not judged: leave it out")
    wanted = {"max_length": max_length, "judge": settings.judge, "texts": texts}
    return factory(data=settings.data, **{name: value for name, value in wanted.items() if name in known})


def _why_unfit(task: EvalTask, text: TextTools) -> str | None:
    unfit = getattr(task, "unfit", None)
    return None if unfit is None else unfit(text)


def draw_cells(
    tasks: list[EvalTask], settings: EvaluationSettings, text: TextTools, tokenizer: Any, max_length: int, notes: list[Note]
) -> Iterator[EvalCell]:
    """Draw the problems of each task and length; arguments as of `choose_tasks`.

    Raises:
        EvaluationError: two problems with one key.
        SpeContextError: data that cannot be read.
    """
    opening = len(prompt_ids(tokenizer, "x")) - text.count_tokens("x")  # special tokens, which tasks do not count
    for task in tasks:
        own: tuple[int | None, ...] = getattr(task, "default_lengths", (None,))
        for length in settings.lengths or own:
            if length is not None and length > max_length:
                notes.append(_note(task, length, f"skipped: the model's contexts end at {max_length} tokens"))
                continue
            try:
                room = None if length is None else min(length, max_length - opening)
                examples = task.examples(length=room, n=settings.limit, seed=settings.seed, text=text)
            except LengthError as error:
                notes.append(_note(task, length, f"skipped: {error}"))
                continue
            if len({example.key for example in examples}) < len(examples):
                raise EvaluationError(f"{task.suite}/{task.name} has two problems with one key: its keys must be distinct")
            problems = [Problem(example, prompt_ids(tokenizer, example.prompt)) for example in examples]
            fitting = tuple(problem for problem in problems if len(problem.token_ids) < max_length)
            if too_long := len(problems) - len(fitting):
                notes.append(_note(task, length, f"{too_long} problems skipped: the model's contexts end at {max_length} tokens"))
            if len(problems) < settings.limit:
                notes.append(
                    _note(task, length, f"the data has fewer problems than the limit of {settings.limit}: {len(problems)}")
                )
            if fitting:
                yield EvalCell(task, length, fitting)


def _note(task: EvalTask, length: int | None = None, why: str | None = None) -> Note:
    at = {} if length is None else {"length": length}
    return {"suite": task.suite, "task": task.name, **at, "why": why}

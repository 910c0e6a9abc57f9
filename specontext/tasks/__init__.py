"""Generated tasks whose answers need the far context; any tokenizer, any length, drawn from a seed.

Here lives what a problem is and how it is drawn; scoring of methods and reports do not live here.
"""

from __future__ import annotations

import random

from specontext.tasks.problem import LengthError, Problem, TokenCounter
from specontext.tasks.program import PROGRAM, ProgramTask, correct_steps
from specontext.tasks.retrieval import MULTI_KEY, MULTI_QUERY, MULTI_VALUE, SINGLE, RetrievalTask
from specontext.tasks.tracking import VARIABLE_TRACKING, TrackingTask

Task = RetrievalTask | TrackingTask | ProgramTask

TASKS: dict[str, Task] = {task.name: task for task in (SINGLE, MULTI_KEY, MULTI_QUERY, MULTI_VALUE, VARIABLE_TRACKING, PROGRAM)}


def get_task(name: str) -> Task:
    """The task called `name`.

    Raises:
        ValueError: there is no such task; the message lists the names.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task '{name}': choose one of {', '.join(TASKS)}")
    return TASKS[name]


def sample_problems(name: str, *, length: int, seed: int, n: int, count_tokens: TokenCounter) -> list[Problem]:
    """Draw `n` problems of task `name`; the same arguments give the same problems.

    Args:
        length: tokens that prompt and answer may take together.
        count_tokens: number of tokens of a text under the tokenizer of the model that will be asked.

    Raises:
        ValueError: unknown task, or a length that cannot hold it.
    """
    task = get_task(name)
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    rng = random.Random(f"{name}/{length}/{seed}")
    return [task.sample(length, rng, count_tokens) for _ in range(n)]


__all__ = ["TASKS", "LengthError", "Problem", "Task", "correct_steps", "get_task", "sample_problems"]

"""`specontext tasks`."""

from __future__ import annotations

from typing import Any

import pytest

from specontext.tasks import TASKS


def test_list(run: Any) -> None:
    assert run("tasks", "list", "--json").json == list(TASKS)
    assert run("tasks", "list").stdout.split() == list(TASKS)


@pytest.mark.parametrize("task", list(TASKS))
def test_sample(run: Any, task: str) -> None:
    words = ["tasks", "sample", "--task", task, "--length", 600, "--n", 3]
    problems = run(*words, "--seed", 7, "--json").json
    assert len(problems) == 3
    for problem in problems:
        assert list(problem) and set(problem) == {"prompt", "answer", "task", "length"}
        assert problem["task"] == task and isinstance(problem["answer"], str)
    assert problems == run(*words, "--seed", 7, "--json").json
    assert problems != run(*words, "--seed", 8, "--json").json
    printed = run(*words, "--seed", 7).stdout
    assert printed.count(f"--- {task}") == 3 and problems[0]["prompt"][:100] in printed


def test_a_checkpoint_directory_counts_with_its_own_tokenizer(run: Any, tiny: Any) -> None:
    words = ["tasks", "sample", "--task", "niah_single", "--length", 200, "--json"]
    assert run(*words, "--model", tiny).json == run(*words).json

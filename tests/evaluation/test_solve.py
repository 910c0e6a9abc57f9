"""Scoring of what a model writes, with a model that knows the answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from specontext.core import CompletionOutput, RequestOutput
from specontext.evaluation.solve import AVERAGED, solve, summarize
from specontext.evaluation.token_counter import token_counter
from specontext.sampling_params import SamplingParams
from specontext.tasks import Problem, sample_problems


class Oracle:
    """Writes `answer(problem)` and claims that step statistics equal the problem's number."""

    def __init__(self, tokenizer: Any, problems: list[Problem], answer: Callable[[Problem], str]) -> None:
        self.tokenizer, self.answer = tokenizer, answer
        self.known = {problem.prompt: i for i, problem in enumerate(problems)}
        self.problems = problems
        self.asked: list[SamplingParams] = []

    def generate(self, prompts: list[str], params: list[SamplingParams], *, progress: bool = False) -> list[RequestOutput]:
        self.asked = params
        outputs = []
        for prompt in prompts:
            number = self.known[prompt]
            stats: dict[str, Any] = dict.fromkeys(AVERAGED, float(number)) | {"completion_tokens": 10}
            stats["overlap"] = None if number == 0 else 0.5
            stats["attention_recall"] = None
            text = self.answer(self.problems[number])
            outputs.append(RequestOutput(str(number), [1], [CompletionOutput(text, [2], "stop", stats=stats)]))
        return outputs


@pytest.fixture
def problems() -> list[Problem]:
    return sample_problems("niah_single", length=100, seed=0, n=3, count_tokens=token_counter("nano"))


def test_right_answers(tokenizer: Any, problems: list[Problem]) -> None:
    llm = Oracle(tokenizer, problems, lambda problem: f" {problem.answer} and more")
    scored = solve(llm, problems)
    assert [one.problem for one in scored] == problems
    assert all(one.correct and one.steps is None and one.finish_reason == "stop" for one in scored)
    for problem, params in zip(problems, llm.asked, strict=True):
        assert params.temperature == 0
        assert params.max_tokens > len(tokenizer.encode(problem.answer, add_special_tokens=False))


def test_wrong_answers(tokenizer: Any, problems: list[Problem]) -> None:
    llm = Oracle(tokenizer, problems, lambda problem: problem.answer if problem == problems[0] else "nothing")
    assert summarize(solve(llm, problems)).exact_match == pytest.approx(1 / 3)


def test_means_leave_out_what_is_undefined(tokenizer: Any, problems: list[Problem]) -> None:
    summary = summarize(solve(Oracle(tokenizer, problems, lambda problem: problem.answer), problems))
    assert summary.problems == 3 and summary.completion_tokens == 10
    assert summary.stats["tokens_read_per_step"] == 1
    assert summary.stats["overlap"] == 0.5
    assert summary.stats["attention_recall"] is None
    assert summary.correct_steps is None


def test_programs_are_scored_by_step(tokenizer: Any) -> None:
    problems = sample_problems("program", length=300, seed=0, n=2, count_tokens=token_counter("nano"))
    half = lambda problem: ";".join(problem.answer.split(";")[: problem.answer.count(";") // 2])  # noqa: E731
    summary = summarize(solve(Oracle(tokenizer, problems, half), problems))
    assert summary.exact_match == 0
    assert summary.correct_steps == pytest.approx(0.5, abs=0.1)

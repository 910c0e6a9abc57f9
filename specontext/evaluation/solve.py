"""Let a model solve generated problems and score what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from specontext.core import RequestOutput
from specontext.sampling_params import SamplingParams
from specontext.tasks import Problem, correct_steps

SPARE_TOKENS = 16
AVERAGED = (
    "tokens_read_per_step",
    "selection_bytes_per_step",
    "bytes_loaded_per_step",
    "bytes_full_per_step",
    "overlap",
    "hit_rate",
    "attention_recall",
    "ttft_s",
    "tpot_s",
)


class Generator(Protocol):
    """The part of `LLM` that solving needs."""

    @property
    def tokenizer(self) -> Any: ...

    def generate(self, prompts: list[str], params: list[SamplingParams], *, progress: bool = False) -> list[RequestOutput]: ...


@dataclass(frozen=True)
class Scored:
    """One problem and what a model made of it.

    Attributes:
        correct: exact match, the output contains the answer verbatim.
        steps: share of correct steps, for tasks that are scored by step.
    """

    problem: Problem
    output: str
    finish_reason: str | None
    correct: bool
    steps: float | None
    stats: dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """Means over problems; a statistic is None where no output defines it."""

    problems: int
    exact_match: float
    correct_steps: float | None
    completion_tokens: float
    stats: dict[str, float | None]


def solve(llm: Generator, problems: Sequence[Problem], *, progress: bool = False) -> list[Scored]:
    """Answer all problems together, greedily, with room for the answer and a little more."""
    params = [SamplingParams(temperature=0.0, max_tokens=_answer_tokens(llm, problem) + SPARE_TOKENS) for problem in problems]
    outputs = llm.generate([problem.prompt for problem in problems], params, progress=progress)
    return [score(problem, output) for problem, output in zip(problems, outputs, strict=True)]


def score(problem: Problem, output: RequestOutput) -> Scored:
    """Compare an output with the problem's answer."""
    return Scored(
        problem,
        output.text,
        output.finish_reason,
        correct=problem.solved_by(output.text),
        steps=correct_steps(problem, output.text) if problem.task == "program" else None,
        stats=dict(output.stats),
    )


def summarize(scored: Sequence[Scored]) -> Summary:
    """Means over the problems of one cell of a table."""
    steps = [one.steps for one in scored if one.steps is not None]
    return Summary(
        problems=len(scored),
        exact_match=sum(one.correct for one in scored) / len(scored),
        correct_steps=sum(steps) / len(steps) if steps else None,
        completion_tokens=sum(one.stats["completion_tokens"] for one in scored) / len(scored),
        stats={name: _mean([one.stats.get(name) for one in scored]) for name in AVERAGED},
    )


def _answer_tokens(llm: Generator, problem: Problem) -> int:
    return len(llm.tokenizer.encode(" " + problem.answer, add_special_tokens=False))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None

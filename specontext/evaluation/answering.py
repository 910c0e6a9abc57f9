"""A method answers the problems of a cell, many at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from specontext.core import RequestOutput
from specontext.engine.llm import LLM
from specontext.evaluation.cells import EvalCell, Problem
from specontext.evaluation.competitors import Choice
from specontext.evaluation.samples import MEASURES, Sample, SampleId, fingerprint
from specontext.sampling_params import SamplingParams


def batches(problems: Sequence[Problem], most: int) -> Iterator[Sequence[Problem]]:
    """The problems in as few batches as possible, all of about the same size."""
    count = -(-len(problems) // most)
    edges = [len(problems) * i // count for i in range(count + 1)]
    for start, stop in pairwise(edges):
        yield problems[start:stop]


def sample_id(cell: EvalCell, problem: Problem, choice: Choice) -> SampleId:
    """What the answer to a problem is known by."""
    return (cell.task.suite, cell.task.name, cell.length, problem.example.key, choice[0].label, choice[1])


def answer(llm: LLM, cell: EvalCell, problems: Sequence[Problem], choice: Choice, seed: int) -> list[Sample]:
    """Let one method answer problems, all together; by the seed the choice of `random` does not depend on what ran before."""
    competitor, budget = choice
    greedy = SamplingParams(temperature=0.0, seed=seed, method=competitor.method, budget=budget)
    params = [replace(greedy, max_tokens=p.example.max_tokens, stop=p.example.stop) for p in problems]
    began = time.perf_counter()
    outputs = llm.generate([p.token_ids for p in problems], params)
    seconds = (time.perf_counter() - began) / len(problems)
    return [_sample(cell, p, choice, output, seconds) for p, output in zip(problems, outputs, strict=True)]


def _sample(cell: EvalCell, problem: Problem, choice: Choice, output: RequestOutput, seconds: float) -> Sample:
    scores = cell.task.score(problem.example, output.text)
    stats = {name: output.stats[name] for name in MEASURES if name in output.stats}
    return Sample(
        *sample_id(cell, problem, choice),
        scores["score"],
        scores,
        output.text,
        output.finish_reason,
        len(output.token_ids),
        stats,
        seconds,
        fingerprint(problem.token_ids),
    )

"""Whatever PyTorch is set to around an engine, tokens are the same, or the call is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.errors import RequestError
from specontext.retrieval.registry import METHODS
from tests.conftest import Prompts

MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad, "none": nullcontext}


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default(request: pytest.FixtureRequest) -> Iterator[Callable[[bool], None]]:
    """default(True) sets another default number format, default(False) the usual one."""

    def change(other: bool) -> None:
        torch.set_default_dtype(request.param if other else torch.float32)

    yield change
    change(False)


def tokens(llm: LLM, prompts: Prompts) -> list[list[int]]:
    greedy = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, logprobs=1)
    sampled = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=3, max_tokens=10, ignore_eos=True)
    return [output.token_ids for output in llm.generate(prompts[:2], [greedy, sampled])]


@pytest.mark.parametrize("method", METHODS)
def test_a_default_number_format(
    method: str, default: Callable[[bool], None], make_llm: Callable[..., LLM], prompts: Prompts
) -> None:
    budget = None if method == "full" else 24
    made = []
    for other in (False, True):
        default(other)
        made.append(tokens(make_llm(method=method, budget=budget, max_num_batched_tokens=32), prompts))
    assert made[0] == made[1]


@pytest.mark.parametrize("around", MODES)
def test_an_engine_that_is_made_in_one_mode_runs_in_all(around: str, make_llm: Callable[..., LLM], prompts: Prompts) -> None:
    with MODES[around]():
        llm = make_llm(budget=24, offload_layers=2, max_num_batched_tokens=32)
    expected = tokens(make_llm(budget=24), prompts)
    for mode in MODES.values():
        with mode():
            assert tokens(llm, prompts) == expected
    with torch.inference_mode():
        llm.reconfigure(SpeContextConfig(method="quest", budget=24, sink=2, recent=4))
    assert tokens(llm, prompts) == tokens(make_llm(method="quest", budget=24), prompts)


@pytest.mark.parametrize(
    ("around", "says"),
    [
        (lambda: torch.autocast("cpu", torch.bfloat16), "autocast changes number formats"),
        (lambda: torch.device("meta"), "PyTorch's default device is meta"),
    ],
)
def test_what_would_change_the_computation_is_refused(
    around: Callable[[], AbstractContextManager[object]], says: str, make_llm: Callable[..., LLM], prompts: Prompts
) -> None:
    llm = make_llm(budget=24)
    calls: list[Callable[[], object]] = [
        lambda: make_llm(budget=24),
        lambda: llm.generate(prompts[:1]),
        lambda: llm.stream(prompts[0]),
    ]
    for call in calls:
        with pytest.raises(RequestError, match=says), around():
            call()

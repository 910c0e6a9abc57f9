"""Chunks of several prompts in one step, as a GPU attends to them: short beginnings together, all others by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from specontext import LLM, SamplingParams
from specontext.engine import prefill
from specontext.kernels.dense_attention import causal_attention


@pytest.mark.parametrize(("chunk", "seats", "most"), [(1024, 8, 5), (64, 8, 3), (40, 2, 2)])
def test_prompts_that_attend_together_get_the_tokens_of_those_that_do_not(
    chunk: int,
    seats: int,
    most: int,
    make_llm: Callable[..., LLM],
    prompts: list[list[int]],
    greedy: Callable[..., SamplingParams],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = [*prompts, prompts[0][:1]]
    llm = make_llm("llama", max_num_batched_tokens=chunk, max_num_seqs=seats, enable_prefix_caching=False)
    expected = [output.token_ids for output in llm.generate(prompts, greedy(3))]
    calls: list[int] = []

    def together(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float) -> Tensor:
        lengths = bounds.diff().tolist()
        assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == len(query) and longest == max(lengths)
        calls.append(len(lengths))
        parts: Any = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        return torch.cat([causal_attention(*part, scale) for part in parts])

    monkeypatch.setattr(prefill, "serves", lambda _: True)
    monkeypatch.setattr(prefill, "packed_attention", together)
    assert [output.token_ids for output in llm.generate(prompts, greedy(3))] == expected
    assert max(calls) == most and min(calls) > 1

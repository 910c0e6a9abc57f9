"""Outputs whose tokens are given beforehand, and the logits that are seen on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from specontext import LLM, SamplingParams
from specontext.errors import RequestError

Greedy = Callable[..., SamplingParams]


def run(llm: LLM, *requests: dict[str, Any]) -> list[tuple[Any, torch.Tensor]]:
    """All requests in one batch: their generations, and the logits [tokens, V] before each output token."""
    rows: list[list[torch.Tensor]] = [[] for _ in requests]
    generations = [
        llm.engine.add_request(f"{number}", on_logits=lambda row, seen=rows[number]: seen.append(row.clone()), **request)
        for number, request in enumerate(requests)
    ]
    while not all(generation.finished for generation in generations):
        llm.engine.step()
    return [(generation, torch.stack(seen)) for generation, seen in zip(generations, rows, strict=True)]


@pytest.mark.parametrize("chunk", [1024, 20])
def test_forced_tokens_are_the_output_and_their_logits_the_model_s(
    chunk: int,
    make_llm: Callable[..., LLM],
    reference: Callable[[str], PreTrainedModel],
    prompts: list[list[int]],
    greedy: Greedy,
) -> None:
    prompt, forced = prompts[3], prompts[1][:6]
    llm = make_llm("qwen3", "full", max_num_batched_tokens=chunk)
    free = {"prompt": prompts[2], "params": greedy(4)}
    (made, rows), (beside, _) = run(llm, {"prompt": prompt, "params": greedy(len(forced)), "forced": forced}, free)
    assert made.request.output_token_ids == forced and made.request.finish_reason == "length"
    expected = reference("qwen3")(torch.tensor([prompt + forced])).logits[0, len(prompt) - 1 : -1]
    torch.testing.assert_close(rows, expected, atol=2e-4, rtol=1e-4)
    assert beside.request.output_token_ids == llm.generate([prompts[2]], greedy(4))[0].token_ids


def test_what_follows_forced_tokens_is_sampled(make_llm: Callable[..., LLM], prompts: list[list[int]], greedy: Greedy) -> None:
    llm, forced = make_llm("llama", "full"), prompts[1][:3]
    [(made, rows)] = run(llm, {"prompt": prompts[3], "params": greedy(7), "forced": forced})
    assert made.request.output_token_ids == forced + rows[3:].argmax(-1).tolist()
    assert rows.shape[0] == 7


def test_what_cannot_be_forced(make_llm: Callable[..., LLM], prompts: list[list[int]], greedy: Greedy) -> None:
    engine = make_llm("llama", "full").engine
    with pytest.raises(RequestError, match="not a token id"):
        engine.add_request("0", prompts[0], greedy(2), forced=[10**6])
    with pytest.raises(RequestError, match="leave logprobs out"):
        engine.add_request("0", prompts[0], greedy(2, logprobs=1), forced=[5])
    assert not engine.has_work

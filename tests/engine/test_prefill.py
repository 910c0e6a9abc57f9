"""Chunks of several prompts in one step, as a GPU attends to them: short beginnings together, all others by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from specontext import LLM, SamplingParams
from specontext.engine import prefill
from specontext.engine.chunk_warm_up import warm_up_chunks
from specontext.errors import ConfigError
from specontext.kernels.dense_attention import causal_attention
from tests.kv.test_streams import RecordingStreams


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


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("method", ["full", "speculative", "snapkv", "h2o", "quest", "shadowkv", "clusterkv"])
def test_chunks_of_padding_store_nothing(
    method: str, beside: bool, make_llm: Callable[..., LLM], prompts: list[list[int]], greedy: Callable[..., SamplingParams]
) -> None:
    """They run before the first prompt comes, while nobody has a seat; and beside requests, which get the same tokens."""
    llm = make_llm("llama", method, offload_layers=2, max_num_batched_tokens=40)
    engine, kv = llm.engine, llm.engine.parts.kv
    if beside:
        kv.transfers.run_on(RecordingStreams())
    expected = [output.token_ids for output in llm.generate(prompts, greedy(3))]
    bits = [pool.rows.view(torch.uint8) for pool in (kv.arena, kv.host)]  # what nobody wrote may be no number
    before = [one.clone() for one in bits]
    warm_up_chunks(engine.runner.run, engine.parts)
    engine.check_integrity()
    assert all(map(torch.equal, before, bits))
    engine.parts.prefix.reset()
    assert [output.token_ids for output in llm.generate(prompts, greedy(3))] == expected


@pytest.mark.parametrize(
    "options", [{"max_num_batched_tokens": 40, "max_num_mixed_tokens": 41}, {"max_num_mixed_tokens": 1 << 20}]
)
def test_more_tokens_beside_requests_that_decode_than_without_are_refused(
    options: dict[str, int], make_llm: Callable[..., LLM]
) -> None:
    with pytest.raises(ConfigError, match=r"max_num_mixed_tokens .* raise max_num_batched_tokens"):
        make_llm("llama", **options)


def steps_of(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Where each step of an LLM notes how many requests decode in it, and its tokens."""
    steps: list[tuple[int, int]] = []
    run = llm.engine.runner.run

    def noting(batch: Any) -> Tensor:
        steps.append((batch.num_decodes, len(batch.token_ids)))
        return run(batch)

    monkeypatch.setattr(llm.engine.runner, "run", noting)
    return steps


def most_mixed(steps: list[tuple[int, int]]) -> int:
    return max(tokens for decodes, tokens in steps if 0 < decodes < tokens)


@pytest.mark.parametrize(
    ("options", "most"),
    [({"max_num_mixed_tokens": 9}, 9), ({}, 40), ({"max_tpot_ms": 1e6}, 11)],
    ids=str,
)
def test_chunks_are_large_where_nobody_decodes_or_no_token_is_awaited(
    options: dict[str, Any],
    most: int,
    make_llm: Callable[..., LLM],
    prompts: list[list[int]],
    greedy: Callable[..., SamplingParams],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("specontext.config.MIXED_TOKENS", 11)
    llm = make_llm("llama", max_num_batched_tokens=40, **options)
    expected = make_llm("llama").generate(prompts, greedy(30))
    steps = steps_of(llm, monkeypatch)
    found = llm.generate(prompts, greedy(30))
    assert [output.token_ids for output in found] == [output.token_ids for output in expected]
    assert steps[0] == (0, 40)
    assert most_mixed(steps) == most


def test_chunks_are_small_beside_a_stream(
    make_llm: Callable[..., LLM], prompts: list[list[int]], greedy: Callable[..., SamplingParams], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specontext.config.MIXED_TOKENS", 11)
    llm = make_llm("llama", max_num_batched_tokens=40, enable_prefix_caching=False)
    expected = llm.generate(prompts, greedy(30))
    stream = llm.stream(prompts[0][:20], greedy(100))
    next(stream)
    next(stream)
    steps = steps_of(llm, monkeypatch)
    found = llm.generate(prompts, greedy(30))
    assert [output.token_ids for output in found] == [output.token_ids for output in expected]
    assert most_mixed(steps) == 11
    stream.close()

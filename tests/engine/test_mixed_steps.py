"""Steps of decode tokens and chunks: decode tokens go through captured steps, and every request gets the tokens it gets alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from specontext import LLM, SamplingParams
from specontext.core import Batch, Choice, Lane, Segment
from specontext.engine.batch_parts import joined, lane_part, rest_part
from specontext.engine.runner import MOST_CAPTURED

MakeLLM = Callable[..., LLM]
Greedy = Callable[..., SamplingParams]
Prompts = list[list[int]]
Change = Callable[[LLM], Any]


def outputs(llm: LLM, prompts: Prompts, params: list[SamplingParams]) -> list[Any]:
    """Of requests that come one after the other, so that each one's chunks meet the decode tokens of those before."""
    generations = []
    for i, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
        generations.append(llm.engine.add_request(str(i), prompt, one))
        for _ in range(3):
            llm.engine.step()
    while llm.engine.has_work:
        llm.engine.step()
    llm.engine.check_integrity()
    return generations


@pytest.mark.parametrize("offload_layers", [0, 2, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("family", "method"),
    [("llama", "speculative"), ("llama", "full"), pytest.param("bands", "speculative", marks=pytest.mark.slow)],
)
def test_chunks_beside_captured_steps_change_nothing(
    family: str,
    method: str,
    offload_layers: int | None,
    make_llm: MakeLLM,
    prompts: Prompts,
    greedy: Greedy,
    as_if_captured: Change,
) -> None:
    options = {"budget": 12, "offload_layers": offload_layers, "max_num_batched_tokens": 20}
    plain, split = (make_llm(family, method, **options) for _ in range(2))
    graphs = as_if_captured(split)
    params = [greedy(12), greedy(12, prompt_logprobs=2), greedy(12), greedy(12)]
    expected, found = (outputs(llm, prompts, params) for llm in (plain, split))
    streamed = method == "full" and offload_layers == 2
    for one, other in zip(expected, found, strict=True):
        assert other.request.token_ids == one.request.token_ids
        before, now = one.stats.as_dict(), other.stats.as_dict()
        same = ("decode_steps", "tokens_read_per_step", "hit_rate", "overlap", "bytes_loaded_per_step")
        assert {name: now[name] for name in same} == {name: before[name] for name in same}
        assert now["captured_steps"] == (0 if streamed else now["decode_steps"])
        if one.request.prompt_logprobs is not None:
            for expected_row, row in zip(one.request.prompt_logprobs[1:], other.request.prompt_logprobs[1:], strict=True):
                assert row == pytest.approx(expected_row, abs=1e-4)
    assert bool(graphs.replayed) != streamed


def test_requests_that_choose_differently_have_captured_steps_side_by_side(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, as_if_captured: Change
) -> None:
    options = {"budget": 14, "offload_layers": 0, "methods": ("full", "streaming", "clusterkv"), "max_num_batched_tokens": 24}
    plain, split = (make_llm("llama", **options) for _ in range(2))
    graphs = as_if_captured(split)
    params = [greedy(30), greedy(30, method="full"), greedy(30, method="clusterkv"), greedy(30, method="streaming", budget=9)]
    expected, found = (outputs(llm, [prompts[1]] * 4, params) for llm in (plain, split))
    assert [one.request.token_ids for one in found] == [one.request.token_ids for one in expected]
    assert {kind.choice for kind in graphs.replayed} == {None, Choice("full", 0), Choice("streaming", 9)}
    steps = [one.stats.captured_steps for one in found]
    assert steps[0] == 29 and 0 < steps[1] < 29 and steps[2] == 0, "named ways once they recur, and one that asks the host never"


def test_many_ways_at_once_share_one_forward_pass(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, as_if_captured: Change
) -> None:
    """Each captured step reads the weights again."""
    many = MOST_CAPTURED + 1
    llm = make_llm("llama", budget=30, offload_layers=0, max_num_seqs=many)
    graphs = as_if_captured(llm)
    ways = [greedy(12, budget=10 + i) for i in range(many)]
    asked = [[20 + i, *prompts[1]] for i in range(many)]
    found = [one.token_ids for one in llm.generate(asked, ways)]
    assert not graphs.replayed
    alone = make_llm("llama", budget=30)
    assert found == [alone.generate(one, way)[0].token_ids for one, way in zip(asked, ways, strict=True)]


def test_a_batch_taken_apart_and_joined() -> None:
    a, b = Choice("full", 0), Choice("streaming", 9)
    lanes = (Lane(a, 0, 2, 7), Lane(None, 2, 3, 9), Lane(b, 3, 5, 8))
    numbers = torch.arange(12)
    batch = Batch(
        numbers,
        numbers + 100,
        numbers + 200,
        numbers + 300,
        torch.arange(5),
        5,
        (Segment(7, 0, 3, 5), Segment(8, 4, 4, 8)),
        torch.tensor([0, 1, 2, 3, 4, 7, 11]),
        9,
        lanes,
    )
    own, rest = lane_part(batch, lanes[1]), rest_part(batch, [lanes[1]])
    assert own.batch.token_ids.tolist() == [2] and own.batch.lanes == (Lane(None, 0, 1, 9),)
    assert rest is not None and rest.batch.token_ids.tolist() == [0, 1, *range(3, 12)]
    assert rest.batch.lanes == (Lane(a, 0, 2, 7), Lane(b, 2, 4, 8)) and rest.batch.span == 8
    assert rest.batch.prefills == (Segment(7, 0, 3, 4), Segment(8, 4, 4, 7))
    assert rest.batch.token_ids[rest.batch.last_tokens].tolist() == [0, 1, 3, 4, 7, 11]
    parts = [(part, part.batch.token_ids[part.batch.last_tokens][:, None].float()) for part in (own, rest)]
    assert joined(parts, 7).flatten().tolist() == [0, 1, 2, 3, 4, 7, 11]
    only = rest_part(batch, lanes)
    assert only is not None and only.batch.num_decodes == 0 and only.batch.lanes == () and only.shift == 5

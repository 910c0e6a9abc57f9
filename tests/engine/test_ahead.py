"""The next step is launched before the host has this one's tokens: outputs, statistics and what is kept are the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from specontext import LLM, SamplingParams
from specontext.engine import sampler
from specontext.engine.runner import ModelRunner
from specontext.engine.statistics import Count
from specontext.errors import DeviceMemoryError, LogitsError, NamedRequestsError
from specontext.kernels.token_choice import Draw

MakeLLM = Callable[..., LLM]
Greedy = Callable[..., SamplingParams]
Prompts = list[list[int]]
PAGE = 16 * 2 * 2 * 24 * 4  # bytes of a page of one layer of the Llama checkpoint: 16 tokens, two heads, K and V, 24 numbers
Change = Callable[[LLM], Any]


def ahead(llm: LLM) -> list[tuple[int, int]]:
    """Let an engine on a CPU launch steps ahead; how many decode tokens and chunks each of these has."""
    launched: list[tuple[int, int]] = []
    schedule_ahead = llm.engine.scheduler.schedule_ahead

    def noting(*given: Any) -> Any:
        schedule = schedule_ahead(*given)
        if schedule is not None:
            launched.append((schedule.batch.num_decodes, len(schedule.batch.prefills)))
        return schedule

    llm.engine.runs_ahead = True
    llm.engine.scheduler.schedule_ahead = noting  # type: ignore[method-assign]
    return launched


def said(output: Any) -> dict[str, Any]:
    timed = ("queue_s", "ttft_s", "tpot_s", "step_s", "expected_step_s", "selection_s_per_step")
    return {name: value for name, value in output.stats.items() if name not in timed}


def same(expected: list[Any], found: list[Any]) -> None:
    for one, other in zip(expected, found, strict=True):
        assert (other.token_ids, other.text, other.finish_reason) == (one.token_ids, one.text, one.finish_reason)
        assert said(other) == said(one)


WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.0, "top_p": 0.9, "seed": 4},
    {"method": "full"},
]


def test_steps_ahead_run_on_the_parts_that_an_engine_was_given_last(make_llm: MakeLLM, greedy: Greedy, prompts: Prompts) -> None:
    llm = make_llm("llama")
    right = llm.generate(prompts[:2], greedy(8))
    engine, run = llm.engine, ModelRunner.run
    engine.runner.close()
    head = engine.parts.head
    assert head is not None
    runner = ModelRunner(engine.loaded, engine.parts, feature_layers=head.config.feature_layers, measure_recall=False)
    engine.run_on(engine.parts, runner)
    launched = ahead(llm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRunner, "run", lambda self, batch: run(self, batch) if self is runner else pytest.fail("another's"))
        found = llm.generate(prompts[:2], greedy(8))
    assert launched and [one.token_ids for one in found] == [one.token_ids for one in right]


@pytest.mark.parametrize("offload_layers", [0, 2, None])
@pytest.mark.parametrize("family", ["llama", pytest.param("bands", marks=pytest.mark.slow)])
def test_tokens_and_statistics_are_those_of_one_step_after_the_other(
    family: str, offload_layers: int | None, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy
) -> None:
    plain, hasty = (make_llm(family, budget=14, offload_layers=offload_layers, max_num_batched_tokens=30) for _ in range(2))
    launched = ahead(hasty)
    params = [greedy(20 - 3 * i, **way) for i, way in enumerate(WAYS)]
    same(plain.generate(prompts, params), hasty.generate(prompts, params))
    assert len(launched) > 10 and {(4, 0), (1, 0)} <= {*launched}, "some end by their length before others"
    assert any(decodes and chunks for decodes, chunks in launched)
    hasty.engine.check_integrity()
    assert hasty.engine._ahead is None


def test_ends_that_only_the_host_knows(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    """End tokens and stop strings are seen when a token too many is under way: it counts for nothing."""
    plain, hasty = (make_llm("llama", budget=14, offload_layers=2) for _ in range(2))
    free = [output.token_ids for output in plain.generate(prompts, greedy(16))]
    text = plain.generate(prompts[1], greedy(16))[0].text
    params = [
        greedy(16, stop_token_ids=[free[0][5]]),
        greedy(16, stop=[text[len(text) // 2 :][:4]]),
        greedy(16),
        greedy(16, stop_token_ids=[free[3][9]]),
    ]
    plain.engine.scheduler.forget()
    launched = ahead(hasty)
    expected, found = plain.generate(prompts, params), hasty.generate(prompts, params)
    same(expected, found)
    assert {"stop", "length"} == {output.finish_reason for output in found} and launched
    counted, right = (
        {count.name: value for count, value in zip(Count, llm.engine.parts.meter.overview([])[1], strict=True)}
        for llm in (hasty, plain)
    )
    of_time = ("CHOOSING_S", "TIMED_STEPS")
    assert counted | dict.fromkeys(of_time) == right | dict.fromkeys(of_time)
    hasty.engine.check_integrity()
    assert hasty.engine.parts.kv.arena.pages.num_held == 0
    again = [prompt + output.token_ids for prompt, output in zip(prompts, found, strict=True)]
    same(plain.generate(again, greedy(5)), hasty.generate(again, greedy(5)))


def test_requests_that_come_while_a_step_is_under_way(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    plain, hasty = (make_llm("llama", budget=14, offload_layers=1, max_num_batched_tokens=30) for _ in range(2))
    launched = ahead(hasty)
    found = {}
    for llm in (plain, hasty):
        generations = []
        for i, prompt in enumerate(prompts):
            generations.append(llm.engine.add_request(str(i), prompt, greedy(12)))
            for _ in range(5):
                llm.engine.step()
        while llm.engine.has_work:
            llm.engine.step()
        found[llm] = [one.request.token_ids for one in generations]
    assert found[plain] == found[hasty] and any(decodes and chunks for decodes, chunks in launched)


def test_requests_wait_for_a_seat(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    """A queue keeps nobody from going ahead."""
    plain, hasty = (make_llm("llama", budget=14, max_num_seqs=2) for _ in range(2))
    launched = ahead(hasty)
    params = [greedy(10 + i, temperature=float(i % 2), seed=i) for i in range(8)]
    same(plain.generate(prompts * 2, params), hasty.generate(prompts * 2, params))
    assert len(launched) > 30 and (2, 0) in launched and (1, 1) in launched


def test_a_step_ahead_that_does_not_fit_fails_when_its_turn_comes(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm("llama", budget=14)
    expected = llm.generate(prompts[1], greedy(20))[0]
    llm.engine.reset_prefix_cache()
    launched, run = ahead(llm), llm.engine.runner._forward

    def full(batch: Any) -> torch.Tensor:
        if batch.prefills and batch.num_decodes:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(batch)

    monkeypatch.setattr(llm.engine.runner, "_forward", full)
    one = llm.engine.add_request("one", prompts[1], greedy(20))
    for _ in range(4):
        llm.engine.step()
    llm.engine.add_request("big", prompts[2], greedy(20))
    made = len(one.request.output_token_ids)
    with pytest.raises(DeviceMemoryError) as caught:
        for _ in range(3):
            llm.engine.step()
    assert {*caught.value.request_ids} == {"one", "big"} and (1, 1) in launched
    assert len(one.request.output_token_ids) > made and one.request.output_token_ids == expected.token_ids[: made + 1]
    assert not llm.engine.has_work and llm.engine._ahead is None
    llm.engine.check_integrity()


@pytest.mark.slow
def test_requests_that_are_aborted_or_preempted_in_between(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    """At random, with little memory: who is left gets its tokens, and nothing is lost."""
    alone, three = make_llm("llama", budget=12), [prompts[0], prompts[3], prompts[1]]
    expected = [alone.generate(prompt, greedy(130))[0].token_ids for prompt in three]
    preemptions = 0
    for seed in range(2):
        rng = random.Random(seed)
        llm = make_llm(
            "llama", budget=12, offload_layers=2, gpu_memory=34 * PAGE, host_memory=120 * PAGE, max_num_batched_tokens=40
        )
        launched = ahead(llm)
        generations = [llm.engine.add_request(str(i), prompt, greedy(130)) for i, prompt in enumerate(three)]
        victim = rng.randrange(3)
        for _ in range(rng.randrange(80, 140)):
            llm.engine.step()
        llm.engine.abort(str(victim))
        llm.engine.check_integrity()
        while llm.engine.has_work:
            llm.engine.step()
        for i, generation in enumerate(generations):
            output = generation.request.output_token_ids
            assert output == (expected[i] if i != victim else expected[i][: len(output)])
        llm.engine.check_integrity()
        assert llm.engine._ahead is None and launched
        assert llm.engine.parts.kv.arena.pages.num_held == 0
        preemptions += llm.engine.scheduler.preemptions
    assert preemptions


def test_all_of_a_step_under_way_are_aborted(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    llm = make_llm("llama", budget=14)
    ahead(llm)
    engine = llm.engine
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy(20))
    for _ in range(4):
        engine.step()
    assert engine._ahead is not None
    for i in range(len(prompts)):
        engine.abort(str(i))
    assert engine._ahead is None and not engine.has_work
    engine.check_integrity()


def test_tokens_under_way_can_be_awaited(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    llm = make_llm("llama", budget=14)
    ahead(llm)
    one = llm.engine.add_request("one", prompts[1], greedy(20))
    assert llm.engine.catch_up() == []
    for _ in range(3):
        llm.engine.step()
    made = len(one.request.output_token_ids)
    assert one.request.computed == len(one.request.token_ids), "the next one is being computed"
    assert llm.engine.catch_up() == [one]
    assert len(one.request.output_token_ids) == made + 1 and one.request.computed == len(one.request.token_ids) - 1
    assert llm.engine.runs_ahead


def test_broken_logits_end_their_request_and_no_other(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make_llm("llama", budget=14).generate(prompts[2], greedy(12))[0].token_ids
    llm = make_llm("llama", budget=14)
    ahead(llm)
    engine = llm.engine
    run = engine.runner.run

    def breaking(batch: Any) -> torch.Tensor:
        logits = run(batch).clone()
        if int(batch.positions.max()) >= len(prompts[2]) + 4:
            logits[batch.positions[batch.last_tokens] < len(prompts[2])] = torch.nan
        return logits

    monkeypatch.setattr(engine.runner, "run", breaking)
    broken = engine.add_request("broken", prompts[1], greedy(12))
    whole = engine.add_request("whole", prompts[2], greedy(12))
    with pytest.raises(NamedRequestsError) as caught:
        while engine.has_work:
            engine.step()
    assert isinstance(caught.value, LogitsError) and caught.value.request_ids == ("broken",)
    while engine.has_work:
        engine.step()
    assert broken.request.finish_reason == "abort" and whole.request.output_token_ids == expected
    engine.check_integrity()


@pytest.mark.parametrize("steps", [0, 4])
def test_a_request_for_which_no_token_can_be_chosen_ends_alone(
    steps: int, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm("llama", budget=14)
    expected = llm.generate(prompts[2], greedy(12))[0].token_ids
    launched, draw_tokens = ahead(llm), sampler.draw_tokens

    def breaking(logits: torch.Tensor, tokens: torch.Tensor, draws: Sequence[Draw]) -> None:
        if any(draw.top_k == 3 for draw in draws):
            raise KeyError("a bug")
        draw_tokens(logits, tokens, draws)

    monkeypatch.setattr(sampler, "draw_tokens", breaking)
    whole = llm.engine.add_request("whole", prompts[2], greedy(12))
    for _ in range(steps):
        llm.engine.step()
    llm.engine.add_request("broken", prompts[1], greedy(12, temperature=1.0, top_k=3))
    with pytest.raises(NamedRequestsError, match="a bug"):
        while llm.engine.has_work:
            llm.engine.step()
    while llm.engine.has_work:
        llm.engine.step()
    assert whole.request.output_token_ids == expected and launched
    llm.engine.check_integrity()


def test_beside_captured_steps(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, as_if_captured: Change) -> None:
    """Logits of a step are overwritten by the next one before its tokens are read."""
    plain, hasty = (make_llm("llama", budget=14, offload_layers=2, max_num_batched_tokens=30) for _ in range(2))
    as_if_captured(hasty)
    launched = ahead(hasty)
    params = [greedy(20 - 3 * i, **way) for i, way in enumerate(WAYS[:3])]
    expected, found = (llm.generate(prompts[:3], params) for llm in (plain, hasty))
    assert [one.token_ids for one in found] == [one.token_ids for one in expected] and launched
    for one in found:
        assert one.stats["captured_steps"] == one.stats["decode_steps"]

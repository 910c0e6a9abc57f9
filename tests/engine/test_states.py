"""Layers that keep a state instead of KV: nothing that happens to a request changes its tokens, and states are of fixed size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.models.qwen3_next import modeling_qwen3_next

from specontext import LLM, SamplingParams
from specontext.errors import DeviceMemoryError, ModelError
from specontext.kv.states import SeatStates
from specontext.layer_sizes import StateTensor
from specontext.memory.facts import facts_of_config
from specontext.models.attention import running_of
from tests.engine.test_ahead import ahead, same
from tests.engine.test_equality import check_idle, tokens_of
from tests.engine.test_prefix import ask, cached
from tests.engine.test_windows import text

FAMILIES = ("delta", "conv")
ONE = "conv"
Prompts = list[list[int]]
MakeLLM = Callable[..., LLM]
Greedy = Callable[..., SamplingParams]
Expected = Callable[..., list[list[int]]]


@pytest.fixture(scope="module")
def alone(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> Callable[..., list[list[int]]]:
    """Tokens at a tight budget, resident, one prompt at a time, in one chunk."""
    known: dict[str, list[list[int]]] = {}

    def tokens(family: str) -> list[list[int]]:
        if family not in known:
            llm = make_llm(family, budget=12, offload_layers=0)
            known[family] = [llm.generate([prompt], greedy())[0].token_ids for prompt in prompts]
        return known[family]

    return tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("method", "offload_layers", "chunk"),
    [("full", -1, 1024), ("speculative", -1, 9), pytest.param("oracle", 2, 9, marks=pytest.mark.slow)],
)
def test_a_budget_of_the_whole_context_gives_hugging_face_s_tokens(
    family: str,
    method: str,
    offload_layers: int,
    chunk: int,
    make_llm: MakeLLM,
    prompts: Prompts,
    greedy: Greedy,
    expected: Expected,
) -> None:
    options = {"budget": 110, "offload_layers": offload_layers, "max_num_batched_tokens": chunk, "max_num_seqs": 3}
    llm = make_llm(family, method, **options, verify_loads=True)
    assert tokens_of(llm, prompts, greedy()) == expected(family)
    check_idle(llm)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tight_budget_reads_as_many_entries_as_it_says_in_layers_with_attention(
    family: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, alone: Any, expected: Expected
) -> None:
    assert alone(family)[1:] != expected(family)[1:]
    llm = make_llm(family, budget=12, measure_recall=True)
    (output,) = llm.generate(prompts[2:3], greedy(4))
    assert output.stats["tokens_read_per_step"] == 12
    assert len(output.stats["attention_recall_by_layer"]) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize(("family", "method"), [("delta", "speculative"), ("conv", "speculative"), ("conv", "quest")])
def test_tiers_slots_chunks_and_company_change_nothing(
    family: str, method: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy
) -> None:
    plain = make_llm(family, method, budget=12, offload_layers=0)
    right = [plain.generate([prompt], greedy())[0].token_ids for prompt in prompts]
    options = {"offload_layers": 2, "slots": 15, "max_num_seqs": 3, "max_num_batched_tokens": 23}
    llm = make_llm(family, method, budget=12, **options, verify_loads=True)
    lengths = [24, 3, 11, 20]
    outputs = llm.generate(prompts, [greedy(n) for n in lengths])
    assert [o.token_ids for o in outputs] == [t[:n] for t, n in zip(right, lengths, strict=True)]
    check_idle(llm)


def test_a_pass_that_looks_ahead_leaves_states_as_they_are(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, expected: Expected
) -> None:
    llm = make_llm(ONE, "speculative", budget=110, offload_layers=0, methods=["full", "shared-oracle"])
    params = [greedy(), greedy(method="full"), greedy(method="shared-oracle"), greedy(method="shared-oracle")]
    assert [output.token_ids for output in llm.generate(prompts, params)] == expected(ONE)


@pytest.mark.parametrize("family", FAMILIES)
def test_requests_that_wait_come_back_with_their_states(
    family: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, alone: Any
) -> None:
    llm = make_llm(family, budget=12, max_num_batched_tokens=40, verify_loads=True)
    engine = llm.engine
    jobs = [engine.add_request(f"r{i}", prompt, greedy()) for i, prompt in enumerate(prompts)]
    preempted = 0
    for step in range(300):
        if not engine.has_work:
            break
        if step % 5 == 2 and len(engine.scheduler.running) > 1:  # some with a prompt half computed
            preempted += engine.scheduler.admission.preempt(but=None)
        engine.step()
        engine.check_integrity()
    assert preempted > 3
    assert [job.request.output_token_ids for job in jobs] == alone(family)
    check_idle(llm)


def test_requests_that_find_no_room_to_wait_are_computed_again(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, expected: Expected
) -> None:
    llm = make_llm(ONE, budget=110, max_num_batched_tokens=40)
    engine = llm.engine
    engine.parts.kv.can_park = lambda *_: False  # type: ignore[method-assign]
    jobs = [engine.add_request(f"r{i}", prompt, greedy()) for i, prompt in enumerate(prompts)]
    for step in range(300):
        if not engine.has_work:
            break
        if step in (2, 12, 20) and len(engine.scheduler.running) > 1:
            engine.scheduler.admission.preempt(but=None)
        engine.step()
    assert [job.request.output_token_ids for job in jobs] == expected(ONE)


def test_layers_that_move_change_nothing(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, alone: Any) -> None:
    page = make_llm(ONE, budget=12).engine.parts.kv.arena.page_bytes
    llm = make_llm(ONE, budget=12, gpu_memory=26 * page, host_memory=80 * page, max_num_batched_tokens=40, verify_loads=True)
    assert tokens_of(llm, prompts, greedy()) == alone(ONE)
    assert llm.engine.parts.residency.num_moves, "else the test says nothing"


# Known prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "offload_layers"), [("conv", 0), ("delta", 2)])
def test_a_prompt_that_goes_on_from_an_earlier_one_finds_its_states(
    family: str, offload_layers: int, make_llm: MakeLLM, greedy: Greedy
) -> None:
    fresh = make_llm(family, budget=12, offload_layers=0, enable_prefix_caching=False)
    llm = make_llm(family, budget=12, offload_layers=offload_layers, max_num_batched_tokens=90, verify_loads=True)
    said = text(1, 187)
    found = []
    for prompt in (said, said + text(2, 21), said[:90] + text(3, 30), said + text(2, 9), said, text(4, 30), text(4, 30)):
        job = ask(llm, prompt, greedy(12))
        assert job.request.output_token_ids == fresh.generate([prompt], greedy(12))[0].token_ids
        found.append(cached(job))
        llm.engine.check_integrity()
    assert found == [0, 176, 0, 192, 176, 0, 0]
    check_idle(llm)


def test_requests_wait_for_states_that_another_computes(make_llm: MakeLLM, greedy: Greedy) -> None:
    fresh = make_llm(ONE, budget=12, enable_prefix_caching=False)
    llm = make_llm(ONE, budget=12, max_num_batched_tokens=64)
    prompts = [text(1, 187) + text(seed, 9 + 4 * seed) for seed in (5, 6, 7)]
    prompts = [prompts[0][:187], *prompts]
    outputs = llm.generate(prompts, greedy(6))
    assert [one.token_ids for one in outputs] == [fresh.generate([prompt], greedy(6))[0].token_ids for prompt in prompts]
    assert [one.stats["cached_tokens"] for one in outputs] == [0, 176, 176, 176]
    check_idle(llm)


def test_states_that_are_kept_make_room_for_whoever_needs_it(make_llm: MakeLLM, greedy: Greedy) -> None:
    fresh = make_llm(ONE, budget=12, enable_prefix_caching=False)
    page = fresh.engine.parts.kv.host.page_bytes
    llm = make_llm(ONE, budget=12, host_memory=50 * page, max_num_batched_tokens=64, max_num_seqs=1)
    prompts = [text(seed, 170) for seed in range(1, 6)]
    for prompt in (*prompts, *prompts[-1:], prompts[0]):
        job = ask(llm, prompt, greedy(6))
        llm.engine.check_integrity()
        assert job.request.output_token_ids == fresh.generate([prompt], greedy(6))[0].token_ids
    assert 0 < llm.engine.parts.prefix.pages <= 50
    llm.engine.reset_prefix_cache()
    assert not llm.engine.parts.prefix.pages
    check_idle(llm)


def test_states_are_kept_while_a_step_ahead_writes_new_ones(make_llm: MakeLLM, greedy: Greedy) -> None:
    fresh = make_llm(ONE, budget=12, enable_prefix_caching=False)
    llm = make_llm(ONE, budget=12, max_num_batched_tokens=64)
    launched = ahead(llm)
    said = text(1, 187)
    for prompt in (said, said + text(5, 40), said + text(6, 30)):
        (output,) = llm.generate([prompt], greedy(8))
        assert output.token_ids == fresh.generate([prompt], greedy(8))[0].token_ids
    assert output.stats["cached_tokens"] == 176 and launched


# What modelling code does with a state ----------------------------------------------------------------------------------

RULES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")  # for several tokens, and for one


def forgetting(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    """Have code that is given a state begin without one."""
    own = getattr(modeling_qwen3_next, rule)

    def begin_anew(*given: Any, initial_state: torch.Tensor | None = None, **options: Any) -> Any:
        start = None if initial_state is None else torch.zeros_like(initial_state)
        return own(*given, initial_state=start, **options)

    monkeypatch.setattr(modeling_qwen3_next, rule, begin_anew)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_code_that_forgets_a_state_within_a_chunk_gets_one_token_after_the_other(
    dtype: str,
    make_llm: MakeLLM,
    prompts: Prompts,
    greedy: Greedy,
    expected: Expected,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    right = expected("delta")
    forgetting(monkeypatch, RULES[0])
    llm = make_llm("delta", budget=110, max_num_batched_tokens=9, dtype=dtype)
    assert "goes on with a state for one token at a time only" in caplog.text
    assert running_of(llm.engine.loaded.model).serial == {0, 1}
    if dtype == "float32":
        assert tokens_of(llm, prompts, greedy()) == right


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_code_that_forgets_a_state_with_each_token_is_refused(
    dtype: str, make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgetting(monkeypatch, RULES[1])
    with pytest.raises(ModelError, match="a layer without attention gives other results for two chunks"):
        make_llm("delta", budget=110, dtype=dtype)


# A step ahead of the host -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_too_many_changes_nothing_for_anyone(
    family: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, as_if_captured: Callable[[LLM], Any]
) -> None:
    plain, hasty = (make_llm(family, budget=14, offload_layers=2, max_num_batched_tokens=30) for _ in range(2))
    free = plain.generate(prompts, greedy(16))
    params = [greedy(16, stop_token_ids=[free[row].token_ids[5 + row]]) for row in range(3)] + [greedy(16)]
    expected = plain.generate(prompts, params)
    graphs, launched = as_if_captured(hasty), ahead(hasty)
    found = hasty.generate(prompts, params)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert launched and graphs.replayed
    again = [prompt + output.token_ids for prompt, output in zip(prompts, found, strict=True)]
    hasty.engine.runner._graphs, hasty.engine.runner.captures = None, False
    same(plain.generate(again, greedy(5)), hasty.generate(again, greedy(5)))


def test_a_step_ahead_that_does_not_fit_is_not_tried_again(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its requests have states by then that hold a token which was never chosen."""
    llm = make_llm(ONE, budget=110, max_num_seqs=3)
    ahead(llm)
    run, failing = llm.engine.runner._forward, [False]

    def full(batch: Any) -> torch.Tensor:
        logits = run(batch)
        if failing[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return logits

    monkeypatch.setattr(llm.engine.runner, "_forward", full)
    llm.engine.add_request("one", prompts[1], greedy())
    for _ in range(4):
        llm.engine.step()
    failing[0] = True
    with pytest.raises(DeviceMemoryError) as caught:
        llm.engine.step()
    assert caught.value.request_ids == ("one",) and not llm.engine.has_work
    failing[0] = False
    assert tokens_of(llm, prompts, greedy()) == expected(ONE)


# Memory -----------------------------------------------------------------------------------------------------------------


def test_states_are_a_part_of_the_plan_that_does_not_grow(make_llm: MakeLLM) -> None:
    short, long = (make_llm("delta", budget=12, max_model_len=length) for length in (128, 512))
    seats = short.engine.config.max_num_seqs + 1
    conv, delta = 4 * (2 * 2 * 8 + 4 * 8) * 4, 4 * 4 * 8 * 8  # bytes of a layer: four inputs of 64 channels, four heads of 8 x 8
    for llm in (short, long):
        kv, plan = llm.engine.parts.kv, llm.engine.parts.plan
        assert kv.states is not None and kv.states.num_bytes == seats * 2 * (conv + delta)
        assert plan.fixed["states"] == kv.states.num_bytes + kv.states.seat_bytes, "and a copy that goes to the host"
        assert plan.kv.layers == 3 and kv.arena.layout.full == [0, 1, 2]


def test_a_config_alone_tells_how_large_states_are(make_llm: MakeLLM, checkpoint: Callable[[str], Any]) -> None:
    from specontext.locations import read_config

    llm = make_llm("delta", budget=12)
    assert facts_of_config("it", read_config(checkpoint("delta")), dtype=torch.float32).shape.states == llm.shape.states


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_have_whole_states(family: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, alone: Any) -> None:
    options = {"budget": 12, "dtype": "float32", "max_num_batched_tokens": 23, "methods": ("full",)}
    llm = make_llm(family, tensor_parallel_size=2, **options)
    try:
        assert tokens_of(llm, prompts, greedy()) == alone(family)
        assert tokens_of(llm, prompts, greedy()) == alone(family)  # from known states
        llm.engine.check_integrity()
    finally:
        llm.engine.close()


def test_seats_have_states_of_their_own() -> None:
    of = [StateTensor(0, False, 0, (3, 2), torch.bfloat16), StateTensor(0, True, 0, (5,), torch.float32)]
    of += [StateTensor(1, True, 0, (5,), torch.float32)]
    states = SeatStates(of, seats=3, device=torch.device("cpu"))
    assert states.seat_bytes == 6 * 2 + 2 * 5 * 4 and states.num_bytes == 4 * states.seat_bytes
    seats = torch.tensor([2, 0])
    states.put(0, seats, {(False, 0): torch.ones(2, 3, 2), (True, 0): torch.arange(10.0).view(2, 5)})
    found = states.of(0, torch.tensor([0, 1, 2]))
    assert found[True, 0].tolist() == [[5, 6, 7, 8, 9], [0] * 5, [0, 1, 2, 3, 4]]
    assert found[False, 0].dtype == torch.bfloat16 and found[False, 0][1].sum() == 0 and found[False, 0][2].sum() == 6
    found[True, 0].zero_()
    states.reset(2)
    assert states.of(0, seats)[True, 0].tolist() == [[0] * 5, [5, 6, 7, 8, 9]], "what was taken is a copy"
    assert not states.of(1, seats)[True, 0].any()

"""Layers leave the device and return while requests run: tokens stay what they are without it, and memory within bounds."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.config import EngineConfig
from specontext.engine import tier_memory
from specontext.engine.generation import Generation
from specontext.errors import MemoryPlanError, RequestError
from specontext.memory.kv_cost import KVCost
from specontext.memory.model import MemoryModel
from specontext.memory.tiers import SHARE_OF_FREE_MEMORY

METHODS = ("speculative", "full", "oracle", "streaming", "random")
FIRST = [method if method in ("speculative", "full") else pytest.param(method, marks=pytest.mark.slow) for method in METHODS]
WAYS = [("speculative", "llama"), ("full", "llama"), ("speculative", "bands")]  # a head of more groups with one wide key
MakeLLM = Callable[..., LLM]
Greedy = Callable[..., SamplingParams]
Prompts = list[list[int]]

# The Llama checkpoint: 3 layers, 2 KV heads of 24 in float32, pages of 16 tokens.
LAYERS, TOKEN = 3, 2 * 2 * 24 * 4
PAGE = 16 * TOKEN


@pytest.fixture(scope="module")
def alone(make_llm: MakeLLM) -> Callable[..., list[int]]:
    """Tokens of a request by itself and with all the memory it could want."""
    engines: dict[tuple[str, str], LLM] = {}
    known: dict[tuple[Any, ...], list[int]] = {}

    def tokens(method: str, prompt: list[int], params: SamplingParams, family: str = "llama") -> list[int]:
        key = (method, family, tuple(prompt), params)
        if key not in known:
            if (method, family) not in engines:
                engines[method, family] = make_llm(family, method, budget=12, offload_layers=0)
            known[key] = engines[method, family].generate([prompt], params)[0].token_ids
        return known[key]

    return tokens


def check_idle(llm: LLM) -> None:
    kv = llm.engine.parts.kv
    assert not llm.engine.has_work and not kv.seats and not kv.parked
    llm.engine.check_integrity()
    assert kv.arena.pages.num_held == kv.host.pages.num_held == 0


def check_bounds(llm: LLM) -> None:
    kv, config = llm.engine.parts.kv, llm.engine.config
    for pool, limit in ((kv.arena, config.gpu_memory), (kv.host, config.host_memory)):
        assert limit is None or pool.rows.nbytes <= limit
        assert pool.rows.nbytes == pool.num_bytes and pool.pages.num_held < pool.pages.num_pages


def run(llm: LLM, prompts: Prompts, params: list[SamplingParams]) -> list[Generation]:
    """Steps until all is done; after every one, pages are where they belong and bounds are kept."""
    engine = llm.engine
    jobs = [engine.add_request(f"r{i}", p, q) for i, (p, q) in enumerate(zip(prompts, params, strict=True))]
    for _ in range(5000):
        if not engine.has_work:
            break
        engine.step()
        engine.check_integrity()
        check_bounds(llm)
    check_idle(llm)
    return jobs


def moves_of(llm: LLM) -> list[dict[str, Any]]:
    """All moves so far, checked: the last layer leaves first and the first that left last returns first, one after the other."""
    moves = [move.as_dict() for move in llm.engine.parts.residency.moves]
    offloaded: list[int] = []
    for move in moves:
        if move["to_host"]:
            assert move["layer"] == LAYERS - 1 - len(offloaded), "the last resident layer leaves"
            offloaded.append(move["layer"])
        else:
            assert move["layer"] == offloaded.pop(), "the first offloaded layer returns"
        assert move["bytes"] % TOKEN == 0 and move["stall_s"] >= 0
    assert [move["step"] for move in moves] == sorted(move["step"] for move in moves)
    assert sorted(offloaded) == llm.engine.parts.kv.offloaded
    return moves


# Leaving --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "family"), [*WAYS, *(pytest.param(m, "llama", marks=pytest.mark.slow) for m in METHODS[2:])])
@pytest.mark.parametrize(("pages", "chunk_bytes"), [(10, 3000), (16, None), (22, 3000)])
def test_one_request_outgrows_the_device(
    method: str,
    family: str,
    pages: int,
    chunk_bytes: int | None,
    make_llm: MakeLLM,
    prompts: Prompts,
    greedy: Greedy,
    alone: Any,
) -> None:
    """Its 7 to 8 pages a layer are 24; every move has its numbers, and what had been stored before it."""
    llm = make_llm(family, method, budget=12, gpu_memory=pages * PAGE, host_memory=60 * PAGE, max_num_seqs=2, verify_loads=True)
    if chunk_bytes is not None:
        llm.engine.parts.residency.chunk_bytes = chunk_bytes  # a page of one layer takes more than two steps
    stored: dict[int, int] = {}
    run_batch = llm.engine.runner.run

    def noting(batch: Any) -> torch.Tensor:
        stored[llm.engine.parts.residency.steps] = int(batch.positions.min())
        return run_batch(batch)

    llm.engine.runner.run = noting  # type: ignore[method-assign]
    (job,) = run(llm, [prompts[2]], [greedy(44)])
    assert job.request.output_token_ids == alone(method, prompts[2], greedy(44), family)
    moves = moves_of(llm)
    assert moves and all(move["to_host"] for move in moves), "one that only grows never brings a layer back"
    assert all(move["bytes"] == stored[move["step"]] * TOKEN for move in moves)
    assert job.stats is not None and [move.as_dict() for move in job.stats.moves] == moves and job.stats.preemptions == 0
    assert job.stats.offloaded_layers == len(moves) and job.stats.offload_layers is None


def test_only_the_last_moves_are_kept(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specontext.engine.residency.KEPT_MOVES", 2)
    llm = make_llm("llama", budget=12, gpu_memory=10 * PAGE, host_memory=60 * PAGE, max_num_seqs=2)
    (job,) = run(llm, [prompts[1]], [greedy(60)])
    residency = llm.engine.parts.residency
    assert residency.num_moves == LAYERS and job.stats is not None
    assert job.stats.moves == tuple(residency.moves)
    assert [move.layer for move in job.stats.moves] == [1, 0]


@pytest.mark.parametrize("method", FIRST)
@pytest.mark.parametrize("pages", [16, pytest.param(40, marks=pytest.mark.slow)])
def test_many_requests_in_a_device_tier_far_too_small(
    method: str, pages: int, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, alone: Any
) -> None:
    params = [greedy(n) for n in (60, 24, 50, 7)]
    llm = make_llm(
        "llama", method, budget=12, slots=15, gpu_memory=pages * PAGE, host_memory=90 * PAGE, max_num_batched_tokens=30
    )
    jobs = run(llm, prompts, params)
    assert [job.request.output_token_ids for job in jobs] == [alone(method, *pair) for pair in zip(prompts, params, strict=True)]
    assert moves_of(llm)
    assert llm.engine.scheduler.preemptions == 0, "the host has room for all"


@pytest.mark.parametrize("method", ["speculative", "full", "oracle"])
def test_a_prompt_longer_than_the_device_tier(method: str, make_llm: MakeLLM, greedy: Greedy, alone: Any) -> None:
    prompt = [4 + 7 * i % 900 for i in range(300)]
    llm = make_llm("llama", method, budget=12, gpu_memory=12 * PAGE, host_memory=70 * PAGE, max_num_batched_tokens=64)
    (job,) = run(llm, [prompt], [greedy(8)])
    assert job.request.output_token_ids == alone(method, prompt, greedy(8))
    assert len(llm.engine.parts.kv.offloaded) == LAYERS


def test_a_tier_that_holds_everything_moves_nothing(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    llm = make_llm("llama", budget=12, gpu_memory=200 * PAGE)
    run(llm, prompts, [greedy()] * 4)
    assert moves_of(llm) == []


# Returning ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", FIRST[:3])
def test_layers_return_when_memory_frees_up(
    method: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three requests fill the device; two end early, and the third goes on with all layers on the device."""
    monkeypatch.setattr("specontext.memory.planner.ResidencyPolicy.__init__.__defaults__", (None, 32))  # tokens, not 256
    params = [greedy(90), greedy(40), greedy(40)]
    llm = make_llm("llama", method, budget=12, gpu_memory=36 * PAGE, host_memory=90 * PAGE, max_num_seqs=3)
    jobs = run(llm, prompts[:3], params)
    assert [job.request.output_token_ids for job in jobs] == [alone(method, *p) for p in zip(prompts[:3], params, strict=True)]
    directions = [move["to_host"] for move in moves_of(llm)]
    assert directions.count(False) > 0 and llm.engine.parts.kv.offloaded == []
    assert directions == sorted(directions, reverse=True), "first they leave, then they return, and nothing swings"


def test_layers_are_back_for_the_next_request(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, alone: Any) -> None:
    """While nobody runs a layer changes its tier for nothing."""
    llm = make_llm("llama", budget=12, gpu_memory=80 * PAGE, host_memory=300 * PAGE, max_num_seqs=6)
    run(llm, [prompts[2]] * 6, [greedy(60)] * 6)
    assert llm.engine.parts.kv.offloaded
    (job,) = run(llm, [prompts[0]], [greedy(8)])
    assert job.request.output_token_ids == alone("speculative", prompts[0], greedy(8))
    assert llm.engine.parts.kv.offloaded == [] and moves_of(llm)[-1]["bytes"] == 0


@pytest.mark.parametrize("method", ["speculative", FIRST[-1]])
@pytest.mark.slow
def test_requests_whose_slots_take_more_than_their_tokens(
    method: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy
) -> None:
    """To offload a layer then costs pages instead of freeing them: requests wait, and go on where they fit."""
    roomy = make_llm("llama", method, budget=100, offload_layers=0)
    params = [greedy(n) for n in (24, 60, 50, 40, 3, 24)]
    six = [*prompts, prompts[0], prompts[3]]
    expected = [roomy.generate([p], q)[0].token_ids for p, q in zip(six, params, strict=True)]
    for pages in (36, 52):
        llm = make_llm("llama", method, budget=100, gpu_memory=pages * PAGE, host_memory=300 * PAGE, max_num_seqs=6)
        jobs = run(llm, six, params)
        assert [job.request.output_token_ids for job in jobs] == expected
        moves_of(llm)


# Waiting --------------------------------------------------------------------------------------------------------------


def crowded(make_llm: MakeLLM, method: str = "speculative", family: str = "llama", **options: Any) -> LLM:
    """One layer stays on the device, which holds three requests at their start and not at their end; the host holds all."""
    pages = {"speculative": 34, "full": 26}.get(method, 28) + 3 * (family == "bands")  # longer keys
    fixed: dict[str, Any] = {"budget": 12, "offload_layers": 2, "gpu_memory": pages * PAGE, "host_memory": 120 * PAGE}
    return make_llm(family, method, **fixed | options)


@pytest.mark.parametrize(("method", "family"), [*WAYS, pytest.param("oracle", "llama", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_preempted_requests_go_on_where_they_were(
    method: str, family: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, alone: Any
) -> None:
    params = [greedy(n) for n in (140, 150, 120)]
    llm = crowded(make_llm, method, family, max_num_batched_tokens=40, verify_loads=True)
    three = [prompts[0], prompts[3], prompts[1]]
    jobs = run(llm, three, params)
    for job, prompt, wanted in zip(jobs, three, params, strict=True):
        assert job.request.output_token_ids == alone(method, prompt, wanted, family)
    counted = [job.request.preemptions for job in jobs]
    assert sum(counted) == llm.engine.scheduler.preemptions > 0 and counted[0] == 0, "the first that came never waits"
    assert [job.stats.preemptions for job in jobs if job.stats is not None] == counted
    assert all(job.request.prefill_length == job.request.prompt_length for job in jobs), "nothing was computed again"


@pytest.mark.parametrize("method", FIRST)
@pytest.mark.slow
def test_fixed_layers_on_the_device_do_not_make_waiting_requests_forget(
    method: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, alone: Any
) -> None:
    """Nothing moves, and still the host keeps what waits: its tokens are those it would have had alone."""
    # Two requests fit as they come, with room for the next 64 tokens; not as they end, with 3 x (13 + 11) pages.
    llm = make_llm("llama", method, budget=12, offload_layers=0, gpu_memory=56 * PAGE, host_memory=200 * PAGE)
    two, params = [prompts[1], prompts[3]], [greedy(150), greedy(140)]
    jobs = run(llm, two, params)
    assert [j.request.output_token_ids for j in jobs] == [alone(method, p, q) for p, q in zip(two, params, strict=True)]
    assert sum(job.request.preemptions for job in jobs) > 0 and not llm.engine.parts.residency.moves


@pytest.mark.slow
def test_statistics_go_on_after_a_preemption(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    llm = crowded(make_llm)
    jobs = run(llm, [prompts[0], prompts[3], prompts[1]], [greedy(n) for n in (140, 150, 120)])
    assert llm.engine.scheduler.preemptions
    quiet = make_llm("llama", budget=12, offload_layers=2)
    for job in jobs:
        made = len(job.request.output_token_ids)
        lone = quiet.generate([job.request.token_ids[: job.request.prompt_length]], greedy(made))[0].stats
        assert job.stats is not None and job.stats.decode_steps == made - 1
        for name in ("tokens_read_per_step", "bytes_full_per_step", "selection_bytes_per_step", "overlap"):
            assert getattr(job.stats, name) == pytest.approx(lone[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "device", "host"),
    [("speculative", 14, 30), ("full", 10, 30), ("full", 20, 14), ("streaming", 30, 9)],
)
def test_both_tiers_too_small_for_all(
    method: str, device: int, host: int, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, alone: Any
) -> None:
    """Requests wait or are computed again, and all come to their end; a dense method's tokens are the same even then."""
    llm = make_llm("llama", method, budget=12, gpu_memory=device * PAGE, host_memory=host * PAGE, max_num_batched_tokens=50)
    params = [greedy(n) for n in (80, 20, 8, 60)]
    jobs = run(llm, prompts, params)
    for job, prompt, wanted in zip(jobs, prompts, params, strict=True):
        again = job.request.prefill_length > job.request.prompt_length
        assert len(job.request.output_token_ids) == wanted.max_tokens and job.request.finish_reason == "length"
        assert (again and method != "full") or job.request.output_token_ids == alone(method, prompt, wanted)
    assert sum(job.request.preemptions for job in jobs) == llm.engine.scheduler.preemptions
    moves_of(llm)


@pytest.mark.slow
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_any_sizes_and_any_arrival(seed: int, make_llm: MakeLLM, greedy: Greedy, alone: Any) -> None:
    """Requests come and are aborted at any time in tiers of any size: nothing hangs, leaks or changes."""
    rng = random.Random(seed)
    method = rng.choice(METHODS)
    memory = {"gpu_memory": rng.choice([12, 14, 18, 24]) * PAGE, "host_memory": rng.choice([9, 14, 20, 30, 60]) * PAGE}
    seats = {"max_num_seqs": rng.choice([1, 3, 6]), "max_num_batched_tokens": rng.choice([7, 30, 200])}
    llm = make_llm(
        "llama", method, budget=12, slots=rng.choice([None, 15, 28]), **memory, **seats, verify_loads=rng.random() < 0.5
    )
    engine, jobs = llm.engine, []
    engine.parts.residency.chunk_bytes = rng.choice([500, 5000, 1 << 30])
    asked = [
        ([4 + rng.randrange(900) for _ in range(rng.choice([5, 20, 60]))], greedy(rng.choice([2, 30, 70]))) for _ in range(5)
    ]
    for at in range(3000):
        if len(jobs) < len(asked) and (rng.random() < 0.2 or not engine.has_work):
            try:
                jobs.append(engine.add_request(f"r{at}", *asked[len(jobs)]))
            except RequestError as error:
                assert "memory" in str(error)
                asked.pop(len(jobs))
        elif not engine.has_work:
            break
        elif rng.random() < 0.005:
            engine.abort(rng.choice(jobs).request.request_id)
        else:
            engine.step()
        engine.check_integrity()
        check_bounds(llm)
    check_idle(llm)
    moves_of(llm)
    for job, (prompt, params) in zip(jobs, asked, strict=True):
        made, request = job.request.output_token_ids, job.request
        assert request.finish_reason == "abort" or len(made) == params.max_tokens
        if request.prefill_length == request.prompt_length or method == "full":
            assert made == alone(method, prompt, params)[: len(made)]


# Refusals and aborts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "host", "setting"), [(9, 60, "gpu_memory"), (9, 8, "host_memory")])
def test_a_request_that_never_fits_is_refused_at_once(device: int, host: int, setting: str, make_llm: MakeLLM) -> None:
    llm = make_llm("llama", "streaming", budget=100, gpu_memory=device * PAGE * 3, host_memory=host * PAGE)
    params = SamplingParams(max_tokens=100)
    with pytest.raises(RequestError, match=rf"(?s)a request of 500 tokens.*raise .*{setting}.* lower max_tokens") as error:
        if setting == "host_memory":
            llm.engine.add_request("long", [5] * 400, params)
        else:
            tiny = make_llm("llama", "speculative", budget=12, gpu_memory=device * PAGE, host_memory=host * PAGE * 3)
            tiny.engine.add_request("long", [5] * 400, params)
    assert sum(character.isdigit() for character in str(error.value)) > 8, "it names the bytes"
    check_idle(llm)


def test_aborts_of_running_waiting_and_parked_requests(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, alone: Any) -> None:
    llm = crowded(make_llm, max_num_seqs=3)
    engine = llm.engine
    four = [prompts[0], prompts[3], prompts[1], prompts[0]]
    jobs = [engine.add_request(f"r{i}", prompt, greedy(150)) for i, prompt in enumerate(four)]
    for _ in range(200):
        if not engine.parts.kv.parked:
            engine.step()
    parked = next(job for job in jobs if job.request.seat < 0 and job.request.computed)
    waiting = jobs[3]
    assert waiting.request.seat < 0 and not waiting.request.computed
    running = next(job for job in jobs[1:] if job.request.seat >= 0)
    for job in (parked, waiting, running):
        engine.abort(job.request.request_id)
        engine.check_integrity()
    assert not engine.parts.kv.parked
    while engine.has_work:
        engine.step()
    check_idle(llm)
    assert jobs[0].request.output_token_ids == alone("speculative", prompts[0], greedy(150))
    assert [job.request.finish_reason for job in (parked, waiting, running)] == ["abort"] * 3


@pytest.mark.parametrize("steps", [1, 3, 20, 30, 40])
def test_aborts_while_a_layer_is_on_its_way(steps: int, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, alone: Any) -> None:
    """The seat is taken by another request before the move is done, which must bring that one's rows."""
    llm = make_llm("llama", budget=12, gpu_memory=30 * PAGE, host_memory=90 * PAGE, max_num_seqs=2, verify_loads=True)
    llm.engine.parts.residency.chunk_bytes = 400
    engine = llm.engine
    jobs = [engine.add_request(f"r{i}", prompts[i], greedy(60)) for i in (1, 3, 2)]
    for _ in range(steps):
        engine.step()
    engine.abort("r3")
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    check_idle(llm)
    for job, i in ((jobs[0], 1), (jobs[2], 2)):
        assert job.request.output_token_ids == alone("speculative", prompts[i], greedy(60))


@pytest.mark.parametrize("seed", [3, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (4, 5, 6, 8))])
def test_storms(seed: int, make_llm: MakeLLM, greedy: Greedy, alone: Any) -> None:
    """One that outgrows the device among many small ones, which come while layers move and are aborted wherever they are: all
    that are left end in order, within a bound of steps, with the tokens of a request alone."""
    rng = random.Random(seed)
    llm = make_llm("llama", budget=12, gpu_memory=20 * PAGE, host_memory=80 * PAGE, max_num_seqs=4, max_num_batched_tokens=40)
    engine, kv = llm.engine, llm.engine.parts.kv
    engine.parts.residency.chunk_bytes, engine.parts.residency.most_bytes = rng.choice([(800, 1600), (3000, 9000)])
    asked: Prompts = [[4 + rng.randrange(900) for _ in range(rng.choice([5, 12, 25]))] for _ in range(9)]
    asked[rng.randrange(2, 5)] = [4 + 7 * i % 900 for i in range(150)]
    jobs: list[Generation] = []
    came_while_moving = aborted = steps = 0
    while len(jobs) < len(asked) or engine.has_work:
        wanted = kv.move is not None or not engine.has_work or rng.random() < 0.1
        if len(jobs) < len(asked) and wanted:
            came_while_moving += kv.move is not None
            jobs.append(engine.add_request(f"r{len(jobs)}", asked[len(jobs)], greedy(rng.randint(2, 24))))
        if jobs and rng.random() < 0.04:
            job = rng.choice(jobs)
            aborted += not job.finished
            engine.abort(job.request.request_id)
        engine.step()
        engine.check_integrity()
        check_bounds(llm)
        order = [int(request.request_id[1:]) for request in (*engine.scheduler.running, *engine.scheduler.waiting)]
        assert order == sorted(order), "nobody is overtaken"
        steps += 1
        assert steps < 900, "somebody starves"
    check_idle(llm)
    assert came_while_moving and engine.parts.residency.num_moves
    for job, prompt in zip(jobs, asked, strict=True):
        made, request = job.request.output_token_ids, job.request
        assert request.finish_reason == "abort" or len(made) == request.params.max_tokens
        if request.prefill_length == request.prompt_length:
            assert made == alone("speculative", prompt, greedy(24))[: len(made)]


@pytest.mark.parametrize("ends", ["one after the other", "all at once"])
def test_an_abort_of_who_layers_left_for(ends: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, alone: Any) -> None:
    """One waits while layers leave for it, and goes; the others go on, and who comes next finds room."""
    llm = make_llm("llama", budget=12, gpu_memory=24 * PAGE, host_memory=90 * PAGE, max_num_seqs=3, max_num_batched_tokens=64)
    engine, residency = llm.engine, llm.engine.parts.residency
    residency.chunk_bytes = residency.most_bytes = 800
    first = engine.add_request("r0", prompts[3], greedy(40))
    while not first.request.decoding:
        engine.step()
    gone = [engine.add_request(f"r{number}", [4 + 7 * i % 900 for i in range(150)], greedy(4)) for number in (1, 2)]
    for _ in range(200):
        if residency.awaited:
            break
        engine.step()
    assert residency.awaited and gone[0].request.seat < 0
    for job in gone:
        engine.abort(job.request.request_id)
        engine.check_integrity()
        if ends == "one after the other":
            engine.step()
    last = engine.add_request("r3", prompts[0], greedy(8))
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    check_idle(llm)
    assert first.request.output_token_ids == alone("speculative", prompts[3], greedy(40))
    assert last.request.output_token_ids == alone("speculative", prompts[0], greedy(8))


# Sizes ----------------------------------------------------------------------------------------------------------------


def test_memory_that_is_not_named_is_a_share_of_what_is_free(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 100 * PAGE
    monkeypatch.setattr(tier_memory, "free_memory", lambda device: free)
    sizes = make_llm("llama", "streaming", budget=12, max_num_seqs=50).engine.parts.sizes
    for used in (sizes.device_bytes, sizes.host_bytes):
        assert 0.5 * SHARE_OF_FREE_MEMORY * free < used <= SHARE_OF_FREE_MEMORY * free


@pytest.mark.parametrize(
    ("free", "reserved", "allocated", "share", "limit", "expected", "warns"),
    [
        (70, 20, 20, 1.0, None, 72 - 30, ""),  # weights of 10 are there; the rest that is in use is somebody else's
        (70, 20, 10, 1.0, 60, 60 - 30, ""),
        (40, 15, 10, 1.0, 60, 40 + 5 + 10 - 30, "may use 60 bytes of the GPU and 55 of them are free: end what else uses it"),
        (70, 10, 10, 1.0, 900, 80 - 30, "--gpu-memory names 900 bytes and the GPU has 80"),
        (10, 15, 10, 1.0, 900, "the GPU has 25 bytes free and 30 are needed beside KV", "--gpu-memory names 900 bytes"),
        (10, 15, 10, 1.0, None, "the GPU has 25 bytes free and 30 are needed beside KV", "are free: end what else uses it"),
        (70, 10, 10, 1.0, 29, "--gpu-memory allows 29 bytes and 30 are needed beside KV .*: raise it by more than 1", ""),
        (70, 10, 10, 0.5, 40, 40 - 30, ""),  # PyTorch may have half of the card, and has the weights
        (70, 12, 10, 0.5, 40, 40 - 30, ""),
        (70, 14, 12, 0.5, 40, 38 - 30, "may use 40 bytes of the GPU and 38 of them are free"),
        (70, 14, 12, 0.5, 10**15, 38 - 30, "--gpu-memory names 1000000000000000 bytes and the GPU has 80"),
        (70, 10, 10, 0.25, None, "this process may have 20 bytes of the GPU and 30 are needed beside KV", ""),
    ],
)
def test_what_a_gpu_has_for_kv(
    free: int,
    reserved: int,
    allocated: int,
    share: float,
    limit: int | None,
    expected: int | str,
    warns: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda number: {None: share}[number])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    plan = MemoryModel("measured", {"weights": 9, "retrieval_head": 1, "runtime": 20}, KVCost(1, 1, 0, 0))
    config, device = EngineConfig("nano", gpu_memory=limit), torch.device("cuda")
    if isinstance(expected, int):
        assert tier_memory.device_memory(config, plan, device) == expected
    else:
        with pytest.raises(MemoryPlanError, match=expected):
            tier_memory.device_memory(config, plan, device)
    assert warns in caplog.text and bool(warns) == bool(caplog.text)


def test_a_tier_without_room_for_one_request_says_what_it_needs(make_llm: MakeLLM) -> None:
    with pytest.raises(MemoryPlanError, match=r"has \d+ bytes and needs at least \d+ .*--gpu-memory"):
        make_llm("llama", budget=100, gpu_memory=3 * PAGE)


def test_nano_in_a_device_tier_far_too_small() -> None:
    """The bundled model with its own head, over prompts of several hundred tokens."""
    rng = random.Random(3)
    prompts = [[rng.randrange(4, 1800) for _ in range(length)] for length in (700, 300, 150)]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    config = SpeContextConfig(budget=64)
    roomy = LLM("nano", config=SpeContextConfig(budget=64, offload_layers=0), device="cpu", dtype="float32", max_model_len=1024)
    expected = [output.token_ids for output in roomy.generate(prompts, params)]
    page = roomy.engine.parts.kv.arena.page_bytes
    for pages in (50, 90):
        tight = LLM("nano", config=config, device="cpu", dtype="float32", max_model_len=1024, gpu_memory=pages * page)
        outputs = tight.generate(prompts, params)
        assert [output.token_ids for output in outputs] == expected
        moves = outputs[0].stats["moves"]
        assert isinstance(moves, list) and moves and {"step", "layer", "to_host", "bytes", "stall_s"} <= set(moves[0])
        check_bounds(tight)
        check_idle(tight)

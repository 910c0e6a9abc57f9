"""Who runs: as many requests as make the most tokens a second, in order of arrival, and the same tokens however many that are."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specontext import LLM, ConfigError, SamplingParams
from specontext.config import EngineConfig
from specontext.core import Request
from specontext.engine.admission import MEMORY, SEATS, SPEED, THROUGHPUT, TURN
from specontext.engine.generation import Generation
from specontext.engine.worth import Worth
from specontext.memory.kv_cost import KVCost
from specontext.memory.planner import ResidencyPolicy
from specontext.memory.step_time import CPU, MachineSpeed
from specontext.memory.throughput import ServiceLimits

MakeLLM = Callable[..., LLM]
Greedy = Callable[..., SamplingParams]
Prompts = list[list[int]]
Alone = Callable[[list[int]], list[int]]
LENGTHS, MOST = (5, 16, 40, 63, 70, 80, 90), 60  # of prompts; of outputs, the longest
PAGE = 16 * 2 * 2 * 24 * 4  # bytes of a page of a layer of the Llama checkpoint, which has 3
# A device so quick that every row that is missing on it costs more than a step.
SLOW = replace(CPU, device=1e15, products=1e18, host=5e9, layer_s=1e-9, offloaded_s=0.0, step_s=1e-9)


@pytest.fixture
def engine(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LLM]:
    """An engine on a machine; by default one whose bus is so slow that no layer should leave."""

    def make(machine: MachineSpeed = SLOW, **options: Any) -> LLM:
        monkeypatch.setattr("specontext.engine.settled.machine_speed", lambda _: machine)
        monkeypatch.setattr("specontext.memory.learning.PERIOD", 1 << 30)  # this machine is none that could be measured
        return make_llm("llama", budget=12, **{"host_memory": 400 * PAGE, "max_num_seqs": 4} | options)

    return make


@pytest.fixture(scope="module")
def alone(make_llm: MakeLLM, greedy: Greedy) -> Alone:
    """What a request writes that nobody runs beside: MOST tokens."""
    llm = make_llm("llama", budget=12, host_memory=400 * PAGE, gpu_memory=400 * PAGE, max_num_seqs=1)
    known: dict[tuple[int, ...], list[int]] = {}

    def tokens_of(prompt: list[int]) -> list[int]:
        if tuple(prompt) not in known:
            known[tuple(prompt)] = llm.generate([prompt], greedy(MOST))[0].token_ids
        return known[tuple(prompt)]

    return tokens_of


def run(llm: LLM, prompts: Prompts, tokens: list[int], greedy: Greedy, until: int = 3000) -> tuple[list[Generation], list[int]]:
    """All requests at once until they have ended, in order of arrival in every step; how many ran in each step."""
    core = llm.engine
    jobs = [core.add_request(f"r{i}", p, greedy(n)) for i, (p, n) in enumerate(zip(prompts, tokens, strict=True))]
    ran = []
    for _ in range(until):
        if not core.has_work:
            break
        core.step()
        core.check_integrity()
        check_order(llm)
        ran.append(len(core.scheduler.running))
    assert not core.has_work and all(job.request.finish_reason == "length" for job in jobs)
    return jobs, ran


def check_order(llm: LLM) -> None:
    """Nobody who has a seat came after one who waits."""
    running, waiting = llm.engine.scheduler.running, llm.engine.scheduler.waiting
    came = [int(request.request_id[1:]) for request in (*running, *waiting)]
    assert came == sorted(came)


def moves(llm: LLM) -> int:
    return llm.engine.parts.residency.num_moves


def test_requests_wait_where_layers_would_have_to_leave_and_that_is_slower(
    engine: Callable[..., LLM], prompts: Prompts, greedy: Greedy
) -> None:
    llm, tokens = (
        engine(gpu_memory=64 * PAGE),
        [20, 30, 25, 20, 30],
    )  # two requests fit, with keys
    different = [[number + 4, *prompts[2]] for number in range(5)]
    jobs, ran = run(llm, different, tokens, greedy)
    assert moves(llm) == 0 and 1 < max(ran) < 4
    waited = [job.request.waited_for for job in jobs]
    assert waited[0] == [] and THROUGHPUT in waited[-1]
    assert jobs[-1].stats is not None and THROUGHPUT in str(jobs[-1].stats.waited_for)
    quick = engine(CPU, gpu_memory=64 * PAGE)
    others, ran = run(quick, different, tokens, greedy)
    assert moves(quick) > 0 and max(ran) == 4, "over a fast bus more requests are faster"
    assert [job.request.token_ids for job in others] == [job.request.token_ids for job in jobs]
    assert SEATS in others[-1].request.waited_for


def test_one_that_grows_too_long_makes_the_last_one_wait_once(
    engine: Callable[..., LLM], prompts: Prompts, greedy: Greedy
) -> None:
    """Both begin on the device and outgrow it together."""
    llm = engine(gpu_memory=56 * PAGE)
    (first, last), ran = run(llm, [prompts[1], prompts[1][1:]], [90, 100], greedy)
    assert moves(llm) == 0 and ran[0] == 2 and 1 in ran
    assert first.request.preemptions == 0 and last.request.preemptions == 1
    assert sum(a != b for a, b in pairwise(filter(None, ran))) == 1, "two, then one, then the other one"
    [alone], _ = run(engine(gpu_memory=200 * PAGE), [prompts[1][1:]], [100], greedy)
    assert last.request.token_ids == alone.request.token_ids


@pytest.mark.parametrize("options", [{"min_num_seqs": 4}, {"max_wait_s": 0.0}])
def test_what_users_ask_for_goes_first(
    options: dict[str, Any], engine: Callable[..., LLM], prompts: Prompts, greedy: Greedy
) -> None:
    llm = engine(gpu_memory=45 * PAGE, **options)
    jobs, ran = run(llm, [[number + 4, *prompts[2]] for number in range(4)], [20] * 4, greedy)
    assert max(ran) == 4 and moves(llm) > 0
    assert not any(THROUGHPUT in job.request.waited_for for job in jobs)


def test_who_has_waited_long_enough_joins_and_is_not_made_to_wait_again(
    engine: Callable[..., LLM], prompts: Prompts, greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("specontext.engine.admission.time.perf_counter", lambda: now[0])
    llm = engine(gpu_memory=45 * PAGE, max_wait_s=10.0)
    core = llm.engine
    jobs = [core.add_request(f"r{i}", [i + 4, *prompts[2]], greedy(30)) for i in range(4)]
    for _ in range(4):
        core.step()
    waiting = list(core.scheduler.waiting)
    assert waiting and waiting[0].waited_for[-1] == THROUGHPUT
    for request in waiting:
        request.waiting_since = 100.0
    now[0] = 109.9
    core.step()
    assert list(core.scheduler.waiting) == waiting
    now[0] = 110.1
    for _ in range(12):  # layers leave for them while others decode
        core.step()
    assert not core.scheduler.waiting, "all of them had waited for ten seconds"
    while core.has_work:
        core.step()
    assert moves(llm) > 0 and all(job.request.preemptions == 0 for job in jobs)


def test_no_further_request_makes_tokens_slower_than_allowed(
    engine: Callable[..., LLM], prompts: Prompts, greedy: Greedy
) -> None:
    llm = engine(CPU, max_tpot_ms=1e-3, min_num_seqs=2)
    jobs, ran = run(llm, prompts, [10] * 4, greedy)
    assert max(ran) == 2 and SPEED in jobs[2].request.waited_for
    assert max(run(engine(CPU, max_tpot_ms=1e6), prompts, [10] * 4, greedy)[1]) == 4


def test_what_is_told_of_requests_that_wait(engine: Callable[..., LLM], prompts: Prompts, greedy: Greedy) -> None:
    core = engine(CPU, max_num_seqs=1).engine
    for number in range(3):
        core.add_request(f"r{number}", prompts[0], greedy(4))
    core.step()
    why = core.scheduler.admission.why_waiting
    assert [why(request) for request in (*core.scheduler.running, *core.scheduler.waiting)] == [None, SEATS, TURN]


def test_memory_is_named_where_it_is_short(engine: Callable[..., LLM], prompts: Prompts, greedy: Greedy) -> None:
    llm = engine(CPU, gpu_memory=45 * PAGE, host_memory=20 * PAGE)
    jobs, _ = run(llm, [[number + 4, *prompts[2]] for number in range(4)], [20] * 4, greedy)
    assert any(MEMORY in job.request.waited_for for job in jobs)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.tuples(st.sampled_from(LENGTHS), st.integers(1, MOST)), min_size=2, max_size=6),
    layer_s=st.sampled_from([1e-9, 1e-7, 1e-6, 3e-4]),
    pages=st.sampled_from([30, 45, 70]),
)
def test_any_requests_on_any_machine(
    lengths: list[tuple[int, int]],
    layer_s: float,
    pages: int,
    engine: Callable[..., LLM],
    prompts: Prompts,
    greedy: Greedy,
    alone: Alone,
) -> None:
    check_any(lengths, layer_s, pages, engine, prompts, greedy, alone)


@pytest.mark.parametrize("layer_s", [1e-9, 1e-7])
def test_some_requests_end_in_order_with_the_same_tokens(
    layer_s: float, engine: Callable[..., LLM], prompts: Prompts, greedy: Greedy, alone: Alone
) -> None:
    check_any([(70, 20), (40, 50), (80, 5)], layer_s, 45, engine, prompts, greedy, alone)


def check_any(
    lengths: list[tuple[int, int]],
    layer_s: float,
    pages: int,
    engine: Callable[..., LLM],
    prompts: Prompts,
    greedy: Greedy,
    alone: Alone,
) -> None:
    """Whatever the machine is expected to reach: nobody is overtaken or starves, nobody is made to wait twice between two ends,
    and tokens are those of a request alone."""
    wanted = [(prompts[2] + prompts[1])[:length] for length, _ in lengths]
    llm = engine(replace(SLOW, layer_s=layer_s), gpu_memory=pages * PAGE)
    jobs, _ = run(llm, wanted, [tokens for _, tokens in lengths], greedy)
    assert sum(job.request.preemptions for job in jobs) <= len(jobs) * len(jobs)
    for job, prompt, (_, tokens) in zip(jobs, wanted, lengths, strict=True):
        assert job.request.output_token_ids == alone(prompt)[:tokens]


@pytest.mark.parametrize("prompt", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_no_step_of_those_who_decode_pays_for_a_whole_layer_when_others_come(
    prompt: int, engine: Callable[..., LLM], prompts: Prompts, greedy: Greedy
) -> None:
    """Who comes, and a prompt that grows, waits while layers leave in portions, and says so; at last it runs as if alone."""
    llm = engine(CPU, gpu_memory=50 * PAGE, max_num_batched_tokens=64, max_num_mixed_tokens=16, enable_prefix_caching=False)
    core, residency, kv = llm.engine, llm.engine.parts.residency, llm.engine.parts.kv
    residency.chunk_bytes = residency.most_bytes = 4 * kv.layout.layers[0].entry_bytes
    asked = [(prompts[3], 120), ([7 + i % 900 for i in range(prompt)], 8), (prompts[0], 8)]
    jobs, copied = [], 0
    for number in range(600):
        if number in (0, 10, 14):
            jobs.append(core.add_request(f"r{len(jobs)}", asked[len(jobs)][0], greedy(asked[len(jobs)][1])))
        elif not core.has_work:
            break
        decoding, forced = any(r.decoding for r in core.scheduler.running), residency.num_moves
        before = kv.move.bytes if kv.move is not None else 0
        core.step()
        core.check_integrity()
        ended = residency.moves_since(forced)
        now = kv.move.bytes if kv.move is not None else 0
        copied += now > before
        if decoding:
            assert len(ended) <= 1 and (ended[0].bytes if ended else now) - before <= residency.most_bytes
    assert moves(llm) > 0 and copied > 10 and all(job.finished for job in jobs)
    assert "layers that leave the device" in {why for job in jobs for why in job.request.waited_for} or prompt == 200
    alone = engine(CPU, gpu_memory=400 * PAGE, max_num_seqs=1)
    for job, (tokens, made) in zip(jobs, asked, strict=True):
        assert job.request.output_token_ids == alone.generate([tokens], greedy(made))[0].token_ids


@pytest.mark.parametrize("seed", [2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (3, 4))])
def test_nobody_comes_and_goes_whatever_the_clock_learns(
    seed: int, engine: Callable[..., LLM], prompts: Prompts, greedy: Greedy
) -> None:
    """The worst that a clock can say: that all should join, and that one of them should wait. Who was made to wait stays away
    until a request has ended; all end, with their tokens."""
    llm = engine(gpu_memory=48 * PAGE)
    admission, rng = llm.engine.scheduler.admission, random.Random(seed)
    asked = [([i + 4, *(prompts[2] + prompts[1])][: rng.randint(30, 60)], rng.randint(66, 90)) for i in range(3)]
    set_back: dict[str, int] = {}
    seat, put_back = admission._seat, admission.put_back

    def seating(request: Request, parked: Any, *, patient: bool) -> bool:
        assert set_back.get(request.request_id) != admission.ends or not admission.running, "it came back too soon"
        return seat(request, parked, patient=patient)

    def leaving(request: Request, **options: Any) -> None:
        if admission._outpaced:
            set_back[request.request_id] = admission.ends
        put_back(request, **options)

    admission._seat, admission.put_back = seating, leaving  # type: ignore[method-assign, assignment]
    likely = {"joining": 0.9, "leaving": 0.002}
    admission._ask = lambda question, *_: rng.random() < likely[question]  # type: ignore[method-assign]
    jobs, _ = run(llm, [prompt for prompt, _ in asked], [made for _, made in asked], greedy)
    assert set_back, "somebody was made to wait"
    assert all(job.request.preemptions <= admission.ends for job in jobs) and jobs[0].request.preemptions == 0
    alone = engine(CPU, gpu_memory=400 * PAGE, max_num_seqs=1)
    for job, (prompt, made) in zip(jobs, asked, strict=True):
        assert job.request.output_token_ids == alone.generate([prompt], greedy(made))[0].token_ids


def test_for_whom_layers_have_begun_to_leave_comes_in(engine: Callable[..., LLM], prompts: Prompts, greedy: Greedy) -> None:
    """Whatever is said of it meanwhile: else layers would leave and come back with every word."""
    llm = engine(CPU, gpu_memory=40 * PAGE, max_num_batched_tokens=64)
    core, admission = llm.engine, llm.engine.scheduler.admission
    core.parts.residency.most_bytes = 8 * core.parts.kv.layout.layers[0].entry_bytes
    core.add_request("r0", prompts[3], greedy(120))
    for _ in range(4):
        core.step()
    core.add_request("r1", [7 + i for i in range(60)], greedy(8))
    for _ in range(100):
        core.step()
        if core.parts.residency.awaited:
            break
    admission._ask = lambda *_: False  # type: ignore[method-assign]
    came = False
    for _ in range(100):
        core.step()
        came = came or len(core.scheduler.running) == 2
        assert came or not [move for move in core.parts.residency.moves if not move.to_host]
    assert came


# The rule itself ------------------------------------------------------------------------------------------------------


class Tiers:
    """Room for some tokens with no layer away, and for more with each that is, as `Residency` would say."""

    def __init__(self, layers: int, tokens: int) -> None:
        self.policy = ResidencyPolicy(KVCost(layers, 100, 1, 0), layers * 100 * tokens + tokens)

    def fewest_away(self, lengths: list[int], *, but: object = None) -> int | None:
        return next((n for n in range(self.policy.kv.layers + 1) if self.policy.fits(n, sum(lengths), len(lengths))), None)


class Clock:
    """A step of one second, and so much more for every layer away and request."""

    def __init__(self, away: float) -> None:
        self.away = away

    def tokens_per_s(self, lengths: list[int], offloaded: int) -> float:
        return len(lengths) / (1 + self.away * offloaded * len(lengths)) if lengths else 0.0


def worth(away: float, tokens: int = 1000, least: int = 1) -> Worth:
    return Worth(Tiers(10, tokens), Clock(away), ServiceLimits(64, least))  # type: ignore[arg-type]


def test_joining_and_leaving_leave_a_gap_in_which_nothing_changes() -> None:
    """Whatever a layer costs, who is kept out is not called back by the rule that sent it out."""
    for step in range(1, 400):
        rule = worth(step / 4000)
        running = [250] * 4
        joins, stays = rule.joining_pays(running, [250]), rule.leaving_pays([*running, 250])
        assert not joins or stays, "one that joins is not made to wait at once"
    assert worth(0.0).joining_pays([250] * 4, [250]) and not worth(0.1).joining_pays([250] * 4, [250])


def test_one_joins_for_those_behind_it() -> None:
    """One request more costs a layer, and four more do not cost another: together they are faster."""
    rule = worth(0.1, tokens=1200)
    running = [300] * 4
    alone, together = rule.joining_pays(running, [10]), rule.joining_pays(running, [10] * 8)
    assert not alone and together


def test_least_concurrency() -> None:
    assert not worth(0.1).joining_pays([250] * 4, [250]) and worth(0.1, least=5).joining_pays([250] * 4, [250])
    assert not worth(0.1).leaving_pays([260] * 5) and worth(0.1, least=5).leaving_pays([260] * 5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"min_num_seqs": 0}, "min_num_seqs"),
        ({"min_num_seqs": 9, "max_num_seqs": 8}, "raise max_num_seqs"),
        ({"max_tpot_ms": 0}, "max_tpot_ms"),
        ({"max_tpot_ms": float("nan")}, "max_tpot_ms"),
        ({"max_wait_s": -1}, "max_wait_s"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EngineConfig("nano", **options)


def test_a_request_knows_nothing_of_waiting_before_it_has() -> None:
    assert Request("r", [1], 1, SamplingParams(), seed=0).waited_for == []


# Machines whose host tier is of no use to layers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "says"),
    [(replace(CPU, pinned=1 << 20), "only 1 MiB of host memory could be pinned"), (replace(CPU, host=1e8), "0.10 GB/s only")],
)
def test_kv_stays_on_the_device_where_the_host_is_of_no_use(
    machine: MachineSpeed,
    says: str,
    engine: Callable[..., LLM],
    prompts: Prompts,
    greedy: Greedy,
    caplog: pytest.LogCaptureFixture,
) -> None:
    llm = engine(machine, gpu_memory=45 * PAGE)
    assert says in caplog.text and "stays on the device" in caplog.text
    jobs, ran = run(llm, [[4, *prompts[2]], [5, *prompts[2]]], [20, 20], greedy)
    assert moves(llm) == 0 and max(ran) == 1 and jobs[0].stats is not None and jobs[0].stats.offloaded_layers == 0


def test_what_users_say_of_layers_is_obeyed_with_a_warning(
    engine: Callable[..., LLM], prompts: Prompts, greedy: Greedy, caplog: pytest.LogCaptureFixture
) -> None:
    llm = engine(replace(CPU, host=1e8), offload_layers=2)
    assert "as offload_layers asks for" in caplog.text
    [job], _ = run(llm, [prompts[1]], [5], greedy)
    assert job.stats is not None and job.stats.offloaded_layers == 2
    caplog.clear()
    engine(replace(CPU, host=1e8), offload_layers=0)
    assert not caplog.records


def test_a_host_tier_is_no_larger_than_what_can_be_pinned(engine: Callable[..., LLM]) -> None:
    held = engine(replace(CPU, pinned=50 * PAGE)).engine.parts.kv.host
    assert 40 * PAGE < held.num_bytes <= 50 * PAGE
    assert engine(replace(CPU, pinned=0)).engine.parts.kv.host.pages.num_pages == 1

"""Prompts that begin like earlier ones: less is computed, and nothing that a request says depends on what others asked."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from specontext import LLM, SamplingParams
from specontext.core import Batch
from specontext.engine.generation import Generation
from specontext.errors import RequestError

MakeLLM = Callable[..., LLM]
Greedy = Callable[..., SamplingParams]

# The Llama checkpoint: 3 layers, which are one block, 2 KV heads of 24 in float32, pages of 16 tokens; its head's keys and
# features take a page more.
SIZE, LAYERS, TOKEN = 16, 3, 2 * 2 * 24 * 4
PAGE = SIZE * TOKEN
HOST_PAGE = LAYERS * PAGE
BLOCK = 2


def text(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(4, 900) for _ in range(length)]


def ask(llm: LLM, prompt: list[int], params: SamplingParams) -> Generation:
    """One request by itself."""
    name = f"r{len(prompt)}-{random.Random(str(prompt)).random()}"
    job = llm.engine.add_request(name, prompt, params)
    while llm.engine.has_work:
        llm.engine.step()
        llm.engine.check_integrity()
    return job


def cached(job: Generation) -> int:
    assert job.stats is not None and job.stats.cached_tokens == (job.request.cached_tokens or 0)
    return job.stats.cached_tokens


@pytest.fixture(scope="module")
def fresh(make_llm: MakeLLM) -> Callable[..., list[int]]:
    """Tokens of a request in an engine that keeps nothing and has all the memory it could want."""
    engines: dict[tuple[str, str], LLM] = {}
    known: dict[tuple[Any, ...], list[int]] = {}

    def tokens(prompt: list[int], params: SamplingParams, method: str = "speculative", family: str = "llama") -> list[int]:
        key = (family, method, tuple(prompt), params)
        if key not in known:
            if (family, method) not in engines:
                engines[family, method] = make_llm(
                    family, method, budget=12, offload_layers=0, methods=[], enable_prefix_caching=False
                )
            known[key] = engines[family, method].generate([prompt], params)[0].token_ids
        return known[key]

    return tokens


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Callable[[LLM], list[int]]:
    """computed(llm): a list that gets the length of every prompt chunk that this engine computes."""

    def watch(llm: LLM) -> list[int]:
        lengths: list[int] = []
        run = llm.engine.runner.run

        def noting(batch: Batch) -> torch.Tensor:
            lengths.extend(segment.length for segment in batch.prefills)
            return run(batch)

        monkeypatch.setattr(llm.engine.runner, "run", noting)
        return lengths

    return watch


# Equality -------------------------------------------------------------------------------------------------------------

SHARED = text(1, 75)
ASKED = [SHARED, SHARED + text(2, 30), SHARED[:64] + text(3, 9), SHARED + text(2, 30), SHARED[:65], SHARED[:64], text(4, 20)]
FOUND = [0, 64, 64, 96, 64, 48, 0]  # full pages that came before, without the prompt's last token


WAYS = [*(("speculative", n) for n in (0, 2, -1, None)), ("full", 2), ("streaming", -1), ("random", 0), ("oracle", 1)]


@pytest.mark.parametrize(("method", "offload_layers"), WAYS)
def test_tokens_are_those_of_a_fresh_engine(
    method: str, offload_layers: int | None, make_llm: MakeLLM, greedy: Greedy, fresh: Any, computed: Any
) -> None:
    llm = make_llm("llama", method, budget=12, offload_layers=offload_layers, max_num_batched_tokens=50, verify_loads=True)
    lengths = computed(llm)
    for prompt, found in zip(ASKED, FOUND, strict=True):
        lengths.clear()
        job = ask(llm, prompt, greedy(12))
        assert job.request.output_token_ids == fresh(prompt, greedy(12), method)
        assert cached(job) == found and sum(lengths) == len(prompt) - found
    check_idle(llm)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "bands"])
def test_heads_of_every_kind(family: str, make_llm: MakeLLM, greedy: Greedy, fresh: Any) -> None:
    """One that sees the last hidden state, one with more groups and a map, one without features, one of bands of layers."""
    llm = make_llm(family, budget=12, offload_layers=1, methods=[])
    for prompt, found in zip(ASKED, FOUND, strict=True):
        job = ask(llm, prompt, greedy(12))
        assert job.request.output_token_ids == fresh(prompt, greedy(12), family=family)
        assert cached(job) == found
    check_idle(llm)


def test_methods_find_each_other_s_prompts(make_llm: MakeLLM, greedy: Greedy, fresh: Any) -> None:
    """Also one that uses no head leaves keys and features behind."""
    llm = make_llm("llama", budget=12, methods=["full", "streaming", "oracle"])
    ways = ["full", "speculative", "oracle", "streaming", "speculative"]
    for way, more in zip(ways, range(5), strict=True):
        prompt = SHARED + text(10 + more, 5)
        job = ask(llm, prompt, greedy(10, method=way))
        assert job.request.output_token_ids == fresh(prompt, greedy(10), way)
        assert cached(job) == (64 if more else 0)


@pytest.mark.parametrize(
    ("method", "found"),
    [
        ("h2o", 0),
        ("snapkv", 64),
        ("quest", 80),
        *(pytest.param(name, 80, marks=pytest.mark.slow) for name in ("shadowkv", "clusterkv")),
    ],
)
def test_methods_that_learn_from_prompts(
    method: str, found: int, make_llm: MakeLLM, greedy: Greedy, fresh: Any, computed: Any
) -> None:
    """H2O must see all queries of the prompt, SnapKV the last 32; the others learn from keys."""
    llm = make_llm("llama", method, budget=40, methods=[], offload_layers=0)
    roomy = make_llm("llama", method, budget=40, methods=[], offload_layers=0, enable_prefix_caching=False)
    lengths = computed(llm)
    for more in (7, 8):
        prompt = text(5, 96)[:-5] + text(more, 5)
        lengths.clear()
        job = ask(llm, prompt, greedy(40))
        assert job.request.output_token_ids == roomy.generate([prompt], greedy(40))[0].token_ids
    assert cached(job) == found and sum(lengths) == 96 - found
    job = ask(llm, prompt[:64] + text(9, 32), greedy(3))
    assert cached(job) == {"h2o": 0}.get(method, 64), "exactly so many queries are left"


@pytest.mark.parametrize("family", ["llama", "bands"])
def test_keys_features_and_selections_are_those_of_a_fresh_engine(family: str, make_llm: MakeLLM, greedy: Greedy) -> None:
    settings_: dict[str, Any] = {"budget": 16, "offload_layers": 1, "measure_recall": True, "max_num_batched_tokens": 40}
    llm = make_llm(family, **settings_)
    plain = make_llm(family, **settings_, enable_prefix_caching=False)
    ask(llm, SHARED, greedy(1))
    prompt = SHARED + text(2, 40)
    for one in (llm, plain):
        one.engine.add_request("x", prompt, greedy(20))
        while not (one.engine.scheduler.running and one.engine.scheduler.running[0].decoding):
            one.engine.step()
    assert llm.engine.scheduler.running[0].cached_tokens == 64
    ours, theirs = (one.engine.parts.selector for one in (llm, plain))
    torch.testing.assert_close(ours.cache.keys_of(0, len(prompt)), theirs.cache.keys_of(0, len(prompt)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.last_fused[0], theirs.last_fused[0], rtol=1e-4, atol=1e-4)
    ends = []
    for one in (llm, plain):
        job = one.engine._generations["x"]
        while one.engine.has_work:
            one.engine.step()
        ends.append(job.stats)
    for name in ("attention_recall", "overlap", "tokens_read_per_step", "bytes_loaded_per_step", "hit_rate", "decode_steps"):
        assert getattr(ends[0], name) == pytest.approx(getattr(ends[1], name)), name


@pytest.mark.parametrize("family", ["llama", "bands"])
def test_the_first_key_after_a_hit_needs_the_last_feature(family: str, make_llm: MakeLLM, greedy: Greedy) -> None:
    """It is made of the feature of a token that this engine has not computed for this request."""
    llm, plain = make_llm(family, budget=16), make_llm(family, budget=16, enable_prefix_caching=False)
    ask(llm, SHARED, greedy(1))
    keys = []
    for one in (llm, plain):
        one.engine.add_request("x", SHARED[:64] + text(6, 6), greedy(5))
        one.engine.step()
        keys.append(one.engine.parts.selector.cache.keys_of(0, 70)[63:66])
    torch.testing.assert_close(keys[0], keys[1], rtol=1e-4, atol=1e-4)


# What is kept ---------------------------------------------------------------------------------------------------------


def test_generated_pages_are_never_shared(make_llm: MakeLLM, greedy: Greedy, fresh: Any) -> None:
    """Their rows come from sparse reading: who asks with these tokens gets them computed densely."""
    llm = make_llm("llama", budget=12)
    first = ask(llm, SHARED, greedy(60))
    again = SHARED + first.request.output_token_ids
    job = ask(llm, again, greedy(20))
    assert cached(job) == 64 and len(again) == 135
    assert job.request.output_token_ids == fresh(again, greedy(20))
    assert cached(ask(llm, again, greedy(1))) == 128, "now they have been"


def test_what_is_computed_again_after_a_preemption_is_dense_and_shared(make_llm: MakeLLM, greedy: Greedy, fresh: Any) -> None:
    """Both tiers are too small for two: one gives up what it has, and its generated tokens become a part of its prompt."""
    llm = make_llm("llama", "full", gpu_memory=40 * PAGE, host_memory=12 * PAGE, max_num_batched_tokens=50, offload_layers=0)
    jobs = [llm.engine.add_request(f"r{i}", text(20 + i, 20), greedy(140)) for i in range(2)]
    while llm.engine.has_work:
        llm.engine.step()
        llm.engine.check_integrity()
    again = [job.request for job in jobs if job.request.prefill_length > job.request.prompt_length]
    assert len(again) == 1 and again[0].prefill_length > 50
    for i, job in enumerate(jobs):
        assert job.request.output_token_ids == fresh(text(20 + i, 20), greedy(140), "full")
        assert job.request.cached_tokens == 0
    prompt = again[0].token_ids[:60]
    job = ask(llm, prompt, greedy(5))
    assert cached(job) == 48, "3 blocks of 3 pages are what the host has room for"
    assert job.request.output_token_ids == fresh(prompt, greedy(5), "full")
    check_idle(llm)


def test_only_full_pages_and_never_the_last_token(make_llm: MakeLLM, greedy: Greedy) -> None:
    llm = make_llm("llama", budget=12)
    for length, found in ((15, 0), (16, 0), (17, 16), (31, 16), (32, 16), (33, 32), (34, 32)):
        assert cached(ask(llm, text(30, length), greedy(1))) == found
    assert llm.engine.parts.prefix.pages == 2 * BLOCK


def test_prompts_with_logprobs_are_computed_in_full_and_kept(make_llm: MakeLLM, greedy: Greedy) -> None:
    llm, plain = make_llm("llama", budget=12), make_llm("llama", budget=12, enable_prefix_caching=False)
    wanted = greedy(4, prompt_logprobs=1)
    assert cached(ask(llm, SHARED, wanted)) == 0
    assert cached(ask(llm, SHARED, greedy(4))) == 64
    job, expected = ask(llm, SHARED, wanted), ask(plain, SHARED, wanted)
    assert cached(job) == 0
    ours, theirs = job.request.prompt_logprobs, expected.request.prompt_logprobs
    assert ours is not None and theirs is not None and len(ours) == len(theirs) == 75 and ours[0] is None
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert one is not None and other is not None and one == pytest.approx(other, abs=1e-4)


def test_prompts_that_are_computed_side_by_side_are_kept_once(make_llm: MakeLLM, greedy: Greedy) -> None:
    """They want log-probabilities and wait for nobody; the longer one goes on from what the other has left."""
    llm = make_llm("llama", budget=12, max_num_batched_tokens=60)
    for name, prompt in (("a", SHARED), ("b", SHARED + text(2, 30))):
        llm.engine.add_request(name, prompt, greedy(3, prompt_logprobs=0))
    while llm.engine.has_work:
        llm.engine.step()
        llm.engine.check_integrity()
    assert llm.engine.parts.prefix.pages == 6 * BLOCK
    assert cached(ask(llm, SHARED + text(2, 30), greedy(3))) == 96


def test_nothing_is_copied_twice(make_llm: MakeLLM, greedy: Greedy, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm("llama", budget=12)
    store = llm.engine.parts.kv
    kept, brought, keep, bring = [0], [0], store.keep, store.bring

    def keeping(chain: Any, pages: Any, *rest: Any) -> None:
        kept[0] += len(pages)
        keep(chain, pages, *rest)

    def bringing(chain: Any, seat: int) -> Any:
        brought[0] += len(chain)
        return bring(chain, seat)

    monkeypatch.setattr(store, "keep", keeping)
    monkeypatch.setattr(store, "bring", bringing)
    for prompt in (SHARED, SHARED, SHARED + text(2, 30)):
        ask(llm, prompt, greedy(2))
    assert (kept, brought) == ([4 + 2], [4 + 4])


def test_it_can_be_switched_off_and_emptied(make_llm: MakeLLM, greedy: Greedy, fresh: Any) -> None:
    off, on = make_llm("llama", budget=12, enable_prefix_caching=False), make_llm("llama", budget=12)
    for _ in range(2):
        assert cached(ask(off, SHARED, greedy(2))) == 0
    assert off.engine.parts.prefix.pages == off.engine.parts.prefix.queries == 0
    ask(on, SHARED, greedy(2))
    assert on.engine.parts.prefix.pages == 4 * BLOCK and on.engine.parts.kv.host.pages.num_held == 0
    on.engine.reset_prefix_cache()
    check_idle(on)
    assert on.engine.parts.prefix.pages == 0 and cached(ask(on, SHARED, greedy(2))) == 0


def test_emptied_while_a_prompt_is_computed(make_llm: MakeLLM, greedy: Greedy, fresh: Any) -> None:
    llm = make_llm("llama", budget=12, max_num_batched_tokens=20)
    job = llm.engine.add_request("x", SHARED, greedy(5))
    for step in range(30):
        if step == 2:
            llm.engine.reset_prefix_cache()
        llm.engine.step()
        llm.engine.check_integrity()
    assert job.request.output_token_ids == fresh(SHARED, greedy(5))
    assert llm.engine.parts.prefix.pages == 0, "pages without the ones before them are of no use"


def test_counters_are_tokens_as_in_vllm(make_llm: MakeLLM, greedy: Greedy) -> None:
    llm = make_llm("llama", budget=12)
    for prompt in (SHARED, SHARED + text(2, 30)):
        ask(llm, prompt, greedy(2))
    ask(llm, SHARED, greedy(2, prompt_logprobs=0))
    prefix = llm.engine.parts.prefix
    assert (prefix.queries, prefix.hits, prefix.pages) == (75 + 105, 64, 6 * BLOCK)


# Waiting for each other -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1000, 20])
def test_outputs_of_one_prompt_compute_it_once(chunk: int, make_llm: MakeLLM, greedy: Greedy, computed: Any) -> None:
    llm = make_llm("llama", budget=12, max_num_batched_tokens=chunk)
    lengths = computed(llm)
    params = SamplingParams(n=3, max_tokens=6, temperature=1.0, seed=1, ignore_eos=True)
    outputs = llm.generate([SHARED], params)[0].outputs
    assert [o.stats["cached_tokens"] for o in outputs] == [0, 64, 64]
    assert sum(lengths) == 75 + 2 * 11
    plain = make_llm("llama", budget=12, enable_prefix_caching=False).generate([SHARED], params)[0].outputs
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]
    check_idle(llm)


def test_who_shares_less_than_a_page_waits_for_nobody(make_llm: MakeLLM, greedy: Greedy) -> None:
    llm = make_llm("llama", budget=12, max_num_batched_tokens=20)
    for name, prompt in (("a", SHARED), ("b", SHARED[:15] + text(2, 30)), ("c", SHARED[:16]), ("d", SHARED[:17])):
        llm.engine.add_request(name, prompt, greedy(3))
    llm.engine.scheduler.prepare()
    assert [r.request_id for r in llm.engine.scheduler.running] == ["a", "b", "c"], "d waits for the page that a computes first"
    llm.engine.step()
    d = llm.engine.scheduler.running[-1]
    assert d.request_id == "d" and d.cached_tokens == 16
    while llm.engine.has_work:
        llm.engine.step()
    check_idle(llm)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_twin_goes_on_alone_when_the_other_is_aborted(steps: int, make_llm: MakeLLM, greedy: Greedy, fresh: Any) -> None:
    llm = make_llm("llama", budget=12, max_num_batched_tokens=20)
    engine = llm.engine
    engine.add_request("a", SHARED, greedy(5))
    twin = engine.add_request("b", SHARED, greedy(5))
    for _ in range(steps):
        engine.step()
    assert twin.request.seat < 0
    engine.abort("a")
    engine.step()
    assert twin.request.seat >= 0
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    assert twin.request.output_token_ids == fresh(SHARED, greedy(5))
    assert cached(twin) == steps * 20 // SIZE * SIZE
    check_idle(llm)


def test_a_twin_whose_other_cannot_keep_its_pages_does_not_wait_for_them(make_llm: MakeLLM, greedy: Greedy, fresh: Any) -> None:
    """The host has room for one block only."""
    memory = {"host_memory": (1 + 1) * HOST_PAGE, "offload_layers": 0}
    llm = make_llm("llama", "streaming", budget=12, methods=[], max_num_batched_tokens=20, **memory)
    jobs = [llm.engine.add_request(name, SHARED, greedy(5)) for name in ("a", "b")]
    llm.engine.step()
    assert jobs[1].request.seat < 0 and llm.engine.parts.prefix.pages == 1
    llm.engine.step()
    assert jobs[1].request.seat >= 0 and jobs[1].request.cached_tokens == 16 and not jobs[0].request.decoding
    while llm.engine.has_work:
        llm.engine.step()
        llm.engine.check_integrity()
    assert [job.request.output_token_ids for job in jobs] == [fresh(SHARED, greedy(5), "streaming")] * 2
    check_idle(llm)


def test_pages_that_are_dropped_while_a_prompt_is_computed(make_llm: MakeLLM, greedy: Greedy, fresh: Any) -> None:
    """What would follow them is of no use to anyone, and nobody waits for it."""
    llm = make_llm("llama", budget=12, max_num_batched_tokens=20, offload_layers=0)
    engine, host = llm.engine, llm.engine.parts.kv.host
    jobs = [engine.add_request(name, SHARED, greedy(5)) for name in ("a", "b")]
    engine.step()
    assert engine.parts.prefix.pages == BLOCK and jobs[1].request.seat < 0
    host.pages.free(host.allocate(host.pages.num_free))  # somebody needs them all for a moment
    engine.scheduler.prepare()
    assert jobs[1].request.seat >= 0 and jobs[1].request.cached_tokens == 0
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    assert [job.request.output_token_ids for job in jobs] == [fresh(SHARED, greedy(5))] * 2
    assert engine.parts.prefix.pages == 4 * BLOCK, "the other one's"


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_prompt_that_waits_half_computed(forgotten: bool, make_llm: MakeLLM, greedy: Greedy, fresh: Any) -> None:
    """Where its first pages are still kept, the next ones follow them; else the features of pages in between are unknown."""
    llm = make_llm("llama", budget=12, max_num_batched_tokens=20)
    engine = llm.engine
    job = engine.add_request("a", SHARED, greedy(5))
    for _ in range(2):
        engine.step()
    engine.scheduler.admission.put_back(job.request)
    engine.check_integrity()
    if forgotten:
        engine.reset_prefix_cache()
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    assert job.request.output_token_ids == fresh(SHARED, greedy(5))
    assert engine.parts.prefix.pages == (0 if forgotten else 4 * BLOCK)
    again = ask(llm, SHARED, greedy(5))
    assert again.request.output_token_ids == fresh(SHARED, greedy(5)) and cached(again) == (0 if forgotten else 64)


# Little memory --------------------------------------------------------------------------------------------------------


def check_idle(llm: LLM) -> None:
    """All pages are free, or kept and given up when that is said."""
    kv = llm.engine.parts.kv
    assert not llm.engine.has_work and not kv.seats and not kv.parked
    llm.engine.check_integrity()
    assert kv.arena.pages.num_held == kv.host.pages.num_held == 0
    assert kv.host.pages.num_free == kv.host.pages.num_pages - 1


def test_a_request_that_needs_the_whole_host_gets_it(make_llm: MakeLLM, greedy: Greedy, fresh: Any) -> None:
    """Also where the blocks that it could use stand in its own way."""
    need = 7
    llm = make_llm("llama", budget=12, host_memory=(1 + need) * HOST_PAGE, offload_layers=-1, max_num_seqs=1, max_model_len=200)
    short = SHARED[:40]
    for prompt in (short, SHARED + text(2, 30)):
        job = ask(llm, prompt, greedy(5))
        assert job.request.output_token_ids == fresh(prompt, greedy(5))
    assert cached(job) == 0 and len(prompt) + 5 > 6 * SIZE, "its own pages and blocks do not fit together"
    check_idle(llm)


def test_blocks_make_room_for_layers_that_leave_the_device(make_llm: MakeLLM, greedy: Greedy, fresh: Any) -> None:
    llm = make_llm("llama", budget=12, gpu_memory=26 * PAGE, host_memory=40 * PAGE, max_num_seqs=1)
    for seed in range(40, 44):
        ask(llm, text(seed, 60), greedy(2))
    full = llm.engine.parts.prefix.pages
    assert full > 10
    job = ask(llm, text(50, 80), greedy(100))
    assert job.request.output_token_ids == fresh(text(50, 80), greedy(100)) and job.stats is not None and job.stats.moves
    assert llm.engine.parts.prefix.pages < full
    check_idle(llm)


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 40))])
def test_any_history(seed: int, make_llm: MakeLLM, greedy: Greedy, fresh: Any) -> None:
    """Requests that share beginnings come, wait for each other, move, are preempted and aborted in tiers of any size."""
    rng = random.Random(seed)
    method = rng.choice(("speculative", "speculative", "full", "oracle", "streaming", "random"))
    llm = make_llm(
        "llama",
        method,
        budget=12,
        slots=rng.choice([None, 15, 28]),
        offload_layers=rng.choice([None, None, 0, 1, 3]),
        gpu_memory=rng.choice([26, 40, 90]) * PAGE,
        host_memory=rng.choice([14, 24, 40, 100]) * PAGE,
        max_num_seqs=rng.choice([1, 3, 5]),
        max_num_batched_tokens=rng.choice([7, 30, 200]),
        methods=[],
        verify_loads=rng.random() < 0.5,
    )
    engine, prefix = llm.engine, llm.engine.parts.prefix
    engine.parts.residency.chunk_bytes = rng.choice([500, 5000, 1 << 30])
    asked = list(prompts_of(rng, greedy))
    jobs: list[Generation] = []
    for at in range(3000):
        if len(jobs) < len(asked) and (rng.random() < 0.25 or not engine.has_work):
            try:
                jobs.append(engine.add_request(f"r{at}", *asked[len(jobs)]))
            except RequestError as error:
                assert "memory" in str(error)
                asked.pop(len(jobs))
        elif not engine.has_work:
            break
        elif rng.random() < 0.02:
            engine.abort(rng.choice(jobs).request.request_id)
        elif rng.random() < 0.01:
            engine.reset_prefix_cache()
        else:
            engine.step()
        engine.check_integrity()
    check_idle(llm)
    assert len(jobs) == len(asked)
    for job, (prompt, params) in zip(jobs, asked, strict=True):
        request, made = job.request, job.request.output_token_ids
        assert request.finish_reason == "abort" or len(made) == params.max_tokens
        assert (request.cached_tokens or 0) % SIZE == 0 and (request.cached_tokens or 0) < len(prompt)
        if request.prefill_length == request.prompt_length or method == "full":
            assert made == fresh(prompt, params, method)[: len(made)]
    assert 0 <= prefix.hits < max(prefix.queries, 1)


def prompts_of(rng: random.Random, greedy: Greedy) -> Iterator[tuple[list[int], SamplingParams]]:
    """Prompts that branch off one another at random places, from few texts, so that histories share what is to be expected."""
    for _ in range(rng.randint(4, 9)):
        prompt = text(rng.randrange(2), rng.choice([16, 33, 64, 90]))
        if rng.random() < 0.6:
            prompt = prompt[: rng.randint(1, len(prompt))] + text(rng.randrange(2, 5), rng.choice([1, 15, 40]))
        yield prompt, greedy(rng.choice([1, 8, 30]))

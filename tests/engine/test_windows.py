"""Layers with a window beside layers without: nothing that happens to KV changes tokens, and rings are as small as windows."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from specontext import LLM, SamplingParams
from specontext.kernels.window_attention import window_attention
from specontext.layer_sizes import Window
from tests.engine.test_equality import check_idle, tokens_of
from tests.engine.test_prefix import ask, cached

FAMILIES = ("windows", "sinks", "chunks", "shared")
ONE = "windows"
Prompts = list[list[int]]
MakeLLM = Callable[..., LLM]
Greedy = Callable[..., SamplingParams]
Expected = Callable[..., list[list[int]]]


@pytest.fixture(scope="module")
def alone(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> Callable[..., list[list[int]]]:
    """Tokens at a tight budget, resident, one prompt at a time, in one chunk, in an engine that keeps nothing."""
    known: dict[tuple[str, str], list[list[int]]] = {}

    def tokens(family: str, method: str = "speculative") -> list[list[int]]:
        if (family, method) not in known:
            llm = make_llm(family, method, budget=12, offload_layers=0, enable_prefix_caching=False)
            known[family, method] = [llm.generate([prompt], greedy())[0].token_ids for prompt in prompts]
        return known[family, method]

    return tokens


# A budget that covers everything --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["full", "speculative", "oracle"])
@pytest.mark.parametrize(("offload_layers", "chunk"), [(0, 1024), (-1, 9)])
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
    options = {"budget": 110, "offload_layers": offload_layers, "max_num_batched_tokens": chunk}
    llm = make_llm(family, method, **options, verify_loads=True)
    assert tokens_of(llm, prompts, greedy()) == expected(family)


# A tight budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tight_budget_reads_as_many_entries_as_it_says_in_layers_without_a_window(
    family: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, alone: Any, expected: Expected
) -> None:
    assert alone(family)[1:] != expected(family)[1:]
    llm = make_llm(family, budget=12, measure_recall=True)
    (output,) = llm.generate(prompts[2:3], greedy(4))
    assert output.stats["tokens_read_per_step"] == 12
    assert len(output.stats["attention_recall_by_layer"]) == 3  # type: ignore[arg-type]
    assert 0 < float(output.stats["attention_recall"]) < 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *((family, "speculative") for family in FAMILIES),
        *((family, method) for family in (ONE, "shared") for method in ("quest", "snapkv", "h2o")),
    ],
)
def test_tiers_slots_chunks_and_company_change_nothing(
    family: str, method: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, alone: Any
) -> None:
    options = {"offload_layers": 2, "slots": 15, "max_num_seqs": 3, "max_num_batched_tokens": 23}
    llm = make_llm(family, method, budget=12, **options, verify_loads=True)
    lengths = [24, 3, 11, 20]
    outputs = llm.generate(prompts, [greedy(n) for n in lengths])
    assert [o.token_ids for o in outputs] == [t[:n] for t, n in zip(alone(family, method), lengths, strict=True)]
    check_idle(llm)


@pytest.mark.slow
def test_methods_that_foresee_and_requests_that_choose(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, expected: Expected, alone: Any
) -> None:
    llm = make_llm(ONE, "speculative", budget=12, offload_layers=0, methods=["full", "shared-oracle"])
    params = [greedy(), greedy(method="full"), greedy(method="shared-oracle"), greedy()]
    outputs = [output.token_ids for output in llm.generate(prompts, params)]
    assert outputs[1] == expected(ONE)[1] and outputs[0] == alone(ONE)[0] and outputs[3] == alone(ONE)[3]
    assert outputs[2] == alone(ONE, "shared-oracle")[2]


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_layers_that_move_and_requests_that_wait_change_nothing(
    family: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, alone: Any
) -> None:
    roomy = make_llm(family, budget=12)
    page = roomy.engine.parts.kv.arena.page_bytes
    llm = make_llm(family, budget=12, gpu_memory=26 * page, host_memory=60 * page, max_num_batched_tokens=40, verify_loads=True)
    assert tokens_of(llm, prompts, greedy()) == alone(family)
    engine = llm.engine
    assert engine.parts.residency.num_moves, "else the test says nothing"
    jobs = [engine.add_request(f"r{i}", prompt, greedy()) for i, prompt in enumerate(prompts)]
    preempted = 0
    for step in range(300):
        if not engine.has_work:
            break
        if step % 7 == 3 and len(engine.scheduler.running) > 1:
            preempted += engine.scheduler.admission.preempt(but=None)
        engine.step()
        engine.check_integrity()
    assert preempted > 3
    assert [job.request.output_token_ids for job in jobs] == alone(family)
    check_idle(llm)


def test_rings_are_as_long_as_their_window_and_no_part_of_what_grows(make_llm: MakeLLM) -> None:
    short, long = (make_llm(ONE, budget=12, max_model_len=length, max_num_batched_tokens=64) for length in (128, 512))
    plans = [llm.engine.parts.plan for llm in (short, long)]
    entry = short.shape.kv_heads * short.shape.row_bytes
    seats = short.engine.config.max_num_seqs + 1
    for llm, plan in zip((short, long), plans, strict=True):
        rings = llm.engine.parts.kv.rings
        assert rings is not None and rings.entries == 48  # 10 and two pages, in whole pages
        assert rings.num_bytes == 2 * seats * 48 * entry
        assert plan.fixed["windows"] == rings.num_bytes + 2 * 64 * entry
        assert plan.kv.layers == 3 and plan.kv.resident_token == entry
        assert llm.engine.parts.kv.arena.layout.full == [0, 1, 2]


# Known prompts --------------------------------------------------------------------------------------------------------


def text(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(4, 900) for _ in range(length)]


@pytest.mark.parametrize(
    ("family", "offload_layers"), [("windows", 0), ("chunks", 2), ("shared", 2), pytest.param("sinks", 2, marks=pytest.mark.slow)]
)
def test_a_prompt_that_goes_on_from_an_earlier_one_finds_its_windows(
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
    assert found == [0, 176, 80, 192, 176, 0, 16]
    check_idle(llm)


@pytest.mark.parametrize("chunk", [23, 64, 1024])
def test_another_question_about_a_text_finds_all_its_pages(chunk: int, make_llm: MakeLLM, greedy: Greedy) -> None:
    fresh = make_llm(ONE, budget=12, enable_prefix_caching=False)
    llm = make_llm(ONE, budget=12, max_num_batched_tokens=chunk)
    said = text(1, 187)
    for number, question in enumerate((text(5, 40), text(6, 20), text(7, 60))):
        job = ask(llm, said + question, greedy(12))
        assert job.request.output_token_ids == fresh.generate([said + question], greedy(12))[0].token_ids
        assert cached(job) == (176 if number else 0)
    check_idle(llm)


def test_no_request_begins_where_its_windows_would_miss_tokens(
    make_llm: MakeLLM, greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where chunks are too long to be kept whole, the rows of early tokens are gone when a chunk has been computed."""
    fresh = make_llm(ONE, budget=12, enable_prefix_caching=False)
    monkeypatch.setattr("specontext.memory.windows.KEPT_BYTES", 0)
    llm = make_llm(ONE, budget=12)
    said = text(1, 187)
    ask(llm, said, greedy(4))
    cut = said[:100] + text(5, 20)
    job = ask(llm, cut, greedy(12))
    assert cached(job) == 0, "pages 0 to 5 are known, and the window before token 96 is not"
    assert job.request.output_token_ids == fresh.generate([cut], greedy(12))[0].token_ids
    assert cached(ask(llm, cut, greedy(4))) == 112, "what was computed again is known now"
    assert cached(ask(llm, said[:100] + text(6, 20), greedy(4))) == 96


# The attention itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [Window(1), Window(7), Window(40), Window(7, chunked=True), Window(16, chunked=True)])
@pytest.mark.parametrize(("start", "before", "chunk"), [(0, 0, 33), (23, 6, 17), (5, 5, 1), (64, 0, 20)])
def test_window_attention(window: Window, start: int, before: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specontext.kernels.window_attention.BLOCK", 8)
    first = max(0, start - max(before, min(start, window.size - 1)))
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(chunk, 4, 16, generator=generator)
    key, value = torch.randn(2, start + chunk, 2, 16, generator=generator)[:, first:].unbind(0)
    places, keys = torch.arange(start, start + chunk)[:, None], torch.arange(first, start + chunk)
    seen = (keys <= places) & (keys // window.size == places // window.size if window.chunked else keys > places - window.size)
    logits = torch.einsum("chd,shd->hcs", query.double(), key.repeat_interleave(2, 1).double()) * 0.3
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    right = torch.einsum("hcs,shd->chd", weights, value.repeat_interleave(2, 1).double())
    torch.testing.assert_close(window_attention(query, key, value, 0.3, window, first).double(), right, atol=2e-6, rtol=1e-5)


def test_kv_in_8_bits_leaves_rings_as_they_are(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    """Layers without a window have codes; what waits and what is known of prompts comes back as it was."""
    plain = make_llm(ONE, budget=12, offload_layers=0, kv_cache_dtype="int8", enable_prefix_caching=False)
    right = [plain.generate([prompt], greedy())[0].token_ids for prompt in prompts]
    llm = make_llm(ONE, budget=12, offload_layers=2, kv_cache_dtype="int8", max_num_batched_tokens=40)
    engine = llm.engine
    for _ in range(2):
        jobs = [engine.add_request(f"r{i}", prompt, greedy()) for i, prompt in enumerate(prompts)]
        for step in range(300):
            if not engine.has_work:
                break
            if step % 7 == 3 and len(engine.scheduler.running) > 1:
                engine.scheduler.admission.preempt(but=None)
            engine.step()
            engine.check_integrity()
        assert [job.request.output_token_ids for job in jobs] == right
    assert cached(jobs[2]) == 80
    check_idle(llm)

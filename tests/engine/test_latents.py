"""Multi-head latent attention: latents are stored, chosen, loaded and moved as rows of one KV head, and tokens stay the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from specontext import LLM, SamplingParams
from specontext.errors import ConfigError
from specontext.kernels import dispatch
from tests.engine.test_equality import check_idle, tokens_of
from tests.engine.test_graph_safety import SeveralStreams
from tests.engine.test_prefix import ask, cached
from tests.engine.test_windows import text

ONE = "latents"
OTHERS = ("streaming", "oracle", "random", "quest", "shadowkv", "clusterkv", "snapkv", "h2o")
EVERY_METHOD = [
    "speculative",
    *(name if name in ("quest", "snapkv") else pytest.param(name, marks=pytest.mark.slow) for name in OTHERS),
]
Prompts = list[list[int]]
MakeLLM = Callable[..., LLM]
Greedy = Callable[..., SamplingParams]
Expected = Callable[..., list[list[int]]]


@pytest.fixture(scope="module")
def alone(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> Callable[..., list[list[int]]]:
    """Tokens at a tight budget, resident, one prompt at a time, in one chunk, in an engine that keeps nothing."""
    known: dict[str, list[list[int]]] = {}

    def tokens(method: str = "speculative") -> list[list[int]]:
        if method not in known:
            llm = make_llm(ONE, method, budget=12, offload_layers=0, enable_prefix_caching=False)
            known[method] = [llm.generate([prompt], greedy())[0].token_ids for prompt in prompts]
        return known[method]

    return tokens


@pytest.mark.parametrize("method", ["full", "speculative", "oracle"])
@pytest.mark.parametrize(("offload_layers", "chunk"), [(0, 1024), (-1, 9), (2, 64)])
def test_a_budget_of_the_whole_context_gives_hugging_face_s_tokens(
    method: str, offload_layers: int, chunk: int, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, expected: Expected
) -> None:
    llm = make_llm(ONE, method, budget=110, offload_layers=offload_layers, max_num_batched_tokens=chunk, verify_loads=True)
    assert tokens_of(llm, prompts, greedy()) == expected(ONE)


def test_what_is_stored_of_a_token_is_its_latent(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    """32 numbers of the latent and 8 that RoPE turns, once for all heads, in each of four layers; keys are of the head."""
    llm = make_llm(ONE, budget=12, offload_layers=2)
    row = 4 * (32 + 8)
    kv, plan = llm.engine.parts.kv, llm.engine.parts.plan
    assert kv.arena.rows.shape[1:] == kv.host.rows.shape[1:] == (1, 40)
    assert kv.layout.heads == 1 and kv.layout.layers[0].entry_bytes == plan.kv.resident_token == row
    assert kv.arena.page_bytes == 16 * row and kv.host.page_bytes == 16 * row * kv.layout.layer_blocks.places
    (output,) = llm.generate(prompts[2:3], greedy(4))
    assert output.stats["tokens_read_per_step"] == 12
    assert output.stats["bytes_full_per_step"] == sum(4 * row * (83 + step) for step in (1, 2, 3)) / 3
    dense = make_llm(ONE, "full", offload_layers=2)
    (output,) = dense.generate(prompts[2:3], greedy(4))
    assert output.stats["bytes_loaded_per_step"] == output.stats["bytes_full_per_step"] / 2


def test_a_tight_budget_changes_tokens(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, alone: Any, expected: Expected
) -> None:
    """Else the tests below would say nothing."""
    assert alone()[1:] != expected(ONE)[1:]
    llm = make_llm(ONE, budget=12, measure_recall=True)
    (output,) = llm.generate(prompts[2:3], greedy(4))
    assert len(output.stats["attention_recall_by_layer"]) == 4  # type: ignore[arg-type]
    assert 0 < float(output.stats["attention_recall"]) < 1  # type: ignore[arg-type]


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_tiers_slots_chunks_and_company_change_nothing(
    method: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, alone: Any
) -> None:
    options = {"offload_layers": 2, "slots": 15, "max_num_seqs": 3, "max_num_batched_tokens": 23}
    llm = make_llm(ONE, method, budget=12, **options, verify_loads=True)
    lengths = [24, 3, 11, 20]
    outputs = llm.generate(prompts, [greedy(n) for n in lengths])
    assert [o.token_ids for o in outputs] == [t[:n] for t, n in zip(alone(method), lengths, strict=True)]
    check_idle(llm)


def test_methods_that_foresee_and_requests_that_choose(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, expected: Expected, alone: Any
) -> None:
    llm = make_llm(ONE, "speculative", budget=12, offload_layers=0, methods=["full", "shared-oracle"])
    params = [greedy(), greedy(method="full"), greedy(method="shared-oracle"), greedy()]
    outputs = [output.token_ids for output in llm.generate(prompts, params)]
    assert outputs[1] == expected(ONE)[1] and outputs[0] == alone()[0] and outputs[3] == alone()[3]
    assert outputs[2] == alone("shared-oracle")[2]


def test_layers_that_move_and_requests_that_wait_change_nothing(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, alone: Any
) -> None:
    page = make_llm(ONE, budget=12).engine.parts.kv.arena.page_bytes
    llm = make_llm(ONE, budget=12, gpu_memory=32 * page, host_memory=80 * page, max_num_batched_tokens=40, verify_loads=True)
    assert tokens_of(llm, prompts, greedy()) == alone()
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
    assert [job.request.output_token_ids for job in jobs] == alone()
    check_idle(llm)


@pytest.mark.parametrize("offload_layers", [0, 2])
def test_a_prompt_that_goes_on_from_an_earlier_one_finds_its_latents(
    offload_layers: int, make_llm: MakeLLM, greedy: Greedy
) -> None:
    fresh = make_llm(ONE, budget=12, offload_layers=0, enable_prefix_caching=False)
    llm = make_llm(ONE, budget=12, offload_layers=offload_layers, max_num_batched_tokens=90, verify_loads=True)
    said = text(1, 187)
    found = []
    for prompt in (said, said + text(2, 21), said[:90] + text(3, 30), said):
        job = ask(llm, prompt, greedy(12))
        assert job.request.output_token_ids == fresh.generate([prompt], greedy(12))[0].token_ids
        found.append(cached(job))
    assert found == [0, 176, 80, 176]
    check_idle(llm)


@pytest.mark.parametrize("codes", ["fp8", "int8"])
def test_latents_in_8_bits_are_refused_by_name(codes: str, make_llm: MakeLLM) -> None:
    with pytest.raises(ConfigError, match=f"kv_cache_dtype {codes} does not work with multi-head latent attention"):
        make_llm(ONE, budget=12, kv_cache_dtype=codes)


def test_ranks_are_refused_by_name(make_llm: MakeLLM) -> None:
    with pytest.raises(ConfigError, match="multi-head latent attention does not work with tensor_parallel_size"):
        make_llm(ONE, budget=12, tensor_parallel_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "speculative", "oracle"])
def test_kernels_and_streams_of_a_gpu_change_nothing(
    method: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the interpreter: rows that are out of reach come through staging, and chunks make keys and values of them, or do not."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here")
    llm = make_llm(ONE, method, budget=110, offload_layers=2, max_num_batched_tokens=24)
    llm.engine.parts.kv.transfers.run_on(SeveralStreams())
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    outputs = llm.generate([prompts[3], prompts[1][:28]], greedy(3))
    monkeypatch.delenv(dispatch.VARIABLE)
    assert outputs[0].token_ids == expected(ONE)[3][:3]
    plain = make_llm(ONE, "full", offload_layers=0)
    assert outputs[1].token_ids == plain.generate([prompts[1][:28]], greedy(3))[0].token_ids

"""Multi-head latent attention: latents are stored, chosen, loaded and moved as rows of one KV head, and tokens stay the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.errors import ConfigError, HeadError
from specontext.kernels import dispatch
from specontext.locations import shape_of
from specontext.model_shape import ModelShape
from specontext.retrieval.checkpoint import save_head
from specontext.retrieval.head import RetrievalHead
from specontext.retrieval.head_config import HeadConfig
from tests.conftest import family_config
from tests.engine.test_equality import check_idle, tokens_of
from tests.engine.test_graph_safety import SeveralStreams
from tests.engine.test_prefix import ask, cached
from tests.engine.test_windows import text

ONE = "latents"
OTHERS = ("streaming", "oracle", "random", "quest", "shadowkv", "clusterkv", "snapkv", "h2o")
EVERY_METHOD = [
    "speculative",
    *(name if name == "quest" else pytest.param(name, marks=pytest.mark.slow) for name in OTHERS),
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


@pytest.mark.slow
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


def test_chunks_make_keys_and_values_of_some_rows_at_a_time(
    make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int, int]] = []

    def seven(*sizes: int) -> int:
        asked.append(sizes)  # type: ignore[arg-type]
        return 7

    monkeypatch.setattr("specontext.engine.prefill.made_tile", seven)
    llm = make_llm(ONE, "full", offload_layers=2, max_num_batched_tokens=40)
    assert tokens_of(llm, prompts, greedy()) == expected(ONE)
    assert set(asked) == {(4, 24, 4)}


def test_all_groups_of_a_head_choose_for_the_only_kv_head(
    checkpoint: Callable[[str], Path], tmp_path: Path, prompts: Prompts, greedy: Greedy
) -> None:
    """As a draft whose layer has four KV heads is pruned."""
    folder = checkpoint(ONE)
    sizes = {"hidden_size": 64, "target_hidden_size": 64, "vocab_size": shape_of(folder).vocab_size, "head_dim": 16}
    head = RetrievalHead(HeadConfig("features", heads=8, kv_heads=4, feature_layers=(1, 2), **sizes))
    save_head(head, tmp_path)
    one_set = SpeContextConfig(budget=12, sink=2, recent=4, granularity="batch", offload_layers=2)
    llm = LLM(folder, retrieval_head=tmp_path, config=one_set, device="cpu")
    assert llm.generate(prompts[2:3], greedy(4))[0].stats["tokens_read_per_step"] == 12
    with pytest.raises(HeadError, match=r"4 groups and the model 1 KV heads, .*granularity 'batch'"):
        LLM(folder, retrieval_head=tmp_path, config=SpeContextConfig(budget=12, sink=2, recent=4), device="cpu")


@pytest.mark.parametrize("codes", ["fp8", pytest.param("int8", marks=pytest.mark.slow)])
def test_latents_in_8_bits_are_the_same_wherever_they_are(
    codes: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, expected: Expected
) -> None:
    """A row is 40 codes and a scale; tiers, chunks, company and known prompts change nothing."""
    plain = make_llm(ONE, "full", offload_layers=0, kv_cache_dtype=codes, enable_prefix_caching=False)
    assert plain.engine.parts.kv.arena.rows.shape[2] == 44 and plain.engine.parts.kv.layout.layers[0].key_bytes == 44
    assert plain.engine.parts.plan.kv.resident_token == 44
    right = [plain.generate([prompt], greedy())[0].token_ids for prompt in prompts]
    assert right != expected(ONE), "else the test says nothing"
    options = {"kv_cache_dtype": codes, "verify_loads": True, "max_num_batched_tokens": 23, "max_num_seqs": 3}
    for method in ("full", "speculative", "oracle"):
        llm = make_llm(ONE, method, budget=110, offload_layers=2, **options)
        assert tokens_of(llm, prompts, greedy()) == right
        assert tokens_of(llm, prompts, greedy()) == right, "with known prompts"


@pytest.mark.parametrize("method", ["full", "speculative"])
def test_the_host_alone_may_have_8_bits(method: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    options = {"offload_layers": -1, "enable_prefix_caching": False}
    both = make_llm(ONE, method, budget=110, kv_cache_dtype="int8", **options)
    host = make_llm(ONE, method, budget=110, host_kv_dtype="int8", verify_loads=True, max_num_batched_tokens=23, **options)
    assert host.engine.parts.kv.host.rows.shape[2] == 44 and host.engine.parts.kv.arena.rows.shape[1:] == (1, 40)
    assert tokens_of(host, prompts, greedy()) == tokens_of(both, prompts, greedy())


def test_latents_that_do_not_fill_words_are_refused_in_8_bits() -> None:
    shape = ModelShape.from_config(family_config(ONE, 900, kv_lora_rank=30))
    with pytest.raises(ConfigError, match="kv_cache_dtype int8 needs latents of a multiple of 4 numbers, not of 38"):
        shape.check_kv_format("kv_cache_dtype int8")


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize(("size", "layers"), [(2, -1), (4, 2)])
def test_ranks_have_the_latents_and_some_of_the_heads_that_are_made_of_them(
    size: int, layers: int, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, alone: Expected
) -> None:
    options = {"budget": 12, "offload_layers": layers, "methods": ("full", "streaming"), "dtype": "float32"}
    llm = make_llm(ONE, tensor_parallel_size=size, max_num_batched_tokens=40, **options)
    try:
        for method in ("speculative", "full", "streaming"):
            assert tokens_of(llm, prompts, replace(greedy(), method=method)) == alone(method)
        llm.engine.check_integrity()
    finally:
        llm.engine.close()


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.slow
def test_a_method_that_would_see_some_heads_of_a_latent_is_refused(make_llm: MakeLLM) -> None:
    with pytest.raises(ConfigError, match=r"method quest chooses by all query heads .* tensor_parallel_size 2 for 1 KV heads"):
        make_llm(ONE, "quest", budget=12, tensor_parallel_size=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "codes"),
    [*((method, "auto") for method in ("full", "speculative", "oracle")), ("speculative", "int8"), ("full", "fp8")],
)
def test_kernels_and_streams_of_a_gpu_change_nothing(
    method: str,
    codes: str,
    make_llm: MakeLLM,
    prompts: Prompts,
    greedy: Greedy,
    expected: Expected,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the interpreter: rows that are out of reach come through staging, and chunks make keys and values of them, or do not."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here")
    llm = make_llm(ONE, method, budget=110, offload_layers=2, max_num_batched_tokens=24, kv_cache_dtype=codes)
    plain = make_llm(ONE, "full", offload_layers=0, kv_cache_dtype=codes, enable_prefix_caching=False)
    asked = [prompts[3], prompts[1][:28]]
    right = [plain.generate([prompt], greedy(3))[0].token_ids for prompt in asked]
    llm.engine.parts.kv.transfers.run_on(SeveralStreams())
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    outputs = llm.generate(asked, greedy(3))
    monkeypatch.delenv(dispatch.VARIABLE)
    assert [output.token_ids for output in outputs] == right
    assert codes != "auto" or right[0] == expected(ONE)[3][:3]

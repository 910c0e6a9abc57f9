"""Several processes share a model: its answers are those of one, and one that is lost takes the engine with it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Glm4Config,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from specontext import LLM, ConfigError, SamplingParams
from specontext.config import EngineConfig, SpeContextConfig
from specontext.core import RequestOutput
from specontext.engine import rank_processes
from specontext.errors import RankError, RequestFailedError
from specontext.memory.sharing import Share
from specontext.model_shape import ModelShape
from specontext.sampling_params import StructuredOutputsParams
from tests.conftest import write_checkpoint
from tests.forked import RANKS

SHARED: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 128,
}
IN_LAYER = ("quest", "shadowkv", "clusterkv", "snapkv", "h2o", "oracle")
METHODS = ("full", "streaming", "random", *IN_LAYER)
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
LONG = replace(GREEDY, max_tokens=80)
KV_OF_A_TOKEN = 4 * 2 * 2 * 32 * 4  # bytes in nano, which has 4 layers with 2 KV heads


def prompts() -> list[list[int]]:
    """Of several chunks, with a common beginning, and short ones."""
    common = [17 + (7 * i) % 400 for i in range(200)]
    return [[*common, 30, 31, 32], [*common, 90, 91], [600 - i for i in range(90)], [11, 12, 13]]


def mixed() -> list[SamplingParams]:
    """Ways in which requests differ: method, budget, sampling, a grammar, log-probabilities."""
    grammar = StructuredOutputsParams(choice=["yes and no", "no and yes"])
    return [
        SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, method="streaming"),
        SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, budget=40),
        SamplingParams(temperature=1.0, top_p=0.9, max_tokens=24, ignore_eos=True, logprobs=2),
        SamplingParams(temperature=0, max_tokens=24, structured_outputs=grammar),
    ]


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


@pytest.fixture(scope="module")
def one() -> LLM:
    return LLM("nano", config=SpeContextConfig(budget=64), methods=METHODS, **SHARED)


@pytest.fixture(scope="module")
def two() -> Iterator[LLM]:
    """Two ranks with so little memory each that layers move, and requests wait for others."""
    memory = {"gpu_memory": 350 * KV_OF_A_TOKEN // 2, "host_memory": 560 * KV_OF_A_TOKEN}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_processes, "subprocess", RANKS)
        llm = LLM("nano", config=SpeContextConfig(budget=64), methods=METHODS, tensor_parallel_size=2, **memory, **SHARED)
    yield llm
    llm.engine.close()


@pytest.mark.slow
def test_tokens_are_those_of_one_process_while_layers_move_and_requests_wait(one: LLM, two: LLM) -> None:
    expected, found = one.generate(prompts(), LONG), two.generate(prompts(), LONG)
    assert tokens(found) == tokens(expected)
    assert any(output.stats["moves"] for output in found) and two.engine.scheduler.preemptions
    two.engine.check_integrity()  # on all ranks


def test_requests_that_differ(one: LLM, two: LLM) -> None:
    expected, found = one.generate(prompts(), mixed()), two.generate(prompts(), mixed())
    assert tokens(found) == tokens(expected)
    assert found[3].text in ("yes and no", "no and yes") and found[2].outputs[0].logprobs is not None


@pytest.mark.slow
def test_methods_that_choose_by_the_heads_of_a_rank(one: LLM, two: LLM) -> None:
    params = [replace(GREEDY, max_tokens=16, method=name, budget=40) for name in ("random", *IN_LAYER)]
    prompt = [prompts()[0]] * len(params)
    assert tokens(two.generate(prompt, params)) == tokens(one.generate(prompt, params))
    two.engine.check_integrity()


def test_log_probabilities_of_a_split_output_layer(one: LLM, two: LLM) -> None:
    """1,839 tokens, of which one rank has one more than the other."""
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=8, logprobs=3, prompt_logprobs=2)
    [expected], [found] = (llm.generate(prompts()[1], params) for llm in (one, two))
    assert found.token_ids == expected.token_ids and one.engine.loaded.shape.vocab_size % 2
    for mine, theirs in zip(found.prompt_logprobs or (), expected.prompt_logprobs or (), strict=True):
        assert (mine is None) == (theirs is None) and list(mine or ()) == list(theirs or ())
        assert list((mine or {}).values()) == pytest.approx(list((theirs or {}).values()), abs=1e-3)


def test_what_breaks_at_rank_0_alone_ends_there_and_elsewhere(two: LLM) -> None:
    def broken(_: torch.Tensor) -> None:
        raise ValueError("nobody else sees these")

    seen: list[torch.Tensor] = []
    engine, forced = two.engine, [70, 71, 72]
    engine.add_request("broken", [5] * 30, GREEDY, on_logits=broken)
    led = engine.add_request("led", [5] * 30, replace(GREEDY, max_tokens=6), forced=forced, on_logits=seen.append)
    with pytest.raises(RequestFailedError, match="nobody else sees these"):
        while engine.has_work:
            engine.step()
    while engine.has_work:
        engine.step()
    assert led.request.output_token_ids[:3] == forced and len(led.request.output_token_ids) == len(seen) == 6
    engine.check_integrity()


@pytest.mark.slow
def test_what_is_dropped_is_dropped_everywhere(two: LLM) -> None:
    stream = two.stream([5] * 60, GREEDY)
    for _ in range(3):
        next(stream)
    stream.close()
    two.engine.reset_prefix_cache()
    first = two.generate([5] * 60, GREEDY)[0]
    assert not first.stats["cached_tokens"]
    with pytest.raises(ConfigError, match="make a new LLM"):
        two.reconfigure(SpeContextConfig(method="full"))
    again = two.generate([5] * 60, GREEDY)[0]
    assert again.token_ids == first.token_ids and again.stats["cached_tokens"] == 48
    two.engine.check_integrity()


def test_a_lost_rank_ends_the_engine_and_what_runs() -> None:
    llm = LLM("nano", config=SpeContextConfig(budget=64), tensor_parallel_size=2, **SHARED)
    stream = llm.stream([5] * 60, GREEDY)
    next(stream)
    os.kill(llm.engine._processes.pids[0], signal.SIGKILL)  # type: ignore[attr-defined]
    with pytest.raises(RankError, match=r"rank 1 of 2 is lost .*code -9"):
        for _ in stream:
            pass
    with pytest.raises(RankError, match="start the engine again"):
        llm.generate([5, 6], GREEDY)
    llm.engine.close()


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
def test_a_rank_that_hangs_is_lost_too(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM("nano", config=SpeContextConfig(method="full"), tensor_parallel_size=2, **SHARED)
    stream = llm.stream([5] * 60, GREEDY)
    next(stream)
    monkeypatch.setattr(llm.engine._processes, "patience", 1.0)  # type: ignore[attr-defined]
    os.kill(llm.engine._processes.pids[0], signal.SIGSTOP)  # type: ignore[attr-defined]
    with pytest.raises(RankError, match="a rank hangs: all have been at one step for more than 1 s"):
        for _ in stream:
            pass
    llm.engine.close()


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize(
    ("size", "options"), [(2, {"offload_layers": -1}), (4, {}), (4, {"offload_layers": 2, "granularity": "union"})]
)
def test_tokens_of_more_ranks(size: int, options: dict[str, Any]) -> None:
    config = SpeContextConfig(budget=64, **options)
    one, llm = (LLM("nano", config=config, tensor_parallel_size=number, methods=("full",), **SHARED) for number in (1, size))
    try:
        for method in ("speculative", "full"):
            sampling = replace(GREEDY, method=method)
            assert tokens(llm.generate(prompts(), sampling)) == tokens(one.generate(prompts(), sampling))
        llm.engine.check_integrity()
    finally:
        llm.engine.close()


def slow(*arguments: object) -> Any:
    return pytest.param(*arguments, marks=pytest.mark.slow)


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize(
    "family, size",
    [
        ("windows", 2),
        *(slow("chunks", 2), slow("llama", 4), slow("qwen2", 4), slow("qwen3", 2), slow("mistral", 2), slow("bands", 3)),
        *(slow("sinks", 4), slow("shared", 2)),
    ],
)
def test_heads_and_head_maps_of_other_models(make_llm: Callable[..., LLM], family: str, size: int) -> None:
    """Windows, experts with a shared one, sinks, more ranks than KV heads, head maps that cross ranks, a head without features,
    bands of layers, layers that read the KV of others."""
    methods = ("full", "quest") if size == 2 and family in ("chunks", "windows", "shared") else ("full",)
    options = {"budget": 12, "offload_layers": 2, "dtype": "float32", "max_model_len": 256, "methods": methods}
    prompt = [[*range(4, 90)], [*range(200, 220)]]
    params = [replace(GREEDY, max_tokens=24, method=name) for name in ("speculative", *methods)]
    one, llm = make_llm(family, **options), make_llm(family, tensor_parallel_size=size, **options)
    try:
        for sampling in params:
            assert tokens(llm.generate(prompt, sampling)) == tokens(one.generate(prompt, sampling))
        llm.engine.check_integrity()
    finally:
        llm.engine.close()


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize(("size", "kv"), [(2, "int8"), (4, "auto")])
def test_a_model_with_biases_and_norms_of_heads(write_family: Callable[..., Path], size: int, kv: str) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    model = write_family("qwen3", **heads, attention_bias=True)
    options = SHARED | {"kv_cache_dtype": kv, "max_model_len": 256}
    config = SpeContextConfig(method="full", offload_layers=1)
    expected = LLM(model, config=config, **options).generate([[*range(1, 90)]], GREEDY)
    llm = LLM(model, config=config, tensor_parallel_size=size, **options)
    try:
        assert tokens(llm.generate([[*range(1, 90)]], GREEDY)) == tokens(expected)
    finally:
        llm.engine.close()


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("kind", [MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig, Glm4Config])
def test_experts_and_fused_projections(kind: type[PreTrainedConfig], tmp_path: Path, tokenizer: Any) -> None:
    """Experts of which each rank has some columns, with shared ones, beside layers without; gate and up in one matrix, and one
    table for embeddings and output."""
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 64}
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [1],
    }
    sizes |= {"intermediate_size": 96, "vocab_size": len(tokenizer) + 1, "max_position_embeddings": 512, "pad_token_id": 1}
    model = write_checkpoint(tmp_path, kind(**sizes, **experts, tie_word_embeddings=kind is Glm4Config), None, tokenizer)
    options = SHARED | {"max_model_len": 256, "config": SpeContextConfig(method="full", offload_layers=1)}
    expected = LLM(model, **options).generate([[*range(1, 90)]], GREEDY)
    llm = LLM(model, tensor_parallel_size=2, **options)
    try:
        assert tokens(llm.generate([[*range(1, 90)]], GREEDY)) == tokens(expected)
    finally:
        llm.engine.close()


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
def test_a_method_that_would_see_some_query_heads_of_a_kv_head_is_refused(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"method quest chooses by all query heads .* tensor_parallel_size 2 for 1 KV heads"):
        LLM(checkpoint("mistral"), methods=("quest",), tensor_parallel_size=2, **SHARED | {"max_model_len": 256})


@pytest.mark.parametrize(
    "size, rank, query, kv, own", [(2, 1, 16, 4, slice(2, 4)), (4, 3, 4, 1, slice(3, 4)), (8, 5, 2, 1, slice(2, 3))]
)
def test_heads_of_a_rank(size: int, rank: int, query: int, kv: int, own: slice) -> None:
    shape = ModelShape(2, 64, 16 if size == 8 else query * size, 4, 16, 256, 512, torch.float32)
    share = Share(rank, size)
    part = share.shape(shape)
    assert (part.query_heads, part.kv_heads, share.kv_heads(shape)) == (shape.query_heads // size, kv if size != 2 else 2, own)
    with pytest.raises(ConfigError, match="tensor_parallel_size 3 does not fit"):
        Share(0, 3).check(shape)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"measure_recall": True}, "measure_recall"),
        ({"max_wait_s": 1.0}, "max_wait_s"),
        ({"offload_dir": Path("/tmp")}, "offload_dir"),
        ({"method": SpeContextConfig(granularity="union"), "methods": ("oracle",)}, "method oracle"),
        ({"methods": ("shared-oracle",)}, "method shared-oracle"),
        ({"device": "cuda:1"}, "cuda:1"),
    ],
)
def test_what_does_not_work_with_it(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"{named} .*tensor_parallel_size"):
        EngineConfig("nano", tensor_parallel_size=2, **options)


def test_heads_that_do_not_divide_are_refused_before_anything_is_started() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size 3 does not fit a model of 4 query heads and 2 KV heads"):
        LLM("nano", tensor_parallel_size=3, **SHARED)

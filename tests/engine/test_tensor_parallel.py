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
from transformers import AutoModelForCausalLM, MixtralConfig, Phi3Config, PreTrainedConfig

from specontext import LLM, ConfigError, SamplingParams
from specontext.config import EngineConfig, SpeContextConfig
from specontext.core import ModelShape, RequestOutput, StructuredOutputsParams, Window
from specontext.errors import ModelError, RankError, RequestFailedError
from specontext.memory.sharing import Share
from specontext.models.sharding import check_can_share

SHARED: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 128,
}
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
    return LLM("nano", config=SpeContextConfig(budget=64), **SHARED)


@pytest.fixture(scope="module")
def two() -> Iterator[LLM]:
    """Two ranks with so little memory each that layers move, and requests wait for others."""
    memory = {"gpu_memory": 350 * KV_OF_A_TOKEN // 2, "host_memory": 560 * KV_OF_A_TOKEN}
    llm = LLM("nano", config=SpeContextConfig(budget=64), tensor_parallel_size=2, **memory, **SHARED)
    yield llm
    llm.engine.close()


def test_tokens_are_those_of_one_process_while_layers_move_and_requests_wait(one: LLM, two: LLM) -> None:
    expected, found = one.generate(prompts(), LONG), two.generate(prompts(), LONG)
    assert tokens(found) == tokens(expected)
    assert any(output.stats["moves"] for output in found) and two.engine.scheduler.preemptions
    two.engine.check_integrity()  # on all ranks


def test_requests_that_differ(one: LLM, two: LLM) -> None:
    expected, found = one.generate(prompts(), mixed()), two.generate(prompts(), mixed())
    assert tokens(found) == tokens(expected)
    assert found[3].text in ("yes and no", "no and yes") and found[2].outputs[0].logprobs is not None


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
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "full"},
        {"method": "full", "offload_layers": -1},
        {},
        {"offload_layers": -1},
        {"offload_layers": 2, "granularity": "union"},
    ],
)
def test_tokens_of_more_ranks(size: int, options: dict[str, Any]) -> None:
    config = SpeContextConfig(budget=64, **options)
    expected = LLM("nano", config=config, **SHARED).generate(prompts(), GREEDY)
    llm = LLM("nano", config=config, tensor_parallel_size=size, **SHARED)
    try:
        assert tokens(llm.generate(prompts(), GREEDY)) == tokens(expected)
        llm.engine.check_integrity()
    finally:
        llm.engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("family, size", [("llama", 4), ("qwen2", 4), ("qwen3", 2), ("mistral", 2), ("bands", 3)])
def test_heads_and_head_maps_of_other_models(make_llm: Callable[..., LLM], family: str, size: int) -> None:
    """More ranks than KV heads, head maps that cross ranks, a head without features, bands of layers."""
    options = {"budget": 12, "offload_layers": 2, "dtype": "float32", "max_model_len": 256}
    prompt = [[*range(4, 90)], [*range(200, 220)]]
    expected = make_llm(family, **options).generate(prompt, GREEDY)
    llm = make_llm(family, tensor_parallel_size=size, **options)
    try:
        assert tokens(llm.generate(prompt, GREEDY)) == tokens(expected)
        llm.engine.check_integrity()
    finally:
        llm.engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_a_model_with_biases_and_norms_of_heads(write_family: Callable[..., Path], kv: str) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    model = write_family("qwen3", **heads, attention_bias=True)
    options = SHARED | {"kv_cache_dtype": kv, "max_model_len": 256}
    config = SpeContextConfig(method="full", offload_layers=1)
    expected = LLM(model, config=config, **options).generate([[*range(1, 90)]], GREEDY)
    for size in (2, 4):
        llm = LLM(model, config=config, tensor_parallel_size=size, **options)
        try:
            assert tokens(llm.generate([[*range(1, 90)]], GREEDY)) == tokens(expected)
        finally:
            llm.engine.close()


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
    with pytest.raises(ConfigError, match="a window do not work with tensor_parallel_size"):
        Share(0, 2).check(replace(shape, layers=1, windows=(Window(8), None)))


@pytest.mark.parametrize(
    "options, named",
    [
        ({"quantization": "int4"}, "quantization"),
        ({"measure_recall": True}, "measure_recall"),
        ({"max_wait_s": 1.0}, "max_wait_s"),
        ({"offload_dir": Path("/tmp")}, "offload_dir"),
        ({"method": SpeContextConfig(method="quest")}, "method quest"),
        ({"methods": ("h2o",)}, "method h2o"),
        ({"device": "cuda:1"}, "cuda:1"),
    ],
)
def test_what_does_not_work_with_it(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"{named} .*tensor_parallel_size"):
        EngineConfig("nano", tensor_parallel_size=2, **options)


@pytest.mark.parametrize("config, named", [(Phi3Config, "no q_proj"), (MixtralConfig, "mlp.gate")])
def test_layers_that_nothing_says_how_to_split(config: type[PreTrainedConfig], named: str) -> None:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "vocab_size": 64}
    tiny = config(**sizes, intermediate_size=64, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(tiny)
    with pytest.raises(ModelError, match=f"cannot be shared among ranks: .*{named}.*leave tensor_parallel_size out"):
        check_can_share(model, ModelShape.from_config(tiny), Share(0, 2))


def test_heads_that_do_not_divide_are_refused_before_anything_is_started() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size 3 does not fit a model of 4 query heads and 2 KV heads"):
        LLM("nano", tensor_parallel_size=3, **SHARED)

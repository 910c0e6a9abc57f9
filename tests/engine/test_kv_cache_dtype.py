"""KV in 8 bits: tokens depend on the format, and on nothing else that they must not depend on.

A float32 sum that is rounded otherwise, because a step has other tokens, may turn a code into its neighbour; where steps differ
results are therefore compared nearly, and where rows only move to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from specontext import LLM, SamplingParams
from specontext.config import EngineConfig
from specontext.errors import ConfigError, LoadError

MakeLLM = Callable[..., LLM]
Greedy = Callable[..., SamplingParams]
Prompts = list[list[int]]
KINDS = ("fp8", "int8")
HEADS, DIM, LAYERS = 2, 24, 3  # of the Llama checkpoint
ROW = 2 * DIM + 4
PAGE = 16 * HEADS * ROW


@pytest.fixture(scope="module")
def resident(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> Callable[..., Prompts]:
    """Tokens of all prompts together, with everything on the device."""
    known: dict[tuple[Any, ...], Prompts] = {}

    def tokens(kind: str, method: str = "speculative", family: str = "llama") -> Prompts:
        key = (kind, method, family)
        if key not in known:
            llm = make_llm(family, method, budget=12, offload_layers=0, kv_cache_dtype=kind)
            known[key] = [output.token_ids for output in llm.generate(prompts, greedy())]
        return known[key]

    return tokens


def check_idle(llm: LLM) -> None:
    parts = llm.engine.parts
    llm.engine.check_integrity()
    assert not llm.engine.has_work and parts.kv.arena.pages.num_held == parts.kv.host.pages.num_held == 0


def agreement(some: Prompts, others: Prompts) -> float:
    """Share of the tokens before the first that differs."""
    same = 0
    for a, b in zip(some, others, strict=True):
        same += next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return same / sum(map(len, others))


def logprobs_of(llm: LLM, prompt: list[int], params: SamplingParams) -> torch.Tensor:
    (output,) = llm.generate([prompt], params)
    known = output.prompt_logprobs
    assert known is not None
    return torch.tensor([of_one[token] for of_one, token in zip(known[1:], prompt[1:], strict=True)])


# To the bit ------------------------------------------------------------------------------------------------------------


def test_formats_change_tokens(resident: Any) -> None:
    """Else the tests below would say nothing."""
    assert resident("fp8") != resident("auto") != resident("int8") != resident("fp8")


@pytest.mark.parametrize(
    ("method", "offload_layers", "slots", "kind"),
    [
        (method, *tiers, KINDS[(i + j) % 2])
        for i, method in enumerate(("full", "speculative", "oracle", "quest", "snapkv"))
        for j, tiers in enumerate(((2, None), (-1, 14)))
    ],
)
def test_tiers_and_slots_change_nothing(
    offload_layers: int,
    slots: int | None,
    method: str,
    kind: str,
    make_llm: MakeLLM,
    prompts: Prompts,
    greedy: Greedy,
    resident: Any,
) -> None:
    options = {"offload_layers": offload_layers, "slots": slots, "verify_loads": True}
    llm = make_llm("llama", method, budget=12, kv_cache_dtype=kind, **options)
    assert [output.token_ids for output in llm.generate(prompts, greedy())] == resident(kind, method)
    check_idle(llm)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("page_size", [2, 7, 64])
def test_page_sizes_and_bands_change_nothing(
    page_size: int, kind: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, resident: Any
) -> None:
    options = {"budget": 12, "offload_layers": 2, "page_size": page_size, "slots": 14, "verify_loads": True}
    llm = make_llm("bands", kv_cache_dtype=kind, **options)
    assert [output.token_ids for output in llm.generate(prompts, greedy())] == resident(kind, family="bands")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["full", "speculative"])
def test_layers_that_move_change_nothing(
    method: str, kind: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, resident: Any
) -> None:
    options = {"gpu_memory": 52 * PAGE, "host_memory": 60 * LAYERS * PAGE, "max_model_len": 112}
    llm = make_llm("llama", method, budget=12, methods=[], kv_cache_dtype=kind, **options)
    jobs = [llm.engine.add_request(f"r{i}", prompt, greedy()) for i, prompt in enumerate(prompts)]
    while llm.engine.has_work:
        llm.engine.step()
        llm.engine.check_integrity()
    assert agreement([job.request.output_token_ids for job in jobs], resident(kind, method)) > 0.8
    moves = [move for job in jobs if job.stats is not None for move in job.stats.moves]
    assert moves and all(move.bytes % (HEADS * ROW) == 0 for move in moves), "moves are counted in rows of 8 bits"
    check_idle(llm)


def test_a_wrong_load_is_noticed(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specontext.kv.transfers.copy_pieces", lambda *_, **__: None)
    llm = make_llm("llama", budget=12, offload_layers=2, verify_loads=True, kv_cache_dtype="fp8")
    with pytest.raises(LoadError):
        llm.generate(prompts, greedy())


# Nearly ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_read_new_tokens_as_they_are_stored(
    kind: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logprobs(chunk: int) -> torch.Tensor:
        llm = make_llm("llama", "full", offload_layers=2, max_num_batched_tokens=chunk, kv_cache_dtype=kind)
        return logprobs_of(llm, prompts[2], greedy(1, prompt_logprobs=0))

    whole = logprobs(1024)
    assert (logprobs(7) - whole).abs().mean() < 0.01
    monkeypatch.setattr("specontext.kv.transfers.as_stored", lambda key, value, _: (key, value))
    assert (logprobs(7) - whole).abs().mean() > 0.01, "else this test would say nothing"


@pytest.mark.parametrize("kind", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_requests_that_wait_go_on_where_they_were(kind: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    options = {"budget": 12, "offload_layers": 0, "kv_cache_dtype": kind}
    llm = make_llm("llama", "full", gpu_memory=56 * PAGE, host_memory=200 * PAGE, **options)
    two, params = [prompts[1], prompts[3]], [greedy(150), greedy(140)]
    jobs = [llm.engine.add_request(f"r{i}", *ask) for i, ask in enumerate(zip(two, params, strict=True))]
    while llm.engine.has_work:
        llm.engine.step()
        llm.engine.check_integrity()
    roomy = make_llm("llama", "full", **options)
    expected = [roomy.generate([prompt], ask)[0].token_ids for prompt, ask in zip(two, params, strict=True)]
    assert agreement([job.request.output_token_ids for job in jobs], expected) > 0.5
    assert sum(job.request.preemptions for job in jobs) > 0
    check_idle(llm)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "bands"])
def test_known_prompts(kind: str, family: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    """The head's keys and features lie among rows of bytes, and come back as they were."""
    asked = [prompts[2], prompts[2] + prompts[1], prompts[2][:64] + prompts[3]]
    options = {"budget": 12, "max_num_batched_tokens": 50, "kv_cache_dtype": kind}
    forgetful = make_llm(family, offload_layers=0, enable_prefix_caching=False, **options)
    expected = [forgetful.generate([prompt], greedy(12))[0].token_ids for prompt in asked]
    for offload_layers in (0, 2):
        llm = make_llm(family, offload_layers=offload_layers, verify_loads=True, **options)
        outputs = [llm.generate([prompt], greedy(12))[0] for prompt in asked]
        assert agreement([output.token_ids for output in outputs], expected) > 0.6
        assert [output.stats["cached_tokens"] for output in outputs] == [0, 80, 64]
        check_idle(llm)


def test_known_prompts_without_a_head(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    """Nothing is kept beside KV, whose rows of bytes no wide word divides."""
    llm = make_llm("llama", "full", retrieval_head=None, kv_cache_dtype="int8")
    first, second = (llm.generate([prompts[2]], greedy(8))[0] for _ in range(2))
    assert second.stats["cached_tokens"] == 80
    assert agreement([second.token_ids], [first.token_ids]) > 0.6


def test_models_in_16_bits(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    for dtype in ("bfloat16", "float16"):
        found = {}
        for kind in ("auto", *KINDS):
            llm = make_llm("llama", "full", offload_layers=2, dtype=dtype, kv_cache_dtype=kind, max_num_batched_tokens=32)
            found[kind] = logprobs_of(llm, prompts[2], greedy(1, prompt_logprobs=0))
            assert llm.engine.parts.kv.arena.rows.itemsize == (2 if kind == "auto" else 1)
        far = {kind: float((found[kind] - found["auto"]).abs().mean()) for kind in KINDS}
        assert 0 < far["int8"] < far["fp8"] < 0.4, "random weights are sensitive"


# Accounts and words ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_codes_and_scales(kind: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    llm = make_llm("llama", "full", offload_layers=-1, max_model_len=112, kv_cache_dtype=kind)
    parts = llm.engine.parts
    assert parts.kv.layout.layers[0].row_bytes == ROW and parts.plan.kv.resident_token == HEADS * ROW
    assert parts.kv.arena.page_bytes == PAGE and parts.kv.arena.rows.itemsize == 1
    assert parts.kv.arena.num_bytes == parts.kv.arena.rows.nbytes == parts.sizes.device_bytes
    (output,) = llm.generate([prompts[1]], greedy(2))
    token = LAYERS * HEADS * ROW
    assert output.stats["bytes_full_per_step"] == output.stats["bytes_loaded_per_step"] == (len(prompts[1]) + 1) * token


def test_formats_that_do_not_exist() -> None:
    with pytest.raises(ConfigError, match="unknown kv_cache_dtype 'fp4': choose one of auto, fp8, int8"):
        EngineConfig("anything", kv_cache_dtype="fp4")

"""A host tier in 8 bits beside a device that is not: layers that live there are read as their codes say, wherever their rows are.

In float32 a slot holds exactly what codes mean. So with all layers on the host nothing but rounding tells it from KV that is in
8 bits in both tiers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.config import EngineConfig
from specontext.errors import ConfigError, LoadError

MakeLLM = Callable[..., LLM]
Greedy = Callable[..., SamplingParams]
Prompts = list[list[int]]
KINDS = ("fp8", "int8")
HEADS, DIM, LAYERS = 2, 24, 3  # of the Llama checkpoint
ROW = 2 * DIM + 4
PAGE, HOST_PAGE = 16 * HEADS * 2 * DIM * 4, 16 * HEADS * ROW


def tokens_of(llm: LLM, prompts: Prompts, params: SamplingParams) -> Prompts:
    found = [output.token_ids for output in llm.generate(prompts, params)]
    llm.engine.check_integrity()
    assert not llm.engine.has_work and llm.engine.parts.kv.host.pages.num_held == 0
    return found


def agreement(some: Prompts, others: Prompts) -> float:
    """Share of the tokens before the first that differs."""
    pairs = list(zip(some, others, strict=True))
    same = sum(next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a)) for a, b in pairs)
    return same / sum(map(len, others))


@pytest.mark.parametrize(
    ("family", "method", "kind"),
    [
        ("llama", "full", "fp8"),
        ("llama", "speculative", "fp8"),
        ("llama", "speculative", "int8"),
        ("bands", "speculative", "int8"),
        ("windows", "speculative", "fp8"),
        ("shared", "speculative", "int8"),
        ("llama", "oracle", "fp8"),
        *(
            pytest.param("llama", method, kind, marks=pytest.mark.slow)
            for method, kind in (("quest", "int8"), ("snapkv", "fp8"), ("streaming", "int8"))
        ),
    ],
)
def test_with_all_layers_there_it_reads_what_8_bits_in_both_tiers_do(
    family: str, method: str, kind: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy
) -> None:
    options = {"budget": 12, "offload_layers": -1, "slots": 14, "verify_loads": True}
    expected = tokens_of(make_llm(family, method, kv_cache_dtype=kind, **options), prompts, greedy())
    assert tokens_of(make_llm(family, method, host_kv_dtype=kind, **options), prompts, greedy()) == expected
    assert tokens_of(make_llm(family, method, **options), prompts, greedy()) != expected, "else this would say nothing"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [{"page_size": 7}, {"slots": 40}, {"page_size": 2, "verify_loads": True}], ids=str)
def test_slots_and_page_sizes_change_nothing(
    change: dict[str, Any], kind: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy
) -> None:
    options = {"budget": 12, "offload_layers": 2, "enable_prefix_caching": False, "host_kv_dtype": kind}
    expected = tokens_of(make_llm("llama", **options), prompts, greedy())
    assert tokens_of(make_llm("llama", **options, **change), prompts, greedy()) == expected


def test_layers_on_the_device_keep_their_numbers(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    """The fewer layers are on the host the nearer it is to KV that is nowhere in 8 bits."""

    def logprobs(**options: Any) -> list[float]:
        llm = make_llm("llama", "full", enable_prefix_caching=False, max_num_batched_tokens=20, **options)
        (output,) = llm.generate([prompts[2]], greedy(1, prompt_logprobs=0))
        assert output.prompt_logprobs is not None
        return [of_one[token] for of_one, token in zip(output.prompt_logprobs[1:], prompts[2][1:], strict=True)]  # type: ignore[index]

    plain = logprobs(offload_layers=0)
    far = [
        sum(abs(a - b) for a, b in zip(logprobs(offload_layers=layers, host_kv_dtype="fp8"), plain, strict=True))
        for layers in (1, 3)
    ]
    assert 0 < far[0] < far[1]


@pytest.mark.parametrize("kind", KINDS)
def test_known_prompts_come_back_as_they_were(kind: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    asked = [prompts[2], prompts[2] + prompts[1], prompts[2][:64] + prompts[3]]
    options = {"budget": 12, "max_num_batched_tokens": 50, "host_kv_dtype": kind, "offload_layers": -1, "verify_loads": True}
    forgetful = make_llm("bands", enable_prefix_caching=False, **options)
    expected = [forgetful.generate([prompt], greedy(12))[0].token_ids for prompt in asked]
    llm = make_llm("bands", **options)
    outputs = [llm.generate([prompt], greedy(12))[0] for prompt in asked]
    assert agreement([output.token_ids for output in outputs], expected) > 0.6
    assert [output.stats["cached_tokens"] for output in outputs] == [0, 80, 64]


@pytest.mark.parametrize(("method", "offload_layers"), [("full", -1), ("speculative", -1), ("full", 2)])
def test_requests_that_wait(method: str, offload_layers: int, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    """With all layers there their rows wait as they are; rows of others would come back in 8 bits, and are computed again."""
    options = {"offload_layers": offload_layers, "host_kv_dtype": "int8", "enable_prefix_caching": False, "budget": 12}
    llm = make_llm("llama", method, verify_loads=True, **options)
    expected = tokens_of(llm, prompts, greedy())
    jobs = [llm.engine.add_request(f"r{i}", prompt, greedy()) for i, prompt in enumerate(prompts)]
    for step in range(200):
        if step == 12:
            llm.engine.scheduler.admission.preempt(but=None)
            assert len(llm.engine.parts.kv.parked) == (1 if offload_layers < 0 else 0)
        llm.engine.step()
        llm.engine.check_integrity()
    assert not llm.engine.has_work and sum(job.request.preemptions for job in jobs) == 1
    assert agreement([job.request.output_token_ids for job in jobs], expected) > 0.6


def test_a_wrong_load_is_noticed(make_llm: MakeLLM, prompts: Prompts, greedy: Greedy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specontext.kv.transfers.copy_pieces", lambda *_, **__: None)
    llm = make_llm("llama", budget=12, offload_layers=-1, verify_loads=True, host_kv_dtype="fp8")
    with pytest.raises(LoadError):
        llm.generate(prompts, greedy())


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_both_tiers(kind: str, make_llm: MakeLLM, prompts: Prompts, greedy: Greedy) -> None:
    llm = make_llm("llama", "full", offload_layers=-1, max_model_len=112, host_kv_dtype=kind)
    parts = llm.engine.parts
    assert parts.kv.arena.page_bytes == PAGE and parts.plan.kv.resident_token == PAGE // 16
    assert parts.kv.host.page_bytes == parts.plan.kv.host_page == HOST_PAGE * parts.kv.layout.layer_blocks.places
    assert parts.kv.host.num_bytes == parts.kv.host.rows.nbytes == parts.sizes.host_bytes
    (output,) = llm.generate([prompts[1]], greedy(2))
    tokens = (len(prompts[1]) + 1) * LAYERS * HEADS
    assert output.stats["bytes_loaded_per_step"] == tokens * ROW
    assert output.stats["bytes_full_per_step"] == tokens * 2 * DIM * 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"host_kv_dtype": "fp4"}, "unknown host_kv_dtype 'fp4': choose one of auto, fp8, int8"),
        ({"host_kv_dtype": "int8", "kv_cache_dtype": "fp8", "offload_layers": -1}, "two kinds of 8 bits: leave one of them out"),
        ({"host_kv_dtype": "int8"}, r"a layer that moves .* set offload_layers \(-1 for all\), or kv_cache_dtype instead"),
        ({"host_kv_dtype": "int8", "offload_layers": 0}, "does nothing with offload_layers 0"),
    ],
)
def test_what_would_depend_on_moves_is_refused(options: dict[str, Any], words: str) -> None:
    layers = options.pop("offload_layers", None)
    with pytest.raises(ConfigError, match=words):
        EngineConfig("anything", method=SpeContextConfig(offload_layers=layers), **options)


def test_known_prompts_are_refused_where_layers_on_the_device_would_read_them(make_llm: MakeLLM) -> None:
    with pytest.raises(ConfigError, match="the 1 layers on the device known prompts in 8 bits: set offload_layers to -1"):
        make_llm("llama", offload_layers=2, host_kv_dtype="int8")
    make_llm("llama", offload_layers=3, host_kv_dtype="int8")


def test_the_same_8_bits_twice_are_those_of_both_tiers(make_llm: MakeLLM) -> None:
    llm = make_llm("llama", host_kv_dtype="int8", kv_cache_dtype="int8")
    assert llm.engine.parts.kv.arena.rows.dtype == llm.engine.parts.kv.host.rows.dtype
    assert not llm.engine.parts.kv.transfers.converts

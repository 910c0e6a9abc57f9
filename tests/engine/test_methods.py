"""Requests that choose their own method and budget: mixed in one batch, and within what the engine allows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from specontext import LLM, SamplingParams
from specontext.errors import ConfigError, RequestError
from specontext.retrieval import registry
from specontext.retrieval.methods import speculative
from specontext.retrieval.registry import CHOICES

MakeLLM = Callable[..., LLM]
Greedy = Callable[..., SamplingParams]
WAYS: list[dict[str, Any]] = [
    {},
    {"method": "full"},
    {"method": "streaming", "budget": 9},
    {"budget": 10},
    {"method": "oracle", "budget": 12},
    {"method": "random"},
    {"method": "speculative-union", "budget": 11},
    {"method": "speculative-identity"},
    {"method": "full"},
    {"method": "speculative"},
    {"method": "quest"},
    {"method": "quest", "budget": 9},
    {"method": "shadowkv"},
    {"method": "clusterkv", "budget": 11},
    {"method": "snapkv"},
    {"method": "h2o"},
    {"method": "shared-oracle"},
    {"method": "shared-oracle-bands3", "budget": 11},
    {"method": "shared-oracle", "budget": 9},
]


# The head of this family has other groups than the model has KV heads, and a calibrated map.
WITHOUT_IDENTITY = [way for way in WAYS if way.get("method") != "speculative-identity"]
POSSIBLE = tuple(name for name in CHOICES if name != "shared-oracle-bands5")  # of three layers
WITHOUT_PROMPT = tuple(name for name in POSSIBLE if not name.endswith("-prompt"))
WITHOUT_BOTH = tuple(name for name in WITHOUT_PROMPT if name != "speculative-identity")
ALLOWED = {"llama": WITHOUT_PROMPT, "qwen3": WITHOUT_BOTH, "bands": WITHOUT_BOTH}


def ways(greedy: Greedy, tokens: int, some: list[dict[str, Any]] = WAYS) -> list[SamplingParams]:
    return [greedy(tokens, **way) for way in some]


@pytest.mark.parametrize("offload_layers", [2, None, *(pytest.param(end, marks=pytest.mark.slow) for end in (0, -1))])
@pytest.mark.parametrize("family", ["llama", "bands", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_a_mixed_batch_gives_what_each_request_gets_alone(
    family: str, offload_layers: int | None, make_llm: MakeLLM, greedy: Greedy, prompts: list[list[int]]
) -> None:
    llm = make_llm(family, budget=14, methods=ALLOWED[family], offload_layers=offload_layers, verify_loads=True)
    some = WAYS if family == "llama" else WITHOUT_IDENTITY
    params = ways(greedy, 10, some)
    asked = [prompts[i % len(prompts)] for i in range(len(params))]
    together = llm.generate(asked, params)
    alone = [llm.generate([prompt], one)[0] for prompt, one in zip(asked, params, strict=True)]
    assert [o.token_ids for o in together] == [o.token_ids for o in alone]
    for way, mixed, single in zip(some, together, alone, strict=True):
        assert mixed.stats["method"] == way.get("method", "speculative")
        full = way.get("method") == "full"
        assert mixed.stats["budget"] == (None if full else way.get("budget", 14))
        for name in ("tokens_read_per_step", "overlap", "bytes_loaded_per_step", "selection_bytes_per_step", "hit_rate"):
            assert mixed.stats[name] == pytest.approx(single.stats[name]), (way, name)
    llm.engine.check_integrity()


def test_a_chosen_method_is_the_engine_s_own_elsewhere(make_llm: MakeLLM, greedy: Greedy, prompts: list[list[int]]) -> None:
    mixed = make_llm("llama", budget=14, methods=WITHOUT_PROMPT).generate(prompts[2], ways(greedy, 12)[2])
    own = make_llm("llama", "streaming", budget=9).generate(prompts[2], greedy(12))
    assert mixed[0].token_ids == own[0].token_ids
    assert mixed[0].stats["tokens_read_per_step"] == own[0].stats["tokens_read_per_step"] == 9


@pytest.mark.slow
def test_preempted_requests_keep_their_choice(make_llm: MakeLLM, greedy: Greedy, prompts: list[list[int]]) -> None:
    """A device tier for about two requests: others wait on the host and go on as they would have."""
    settings: dict[str, Any] = {"budget": 14, "methods": POSSIBLE, "offload_layers": 0}
    page = 16 * 2 * 2 * 24 * 4
    roomy, tight = make_llm("llama", **settings), make_llm("llama", **settings, gpu_memory=page * 64)
    params = ways(greedy, 100, [*WAYS[:6], *WAYS[-9:-2]])
    asked = [prompts[1 + i % 2] for i in range(len(params))]
    wanted, found = roomy.generate(asked, params), tight.generate(asked, params)
    assert sum(o.stats["preemptions"] for o in found) > 0  # type: ignore[misc]
    assert [o.token_ids for o in found] == [o.token_ids for o in wanted]
    tight.engine.check_integrity()


def test_what_is_read_besides_the_budget_is_counted(make_llm: MakeLLM, greedy: Greedy, prompts: list[list[int]]) -> None:
    """All 30 generated tokens but the last one are read, and what the budget leaves for the prompt of 83."""
    llm = make_llm("llama", budget=14, methods=POSSIBLE, offload_layers=0)
    names = [name for name in CHOICES if name.endswith("-prompt")]
    outputs = llm.generate([prompts[2]] * len(names), [greedy(30, method=name) for name in names])
    for name, output in zip(names, outputs, strict=True):
        read = output.stats["tokens_read_per_step"]
        # 29 steps: sinks and scored tokens (8 of whole blocks at most for two of them), and after them the mean of 1 .. 29 tokens
        # generated, no fewer than the recent window.
        generated = sum(max(4, n) for n in range(1, 30)) / 29
        assert read <= 2 + 8 + generated + 1e-9, name
        if name in ("snapkv-prompt", "clusterkv-prompt"):
            assert read == pytest.approx(2 + 8 + generated, abs=0.3), name


def test_no_method_reads_more_than_its_budget(make_llm: MakeLLM, greedy: Greedy, prompts: list[list[int]]) -> None:
    """Whole blocks may leave less than a block of it."""
    llm = make_llm("llama", budget=40, methods=WITHOUT_PROMPT)
    names = [name for name in WITHOUT_PROMPT if name != "full"]
    for budget in (40, 31):
        outputs = llm.generate([prompts[2]] * len(names), [greedy(12, method=name, budget=budget) for name in names])
        for name, output in zip(names, outputs, strict=True):
            block = {"quest": 16, "shadowkv": 8}.get(name, 1)
            assert budget - block < output.stats["tokens_read_per_step"] <= budget, name


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"method": "oracle"}, "method 'oracle' is none that this engine runs"),
        ({"method": "nonsense"}, "none that this engine runs"),
        ({"budget": 15}, "between 7 .* and the engine's 14, got 15"),
        ({"budget": 6}, "between 7"),
        ({"method": "streaming", "budget": 15}, "the engine's 14"),
        ({"method": "full", "budget": 10}, "reads everything"),
    ],
)
def test_choices_beyond_the_engine_s_limits(
    choice: dict[str, Any], message: str, make_llm: MakeLLM, prompts: list[list[int]]
) -> None:
    llm = make_llm("llama", budget=14)
    with pytest.raises(RequestError, match=message):
        llm.generate([prompts[0]], SamplingParams(temperature=0.0, **choice))
    assert llm.generate([prompts[0]], SamplingParams(temperature=0.0, method="speculative", budget=14))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ("speculative-union", "nothing")}, "unknown method 'nothing' in methods"),
        ({"methods": "oracle"}, "must be a list of names"),
        ({"methods": ("speculative-union",), "method": "streaming"}, "needs 'speculative' beside it"),
        ({"methods": ("quest", "quest-prompt"), "offload_layers": None}, "set offload_layers to 0"),
        ({"methods": ("quest",), "granularity": "union"}, "cannot work with granularity 'union'"),
        ({"methods": ("speculative-identity",), "family": "qwen3"}, "needs a head with the model's 2 KV heads, this one has 3"),
    ],
)
def test_methods_that_an_engine_cannot_run(settings: dict[str, Any], message: str, make_llm: MakeLLM) -> None:
    with pytest.raises(ConfigError, match=message):
        make_llm(**{"family": "llama", "budget": 14} | settings)


def test_two_methods_with_a_retrieval_head(
    make_llm: MakeLLM, greedy: Greedy, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has keys of its own, also where the other's prompts are known."""
    second = registry.Method("second", "SpeculativeSelector", "as speculative", needs_head=True)
    monkeypatch.setitem(registry._NAMED, "second", (second, None))
    monkeypatch.setitem(sys.modules, second.module, speculative)
    monkeypatch.setattr("specontext.config.CHOICES", (*CHOICES, "second"))
    llm = make_llm("llama", budget=14, methods=("second", "full"), offload_layers=2)
    [alone] = llm.generate([prompts[2]], greedy(12))
    for asked in (["second"], ["second", "speculative", "full", "second"]):
        outputs = llm.generate([prompts[2]] * len(asked), [greedy(12, method=name) for name in asked])
        for name, output in zip(asked, outputs, strict=True):
            assert name == "full" or output.token_ids == alone.token_ids, name
        llm.engine.check_integrity()


def test_full_reads_its_newest_token_too_where_the_engines_own_method_has_slots(
    make_llm: MakeLLM, prompts: list[list[int]], greedy: Callable[..., SamplingParams]
) -> None:
    resident, offloaded = (
        make_llm("llama", budget=14, offload_layers=layers).generate(prompts, greedy(24, method="full")) for layers in (0, -1)
    )
    assert [output.token_ids for output in offloaded] == [output.token_ids for output in resident]

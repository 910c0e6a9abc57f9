"""Statistics against numbers worked out by hand and against an independent computation of the true attention."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from specontext import LLM, SamplingParams
from specontext.engine.status import StatusMeter

MakeLLM = Callable[..., LLM]
Greedy = Callable[..., SamplingParams]

# The Llama checkpoint: 3 layers, 2 KV heads of 24 in float32; its head: 2 groups of 16.
ROW = 2 * 24 * 4
KV_PER_TOKEN = 3 * 2 * ROW
HEAD_KEYS_PER_TOKEN = 2 * 16 * 4

# 20 prompt tokens and 4 outputs: the first output comes from the prompt, so three decode steps at lengths 21, 22, 23.
LENGTHS = [21, 22, 23]
PROMPT = [5 + 3 * i for i in range(20)]


def stats_of(llm: LLM, greedy: Greedy, prompt: list[int] = PROMPT, max_tokens: int = 4) -> dict[str, Any]:
    return llm.generate([prompt], greedy(max_tokens))[0].stats


def test_streaming_by_hand(make_llm: MakeLLM, greedy: Greedy) -> None:
    """Budget 8 with 2 sinks and 4 recent tokens leaves a window of 2: {15, 16}, {16, 17}, {17, 18}."""
    stats = stats_of(make_llm("llama", "streaming", budget=8, offload_layers=2), greedy)
    loads = 2 + 1 + 1  # tokens that were in no slot, for each KV head of each offloaded layer
    assert stats["decode_steps"] == 3 and (stats["prompt_tokens"], stats["completion_tokens"]) == (20, 4)
    assert stats["tokens_read_per_step"] == 8
    assert stats["selection_bytes_per_step"] == 0
    assert stats["bytes_loaded_per_step"] == pytest.approx(loads * 2 * 2 * ROW / 3)
    assert stats["bytes_full_per_step"] == pytest.approx(sum(LENGTHS) * KV_PER_TOKEN / 3)
    assert stats["overlap"] == 0.5
    assert stats["hit_rate"] == pytest.approx(1 - loads * 2 / (3 * 8 * 3))
    assert stats["attention_recall"] is None


def test_full_by_hand(make_llm: MakeLLM, greedy: Greedy) -> None:
    for offloaded in (0, 1, 3):
        stats = stats_of(make_llm("llama", "full", offload_layers=offloaded, measure_recall=True), greedy)
        assert stats["tokens_read_per_step"] == pytest.approx(22)
        assert stats["bytes_loaded_per_step"] == pytest.approx(22 * offloaded * 2 * ROW)
        assert stats["bytes_full_per_step"] == pytest.approx(22 * KV_PER_TOKEN)
        assert stats["hit_rate"] == pytest.approx(1 - offloaded / 3)
        assert stats["attention_recall"] == pytest.approx(1.0)
        assert stats["selection_bytes_per_step"] == 0 and stats["overlap"] is None and stats["budget"] is None


def test_speculative_by_hand(make_llm: MakeLLM, greedy: Greedy) -> None:
    """Every candidate fits: each token is loaded once, when it leaves the recent window."""
    stats = stats_of(make_llm("llama", budget=30, offload_layers=1, measure_recall=True), greedy)
    loads = (21 - 2 - 4) + 1 + 1
    assert stats["tokens_read_per_step"] == 22
    assert stats["selection_bytes_per_step"] == 0, "nothing is scored where everything is read"
    assert stats["bytes_loaded_per_step"] == pytest.approx(loads * 2 * ROW / 3)
    assert stats["overlap"] == pytest.approx((15 / 16 + 16 / 17) / 2)
    assert stats["hit_rate"] == pytest.approx(1 - loads / (sum(LENGTHS) * 3))
    assert stats["attention_recall"] == pytest.approx(1.0)


def test_oracle_counts_the_keys_it_streams(make_llm: MakeLLM, greedy: Greedy) -> None:
    stats = stats_of(make_llm("llama", "oracle", budget=30, offload_layers=2), greedy)
    keys = sum(LENGTHS) * 2 * 2 * ROW / 2
    loads = (15 + 1 + 1) * 2 * 2 * ROW
    assert stats["bytes_loaded_per_step"] == pytest.approx((keys + loads) / 3)
    assert stats["selection_bytes_per_step"] == pytest.approx(22 * KV_PER_TOKEN / 2)


def test_resident_layers_load_nothing(make_llm: MakeLLM, greedy: Greedy) -> None:
    for method in ("speculative", "oracle", "random", "streaming"):
        stats = stats_of(make_llm("llama", method, budget=9), greedy)
        assert (stats["bytes_loaded_per_step"], stats["hit_rate"], stats["tokens_read_per_step"]) == (0, 1, 9)


def test_a_context_shorter_than_the_budget(make_llm: MakeLLM, greedy: Greedy) -> None:
    stats = stats_of(make_llm("llama", "streaming", budget=8, offload_layers=-1, measure_recall=True), greedy, [7, 8, 9])
    assert stats["tokens_read_per_step"] == 5  # 4, 5 and 6
    assert (stats["bytes_loaded_per_step"], stats["hit_rate"], stats["overlap"]) == (0, 1, None)
    assert stats["attention_recall"] == pytest.approx(1.0)


def test_without_decode_steps_there_is_nothing_to_measure(make_llm: MakeLLM, greedy: Greedy) -> None:
    stats = stats_of(make_llm("llama", budget=9), greedy, max_tokens=1)
    measured = ("tokens_read_per_step", "bytes_loaded_per_step", "selection_bytes_per_step", "hit_rate", "overlap", "tpot_s")
    assert stats["decode_steps"] == 0 and all(stats[name] is None for name in measured)
    assert stats["ttft_s"] > 0


@pytest.mark.parametrize("method", ["streaming", "speculative", "oracle"])
def test_statistics_do_not_depend_on_chunks_or_company(
    method: str, make_llm: MakeLLM, greedy: Greedy, prompts: list[list[int]]
) -> None:
    found = []
    for company, chunk in ((False, 1024), (False, 7), (True, 30)):
        options = {"budget": 9, "offload_layers": 2, "slots": 11, "measure_recall": True}
        llm = make_llm("llama", method, max_num_batched_tokens=chunk, **options)
        llm.generate([prompts[0]], greedy(3))  # another request had the seat before
        outputs = llm.generate([PROMPT, *prompts] if company else [PROMPT], greedy(10))
        stats = outputs[0].stats
        assert stats.pop("moves") == []
        stats |= {f"recall of layer {n}": share for n, share in enumerate(stats.pop("attention_recall_by_layer"))}
        timed = ("queue_s", "ttft_s", "tpot_s", "step_s", "expected_step_s", "selection_s_per_step")
        found.append({k: v for k, v in stats.items() if k not in timed})
    assert found[1] == pytest.approx(found[0]) and found[2] == pytest.approx(found[0])


@pytest.mark.parametrize("method", ["streaming", "random", "speculative", "oracle"])
def test_overlap_and_loads_follow_from_the_selections(
    method: str, make_llm: MakeLLM, greedy: Greedy, prompts: list[list[int]]
) -> None:
    """Recomputed from the recorded selections with Python sets; slots equal the budget, so only the last set may stay."""
    llm = make_llm("llama", method, budget=12, offload_layers=3)
    kv, steps = llm.engine.parts.kv, []
    read = kv.read

    def recording(seats: torch.Tensor, selection: Any, layer: int | None = None, reader: Any = None) -> Any:
        reading = read(seats, selection, layer, reader)
        plan = reading.plan
        assert plan is not None
        scored = torch.where(selection.scored, selection.tokens, -1)[0]
        steps.append((layer, [{t for t in row.tolist() if t >= 0} for row in scored], int(plan.missing.sum())))
        return reading

    kv.read = recording  # type: ignore[method-assign]
    stats: dict[str, Any] = llm.generate([prompts[2]], greedy(12))[0].stats
    shares, loaded, missing_seen = [], 0, 0
    before: dict[int | None, list[set[int]]] = {}
    for layer, sets, missing in steps:
        heads_of_a_set = (3 if layer is None else 1) * 2 // len(sets)  # KV heads, of all layers, that read one set
        loaded += missing * heads_of_a_set
        missing_seen += missing
        if layer in before:
            shares.append(sum(len(a & b) for a, b in zip(sets, before[layer], strict=True)) / sum(map(len, sets)))
            new = sum(len(a - b) for a, b in zip(sets, before[layer], strict=True))
            assert missing == new  # six hot slots, six scored tokens: what stays is what both sets have
        before[layer] = sets
    assert stats["overlap"] == pytest.approx(sum(shares) / len(shares)) and missing_seen
    streamed = sum(range(84, 95)) * KV_PER_TOKEN / 2 if method == "oracle" else 0
    assert stats["bytes_loaded_per_step"] == pytest.approx((loaded * ROW + streamed) / 11)
    assert stats["hit_rate"] == pytest.approx(1 - loaded / (11 * 12 * 6))


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("offload_layers", [0, 2])
def test_recall_is_the_true_attention_s_mass_on_the_selection(
    family: str,
    offload_layers: int,
    make_llm: MakeLLM,
    greedy: Greedy,
    reference: Callable[[str], PreTrainedModel],
    masked_forward: Callable[..., Any],
    prompts: list[list[int]],
) -> None:
    """Layer by layer: the layers below see the selection only, and this one shows what it would have attended to."""
    model, prompt, steps = reference(family), prompts[3], 4
    llm = make_llm(family, "streaming", budget=16, offload_layers=offload_layers, measure_recall=True)
    (output,) = llm.generate([prompt], greedy(steps + 1))
    ids = prompt + output.token_ids[:-1]
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril().expand(heads, -1, -1)
    sparse = causal.clone()
    for position in range(len(prompt), len(ids)):
        sparse[:, position, 2 : position + 1 - 14] = False  # all but two sinks and the last fourteen
    expected = []
    for layer in range(layers):
        masks = [causal if i == layer else sparse for i in range(layers)]
        weights = masked_forward(model, ids, masks, attentions=True).attentions[layer][0]
        expected.append((weights * sparse)[:, len(prompt) :].sum(-1).mean().item())
    recall = output.stats["attention_recall"]
    assert isinstance(recall, float) and recall < 0.95
    assert recall == pytest.approx(sum(expected) / layers, abs=1e-4)
    assert output.stats["attention_recall_by_layer"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("method", ["speculative", "streaming", "oracle", "random"])
def test_recall_of_a_budget_that_covers_everything_is_one(method: str, make_llm: MakeLLM, greedy: Greedy) -> None:
    for granularity in ("head", "union", "batch"):
        llm = make_llm("qwen3", method, budget=40, granularity=granularity, measure_recall=True)
        assert stats_of(llm, greedy)["attention_recall"] == pytest.approx(1.0)


def test_the_oracle_recalls_more_than_others(make_llm: MakeLLM, greedy: Greedy, prompts: list[list[int]]) -> None:
    def recall(method: str) -> Any:
        llm = make_llm("llama", method, budget=14, measure_recall=True)
        return llm.generate([prompts[2]], greedy(6))[0].stats["attention_recall"]

    assert recall("oracle") > max(recall("random"), recall("streaming"))


@pytest.mark.parametrize(("method", "budget"), [("speculative", 12), ("quest", 24), ("full", 12)])
def test_an_engine_learns_what_its_steps_take(
    method: str, budget: int, make_llm: Callable[..., LLM], prompts: Any, greedy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expected beside measured, of an output and of the engine now; and the same tokens as where nothing is learned."""
    settled = make_llm("llama", method, budget=budget).generate(prompts[:2], greedy(60))
    monkeypatch.setattr("specontext.memory.learning.PERIOD", 8)
    llm, ticks = make_llm("llama", method, budget=budget), itertools.count()
    monkeypatch.setattr("specontext.engine.llm_engine.time.perf_counter", lambda: 0.025 * next(ticks))  # as often in each step
    clock = llm.engine.parts.clock
    before = clock.decode([60, 60], 0).seconds
    outputs = llm.generate(prompts[:2], greedy(60))
    assert clock.step_s is not None and clock.step_s > 0.04 > 4 * before
    assert clock.decode([60, 60], 0).seconds == pytest.approx(clock.step_s, rel=0.1)
    stats = outputs[0].stats
    assert stats["step_s"] == clock.step_s and stats["expected_step_s"] == pytest.approx(clock.step_s, rel=0.1)
    status = StatusMeter().take(llm.engine)
    assert (status.step_s, status.expected_step_s) == (clock.step_s, clock.expected_s)
    assert (status.expected_overlap is None) == (method == "full")
    assert [output.token_ids for output in outputs] == [output.token_ids for output in settled]

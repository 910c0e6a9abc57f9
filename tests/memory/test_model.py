"""Bytes of a plan: eq. 6-7 and the engine's allocations, computed by hand beside the code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specontext.errors import ConfigError
from specontext.memory.facts import HeadFacts, ModelFacts, eagle3_head, weight_bytes
from specontext.memory.model import (
    RunSettings,
    estimate_runtime,
    fitting_step,
    measured_model,
    paper_model,
    table_bytes,
    workspace_bytes,
)
from specontext.memory.presets import PRESETS
from specontext.memory.speed import (
    Bandwidths,
    decode_floor,
    floor_seconds,
    measure_bandwidths,
    measure_products,
    prefill_operations,
)
from specontext.model_shape import ModelShape

SHAPE = ModelShape(
    layers=4, hidden_size=64, query_heads=8, kv_heads=2, head_dim=16, vocab_size=90, max_position=512, dtype=torch.float16
)
HEAD = HeadFacts(parameters=1000, heads=6, kv_heads=3, key_heads=3, head_dim=8, feature_width=192, state_width=64)
FACTS = ModelFacts("small", SHAPE, parameters=5000, lookup_parameters=90 * 64, intermediate_size=96, head=HEAD)
RUN = RunSettings(requests=3, max_tokens=100, budget=32, slots=40, sink=4, recent=16, page_size=16)
ENTRY = 2 * 2 * 16 * 2  # KV heads, K and V, head dim, bytes: one token of one layer


# Mode paper -----------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    length=st.integers(0, 10**6), requests=st.integers(1, 64), offloaded=st.integers(0, 32), budget=st.sampled_from([64, 2048])
)
def test_paper_is_equations_6_and_7(length: int, requests: int, offloaded: int, budget: int) -> None:
    model = paper_model(PRESETS["llama-3.1-8b"].facts(), budget=budget)
    weights, head, layers, kv_heads, dim, alpha = 2 * 8_030_261_248, 2 * 92_282_880, 32, 8, 128, 4
    kv = 4 * requests * ((layers - offloaded + 1 + alpha) * length + offloaded * budget) * kv_heads * dim
    exact = 1.3 * (weights + head) + kv
    found = model.device(length, requests, offloaded)
    assert 0 <= found - exact < 1 + 1e-12 * exact
    parts = model.by_part(length, requests, offloaded)
    assert list(parts) == ["weights", "retrieval_head", "runtime", "kv_device", "kv_host"]
    assert (parts["weights"], parts["retrieval_head"], parts["kv_device"]) == (weights, head, kv)
    assert parts["kv_host"] == model.host(length, requests, offloaded) == 4 * requests * offloaded * length * kv_heads * dim
    assert sum(parts.values()) - parts["kv_host"] == found


def test_paper_counts_two_bytes_whatever_the_number_format() -> None:
    preset = PRESETS["llama-3.2-1b"]
    half, single = (paper_model(preset.facts(dtype), budget=2048) for dtype in (torch.bfloat16, torch.float32))
    assert half == single


# Mode measured --------------------------------------------------------------------------------------------------------


def test_measured_counts_pages_slots_and_keys() -> None:
    model = measured_model(FACTS, RUN, runtime=12345, graphs=77, spare_layers=1)
    parts = model.by_part(50, 3, 1)  # 50 tokens are 4 pages of 16, 40 slots are 3 pages
    assert parts["weights"] == 10_000 and parts["retrieval_head"] == 2_000
    assert parts["runtime"] == 12345 and parts["graphs"] == 77
    assert parts["kv_device"] == 3 * 3 * 64 * ENTRY
    assert parts["slots"] == 3 * (1 + 1) * 48 * ENTRY  # one layer is offloaded and the slots of one more are kept free
    assert parts["keys"] == 3 * 64 * 49  # a page of 2,048 bytes holds the keys of 42 tokens, 48 bytes each, and has a rest
    assert parts["kv_host"] == (3 * 64 + 16) * 4 * ENTRY  # all layers are one block; and the null page
    assert model.device(50, 3, 1) == sum(parts.values()) - parts["kv_host"]
    assert model.host(50, 3, 0) == 0
    assert model.by_part(50, 3, 4)["slots"] == 3 * 4 * 48 * ENTRY
    assert measured_model(FACTS, RUN, spare_layers=0).by_part(50, 3, 0)["slots"] == 0


def test_keys_that_groups_share_are_counted_once_and_have_to_fit_a_page() -> None:
    def facts(key_heads: int, width: int) -> ModelFacts:
        return replace(FACTS, head=replace(HEAD, kv_heads=6, key_heads=key_heads, head_dim=width))

    assert [facts(heads, 32).key_bytes_per_token for heads in (1, 2, 6)] == [64, 128, 384]
    assert facts(1, 512).tokens_of_key_page(8) == 1
    assert measured_model(facts(1, 512), RUN).kv.common_token == 1024
    with pytest.raises(ConfigError, match="keys of one token take 1040: set page_size to 9 or more"):
        measured_model(facts(1, 520), replace(RUN, page_size=8))


@pytest.mark.parametrize(("granularity", "groups"), [("head", 3), ("union", 1)])
def test_tables_have_a_row_for_each_seat_and_one_for_padding(granularity: str, groups: int) -> None:
    token_pages, slot_pages = (4 + 1) * 7 * 8, 4 * 3 * 8  # of four layers, and of a block on the host; pages of 100 tokens, int64
    key_pages = -(-100 // (16 * ENTRY // (3 * 8 * 2))) * 8  # keys of as many tokens as a page of KV has room for
    hot_slots, slot_of_token = 2 * groups * (40 - 4 - 16) * 4, groups * 100 * 4  # int32
    last_selection, counters, feature = groups * 32 * 4, (10 + 4) * 8, 64 * 2
    row = token_pages + slot_pages + key_pages + hot_slots + slot_of_token + last_selection + counters + feature
    run = RunSettings(**(RUN.__dict__ | {"granularity": granularity}))
    maps = 4 * (8 * (FACTS.shape.kv_heads + groups) + 1) + 4 + 10 * 8  # layers: map, readers, flags; steps; left
    # What is copied together: a part for each KV head, its four layers, head and group, for two maps; the same of each layer by
    # itself; the members of the block; line and place of every layer in two tiers.
    maps += 8 * (2 * 2 * (4 + 2) + 2 * 4 * 2 * 3 + 4 + 4 * 4)
    assert table_bytes(FACTS, run) == (3 + 1) * row + maps
    assert measured_model(FACTS, run).fixed["tables"] == (3 + 1) * row + maps + 16 * ENTRY


def test_workspace_holds_logits_and_scores_of_all_positions() -> None:
    positions = 3 * 100 * 4 * (6 + 3)  # requests, tokens, float32, query heads and groups of the head
    found = workspace_bytes(FACTS, RUN)
    assert positions < found
    longer = workspace_bytes(FACTS, RunSettings(**(RUN.__dict__ | {"max_tokens": 200})))
    assert longer - found == positions


def test_the_estimate_of_buffers_is_far_below_30_percent_of_a_large_model_and_grows_with_the_step() -> None:
    facts = PRESETS["llama-3.1-8b"].facts()
    run = RunSettings(requests=4, max_tokens=131072, budget=2048, slots=2048, max_batched_tokens=1024)
    small = estimate_runtime(facts, run)
    assert 200 << 20 < small < 0.15 * facts.weight_bytes
    assert estimate_runtime(facts, RunSettings(**(run.__dict__ | {"max_batched_tokens": 8192}))) > 2 * small
    assert measured_model(facts, run).fixed["runtime"] == small


def test_number_format_scales_weights_keys_and_kv() -> None:
    preset = PRESETS["qwen3-0.6b"]
    models = [measured_model(preset.facts(d), RUN) for d in (torch.bfloat16, torch.float32)]
    half, single = (model.by_part(64, 3, 4) for model in models)
    for part in ("weights", "retrieval_head", "keys", "slots", "kv_device"):
        assert single[part] == 2 * half[part]
    # Blocks of four and of two layers have pages of as many bytes.
    half_page, single_page = (model.kv.host_fixed for model in models)
    assert half_page == single_page and single["kv_host"] - single_page == 2 * (half["kv_host"] - half_page)


# Physics --------------------------------------------------------------------------------------------------------------


def test_bytes_of_weights_and_kv() -> None:
    facts = PRESETS["llama-3.1-8b"].facts()
    assert facts.weight_bytes == weight_bytes(8_030_261_248, torch.bfloat16) == 16_060_522_496
    assert facts.head_bytes == 184_565_760
    assert facts.kv_bytes_per_token == 128 * 1024
    assert facts.key_bytes_per_token == 2048  # 1 / (2 L) of the KV


def test_head_of_a_draft() -> None:
    head = eagle3_head(PRESETS["qwen3-8b"].shape())
    assert head.parameters == 33_554_432 + 8_388_608 + 8_192 + 50_331_648
    assert (head.heads, head.kv_heads, head.head_dim, head.feature_width) == (32, 8, 128, 3 * 4096)


def test_floor_of_a_decode_step_by_hand() -> None:
    speed = Bandwidths(device=1e9, host=1e6)
    options: dict[str, Any] = {"length": 100, "requests": 3, "budget": 32, "overlap": 0.75}
    found = decode_floor(FACTS, speed, offloaded=2, **options)
    selected = 3 * 32 * ENTRY  # of one layer
    assert found.host_bytes == selected * 2 // 4
    weights = (5000 - 90 * 64) * 2 + 2000
    assert found.device_bytes == weights + 3 * 100 * 3 * 8 * 2 + 4 * selected + found.host_bytes
    assert found.seconds == floor_seconds(found.host_bytes, 1e6) and found.loads_limit
    resident = decode_floor(FACTS, speed, offloaded=0, **options)
    assert resident.host_bytes == 0 and resident.seconds == resident.device_bytes / 1e9
    short = decode_floor(FACTS, speed, offloaded=4, **(options | {"length": 20}))
    assert short.host_bytes == 0  # all of it has a slot


def test_operations_of_reading_by_hand() -> None:
    shape = FACTS.shape
    pairs = 10 * 10 / 2  # of a query and a key before it
    attention = shape.layers * shape.query_heads * pairs * 2 * 2 * shape.head_dim
    assert prefill_operations(FACTS, 10) == 2 * (5000 - 90 * 64) * 10 + attention


def test_products_can_be_measured() -> None:
    assert 1e8 < measure_products(torch.device("cpu"), torch.float32, size=128) < 1e14


def test_bandwidths_can_be_measured() -> None:
    found = measure_bandwidths(torch.device("cpu"), size=1 << 22)
    assert found.device > 1e8 and found.host > 1e8


def test_the_host_has_room_for_whole_blocks() -> None:
    """Two blocks of two layers: the last layer takes as much as the last two, and a band's layers lie by themselves."""
    shape = replace(SHAPE, head_dim=256)  # a row of 1 KiB
    model = measured_model(replace(FACTS, shape=shape), RUN)
    entry = 2 * 1024
    assert [model.kv.host(48, away) - model.kv.host_fixed for away in (1, 2, 3, 4)] == [n * 48 * entry for n in (2, 2, 4, 4)]
    assert model.kv.host_fixed == model.kv.host_page == 16 * 2 * entry
    mapped = replace(HEAD, head_map=((0, 1), (0, 1), (0, 1), (2, 3)))
    banded = replace(FACTS, shape=shape, head=mapped)
    assert banded.layer_blocks.sizes == (3, 1)
    other = replace(HEAD, head_map=((0, 1),))  # of a model with one layer
    assert replace(FACTS, shape=shape, head=other).layer_blocks.sizes == (2, 2)


def test_steps_are_smaller_where_memory_is_short() -> None:
    facts, run = PRESETS["llama-3.1-8b"].facts(), RunSettings(1, 65536, 2048, 2048)
    tokens = [fitting_step(facts, run, gib << 30).max_batched_tokens for gib in (8, 20, 24, 40, 80)]
    assert tokens == sorted(tokens) and tokens[0] == 1024 and tokens[-1] == run.max_batched_tokens
    assert fitting_step(facts, replace(run, max_batched_tokens=300), 8 << 30).max_batched_tokens == 300

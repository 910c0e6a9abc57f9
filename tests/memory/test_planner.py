"""Thresholds equal Algorithm 1, the run-time policy equals Algorithm 2 and never oscillates."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from specontext.errors import MemoryPlanError
from specontext.memory.kv_cost import KVCost
from specontext.memory.layer_blocks import divide_layers
from specontext.memory.model import RunSettings, measured_model, paper_model
from specontext.memory.planner import UNBOUNDED, MemoryPlan, ResidencyPolicy, thresholds
from specontext.memory.presets import PRESETS

GIB = 1 << 30
PROPERTIES = settings(max_examples=200, deadline=None, derandomize=True)


def llama(memory: int, requests: int, *, mode: str = "paper", host: int | None = None, length: int = 131072) -> MemoryPlan:
    facts = PRESETS["llama-3.1-8b"].facts()
    run = RunSettings(requests=requests, max_tokens=length, budget=2048, slots=2048)
    model = paper_model(facts, budget=2048) if mode == "paper" else measured_model(facts, run)
    return MemoryPlan(facts, model, requests, memory, host, length)


@st.composite
def costs_of(draw: st.DrawFn) -> KVCost:
    layers = draw(st.integers(1, 6))
    blocks = None if draw(st.booleans()) else divide_layers([[0]] * layers, 512, least=draw(st.sampled_from([512, 1024, 2048])))
    return KVCost(
        layers=layers,
        resident_token=draw(st.integers(1, 40)),
        common_token=draw(st.integers(1, 60)),
        layer_slots=draw(st.integers(0, 2000)),
        page_size=draw(st.sampled_from([1, 4, 16])),
        spare_layers=draw(st.integers(0, 1)),
        host_fixed=draw(st.integers(0, 50)),
        blocks=blocks,
    )


costs = costs_of()


@st.composite
def policies(draw: st.DrawFn) -> ResidencyPolicy:
    host = draw(st.none() | st.integers(0, 60_000))
    return ResidencyPolicy(draw(costs), draw(st.integers(-100, 60_000)), host, draw(st.sampled_from([0, 1, 16, 64])))


# Algorithm 1 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("memory", "requests"), [(80, 32), (80, 4), (24, 4), (24, 32), (20, 1), (80, 1)])
def test_thresholds_are_algorithm_1(memory: int, requests: int) -> None:
    rest = memory * GIB - Fraction(13, 10) * 2 * (8_030_261_248 + 92_282_880)
    expected = []
    for i in range(33):
        room = rest - (4 * i * 2048 * requests * 8 * 128 if i else 0)
        expected.append(max(-1, floor(room / (4 * requests * 8 * 128 * (32 + 1 + 4 - i)))))
    plan = llama(memory * GIB, requests)
    assert list(plan.thresholds) == expected
    assert plan.max_len_resident == max(expected[0], 0)
    assert plan.max_len_device == max(*expected, 0)


def test_thresholds_of_the_paper_s_cloud_setting() -> None:
    found = llama(80 * GIB, 32).thresholds
    assert (len(found), found[0], found[1], found[16], found[31], found[32]) == (33, 13357, 13671, 21974, 71791, 85740)


@PROPERTIES
@given(kv=costs, available=st.integers(-100, 60_000), requests=st.integers(1, 5))
def test_thresholds_are_the_longest_contexts_that_fit(kv: KVCost, available: int, requests: int) -> None:
    found = thresholds(kv, available, requests)
    assert len(found) == kv.layers + 1
    for offloaded, most in enumerate(found):
        if most >= 0:
            assert kv.device(requests * kv.whole_pages(most), requests, offloaded) <= available
        assert kv.device(requests * kv.whole_pages(max(most, 0) + (most >= 0)), requests, offloaded) > available


def test_measured_thresholds_are_whole_pages_and_fit() -> None:
    plan = llama(24 * GIB, 4, mode="measured")
    for offloaded, most in enumerate(plan.thresholds):
        assert most % 16 == 0
        assert plan.model.device(most, 4, offloaded) <= plan.gpu_memory < plan.model.device(most + 1, 4, offloaded)


# Algorithm 2 ----------------------------------------------------------------------------------------------------------


def algorithm_2(found: tuple[int, ...], length: int, offloaded: int) -> int:
    layers = len(found) - 1
    while offloaded < layers and length >= found[offloaded]:
        offloaded += 1
    return offloaded


@PROPERTIES
@given(kv=costs, available=st.integers(0, 60_000), requests=st.integers(1, 5), start=st.integers(0, 300))
def test_equal_lengths_follow_algorithm_2(kv: KVCost, available: int, requests: int, start: int) -> None:
    policy = ResidencyPolicy(kv, available, stay=16)
    found = thresholds(kv, available, requests)
    theirs, ours = 0, 0
    for length in range(start, start + 60):
        theirs = algorithm_2(found, length, theirs)
        target = policy.target(ours, policy.tokens_after([length] * requests), requests)
        if target is None:  # not even with the number that Algorithm 2 ends with
            assert length >= found[theirs]
            return
        ours = target
        assert ours == theirs


def test_layers_go_one_by_one_as_a_request_set_of_the_paper_grows() -> None:
    plan = llama(80 * GIB, 32)
    policy, offloaded, seen = plan.policy(), 0, {}
    for length in range(13_000, 85_740, 7):
        target = policy.target(offloaded, policy.tokens_after([length] * 32), 32)
        assert target is not None and offloaded <= target <= offloaded + 1
        if target > offloaded:
            seen[target] = length
        offloaded = target
    assert list(seen) == list(range(1, 33))
    assert all(0 <= length - plan.thresholds[i - 1] < 7 for i, length in seen.items())
    assert policy.target(32, policy.tokens_after([85_740] * 32), 32) is None


@PROPERTIES
@given(policy=policies(), tokens=st.integers(0, 3000), requests=st.integers(0, 5), data=st.data())
def test_what_is_chosen_fits_and_nothing_else_is_missed(
    policy: ResidencyPolicy, tokens: int, requests: int, data: st.DataObject
) -> None:
    layers = policy.kv.layers
    offloaded = data.draw(st.integers(0, layers))
    target = policy.target(offloaded, tokens, requests)
    fitting = [i for i in range(layers + 1) if policy.fits(i, tokens, requests)]
    if target is None:
        assert not fitting
        return
    assert policy.kv.device(tokens, requests, target) <= policy.available
    if policy.host_available is not None:
        assert policy.kv.host(tokens, target) <= policy.host_available
    assert target in fitting
    if target > offloaded:  # no layer goes without need
        assert not [i for i in fitting if offloaded <= i < target]


@PROPERTIES
@given(policy=policies(), requests=st.integers(1, 5), base=st.integers(0, 3000), data=st.data())
def test_nothing_oscillates(policy: ResidencyPolicy, requests: int, base: int, data: st.DataObject) -> None:
    """While the sum of tokens moves within `stay` tokens a request, all moves go in one direction."""
    offloaded = data.draw(st.integers(0, policy.kv.layers))
    moves = set()
    for extra in data.draw(st.lists(st.integers(0, policy.stay * requests), min_size=2, max_size=30)):
        target = policy.target(offloaded, base + extra, requests)
        if target is not None:
            moves.add((target > offloaded) - (target < offloaded))
            offloaded = target
    assert not {-1, 1} <= moves


@PROPERTIES
@given(policy=policies(), tokens=st.integers(0, 3000), requests=st.integers(1, 5), data=st.data())
def test_the_answer_is_stable_and_grows_with_the_tokens(
    policy: ResidencyPolicy, tokens: int, requests: int, data: st.DataObject
) -> None:
    policy = ResidencyPolicy(policy.kv, policy.available, None, policy.stay)
    assume(policy.kv.layer_slots <= policy.kv.resident_token * tokens // requests)  # offloading gains memory
    offloaded = data.draw(st.integers(0, policy.kv.layers))
    target = policy.target(offloaded, tokens, requests)
    more = policy.target(offloaded, tokens + 1, requests)
    if target is not None:
        assert policy.target(target, tokens, requests) == target
        assert more is None or more >= target
    else:
        assert more is None


def test_layers_return_when_memory_frees_up() -> None:
    policy = llama(80 * GIB, 32).policy(stay=256)
    assert policy.target(20, policy.tokens_after([30_000] * 8), 8) == 0  # most requests have left
    assert policy.target(20, 0, 0) == 0
    low = llama(80 * GIB, 32).thresholds[5]
    assert policy.target(6, policy.tokens_after([low - 10] * 32), 32) == 6  # it would fit, but not for long
    assert policy.target(6, policy.tokens_after([low - 257] * 32), 32) == 5
    assert policy.target(6, policy.tokens_after([low - 256] * 32), 32) == 6


def test_the_sum_of_the_tokens_decides() -> None:
    policy = llama(80 * GIB, 4).policy()
    for total in (400_000, 440_000, 800_000):
        even = policy.target(0, policy.tokens_after([total // 4] * 4), 4)
        skewed = policy.target(0, policy.tokens_after([total - 300, 100, 100, 100]), 4)
        assert even == skewed


def test_a_move_never_needs_more_than_either_side() -> None:
    """A layer's pages and its slots are held together while it moves."""
    kv = llama(24 * GIB, 4, mode="measured").model.kv
    tokens = 4 * 30_000 // 16 * 16
    for offloaded in range(kv.layers):
        moving = tokens * kv.token(offloaded) + 4 * kv.layer_slots * (offloaded + 1)
        assert moving == kv.device(tokens, 4, offloaded)


def test_capacity() -> None:
    kv = KVCost(layers=2, resident_token=10, common_token=5, layer_slots=100, page_size=4, host_fixed=7)
    policy = ResidencyPolicy(kv, available=1000, host_available=207)
    assert [policy.capacity(i, 2) for i in range(3)] == [40, 20, 8]  # 1000 / 25; the host: 200 / 10, 200 / 20
    assert ResidencyPolicy(kv, 100).capacity(1, 2) == -1
    assert policy.tokens_after([1, 3, 4, 9]) == 4 + 4 + 8 + 12


def test_tokens_may_take_nothing_where_there_is_no_head_and_all_layers_are_offloaded() -> None:
    kv = KVCost(layers=2, resident_token=10, common_token=0, layer_slots=100)
    assert thresholds(kv, 1000, 2) == (25, 40, UNBOUNDED)
    assert ResidencyPolicy(kv, 1000).capacity(2, 2) == UNBOUNDED
    assert ResidencyPolicy(kv, 1000, host_available=400).capacity(2, 2) == 20
    assert ResidencyPolicy(kv, 1000).target(0, 10**9, 2) == 2


# Plans ----------------------------------------------------------------------------------------------------------------


def test_the_host_s_memory_can_limit_a_plan() -> None:
    free, bound = llama(80 * GIB, 32), llama(80 * GIB, 32, host=64 * GIB)
    assert free.max_len_offloaded == free.max_len == 85_740 and free.limited_by == "gpu_memory"
    assert bound.max_len_device == 85_740 and bound.limited_by == "host_memory"
    assert 13_357 < bound.max_len_offloaded < 85_740
    at = bound.offloaded_at(bound.max_len)
    assert at is not None and bound.bytes_at(bound.max_len)["kv_host"] <= 64 * GIB
    assert bound.offloaded_at(bound.max_len + 1) is None


def test_the_fewest_layers_are_offloaded() -> None:
    plan = llama(80 * GIB, 32)
    assert plan.offloaded_at(13_357) == 0 and plan.offloaded_at(13_358) == 1
    assert plan.offloaded_at(85_740) == 32 and plan.offloaded_at(85_741) is None
    assert llama(80 * GIB, 4, length=50_000).limited_by == "model"


@pytest.mark.parametrize("mode", ["paper", "measured"])
def test_memory_that_is_too_small(mode: str) -> None:
    with pytest.raises(MemoryPlanError, match=r"weights take 14\.96 GiB .* 8\.00 GiB, 7\.13 GiB too little"):
        llama(8 * GIB, 1, mode=mode).check_weights()
    barely = llama(int(15.2 * GIB), 1, mode=mode)
    barely.check_weights()
    assert set(barely.thresholds) == {-1}
    assert barely.max_len == barely.max_len_resident == barely.max_len_offloaded == 0
    assert barely.bytes_at(0)["weights"] == 16_060_522_496


@PROPERTIES
@given(memory=st.integers(16 * GIB, 90 * GIB), requests=st.integers(1, 64), mode=st.sampled_from(["paper", "measured"]))
def test_more_memory_never_shortens_a_context(memory: int, requests: int, mode: str) -> None:
    less, more = llama(memory, requests, mode=mode), llama(memory + GIB, requests, mode=mode)
    assert all(a <= b for a, b in zip(less.thresholds, more.thresholds, strict=True))
    assert less.max_len <= more.max_len
    if less.max_len:
        parts = less.bytes_at(less.max_len)
        assert sum(parts.values()) - parts["kv_host"] <= memory

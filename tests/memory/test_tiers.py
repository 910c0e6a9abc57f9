"""Sizes of the tiers: never beyond the memory that was allowed, and an error names the bytes that would do."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specontext.errors import MemoryPlanError
from specontext.memory import tiers
from specontext.memory.kv_cost import KVCost
from specontext.memory.layer_blocks import divide_layers
from specontext.memory.tiers import TierSizes, size_tiers

LAYERS = 4
TOKEN = 2 * 2 * 16 * 2  # KV heads, K and V, head dim, bytes
PLENTY = 1 << 40


def cost(*, slots: int = 40, keys: int = 40, page_size: int = 16, spare: int = 0, together: int = 1) -> KVCost:
    page, blocks = page_size * TOKEN, divide_layers([[0]] * LAYERS, 1, least=together)
    return KVCost(LAYERS, TOKEN, keys, -(-slots // page_size) * page, page_size, spare, host_fixed=page, blocks=blocks)


def sizes(*, slots: int = 40, keys: int = 40, page_size: int = 16, together: int = 1, **changes: Any) -> TierSizes:
    values: dict[str, Any] = {
        "offloaded": 1,
        "seats": 2,
        "max_tokens": 100,
        "device_memory": PLENTY,
        "host_memory": PLENTY,
    }
    spare = 1 if changes.get("offloaded", 1) is None and slots else 0
    return size_tiers(cost(slots=slots, keys=keys, page_size=page_size, spare=spare, together=together), **values | changes)


def test_what_the_requests_need_by_hand() -> None:
    found = sizes()  # 100 tokens are 7 pages, 40 slots are 3 pages; one null page in each pool
    keys = 2 * 7 * 16 * 40  # bytes of full pages of keys; what each request's last page of them wastes is less than a page
    kv = 2 * (3 * 7 + 1 * 3)
    assert found.device_pages == 1 + kv + -(-(keys + 2 * 16 * TOKEN) // (16 * TOKEN))
    assert found.host_pages == 1 + 2 * 4 * 7  # all layers: requests that wait keep their KV there
    assert found.device_bytes == found.device_pages * 16 * TOKEN
    assert found.host_bytes == found.host_pages * 16 * TOKEN


def test_without_offloaded_layers_there_are_no_slots_and_without_a_head_no_keys() -> None:
    found = sizes(offloaded=0, keys=0)
    assert (found.device_pages, found.host_pages) == (1 + 2 * 4 * 7, 1 + 2 * 4 * 7)
    assert found.device_bytes == found.device_pages * 16 * TOKEN


def test_all_layers_offloaded() -> None:
    found = sizes(offloaded=4, keys=0)
    assert (found.device_pages, found.host_pages) == (1 + 2 * 4 * 3, 1 + 2 * 4 * 7)


def test_layers_that_may_move_have_room_in_both_tiers_and_slots_for_the_next_to_leave() -> None:
    found = sizes(offloaded=None, keys=0)
    assert (found.device_pages, found.host_pages) == (1 + 2 * (4 * 7 + 3), 1 + 2 * 4 * 7)


def test_the_host_has_room_for_known_prompts_beside_the_requests() -> None:
    pages = 2 * 7  # of both requests' tokens; each page of a known prompt is four of KV and one or two of what lies beside it
    assert sizes(beside_known=0).host_pages == 1 + pages * (4 + 4)
    assert sizes(beside_known=1).host_pages == 1 + pages * (4 + 5)
    assert sizes(beside_known=16 * TOKEN + 1).host_pages == 1 + pages * (4 + 6)
    assert sizes(beside_known=1, host_memory=100 * 16 * TOKEN).host_pages == 100


@pytest.mark.parametrize(("together", "blocks", "places"), [(2, 2, 2), (3, 1, 4), (4, 1, 4)])
def test_pages_of_the_host_have_the_rows_of_a_block(together: int, blocks: int, places: int) -> None:
    alone, found = sizes(offloaded=None), sizes(offloaded=None, together=together)
    assert found.host_pages == 1 + 2 * 7 * blocks
    assert found.host_bytes == found.host_pages * places * 16 * TOKEN
    assert (found.device_pages, found.device_bytes) == (alone.device_pages, alone.device_bytes)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    offloaded=st.one_of(st.none(), st.integers(0, 4)),
    slots=st.sampled_from([0, 21, 40, 64]),
    keys=st.sampled_from([0, 40, 256]),
    seats=st.integers(1, 5),
    max_tokens=st.integers(1, 300),
    page_size=st.sampled_from([1, 16, 64]),
    together=st.integers(1, 4),
    device_memory=st.integers(1, 2_000_000),
    host_memory=st.integers(1, 1_000_000),
    beside_known=st.one_of(st.none(), st.integers(0, 100_000)),
)
def test_no_tier_exceeds_its_memory_and_errors_say_what_would_do(**values: Any) -> None:
    try:
        found = sizes(**values)
    except MemoryPlanError as error:
        host = "host tier" in str(error)
        name, flag = ("host_memory", "--host-memory") if host else ("device_memory", "--gpu-memory")
        match = re.search(r"has (\d+) bytes and needs at least (\d+)\D+(\d+) more: raise (--\S+) by that", str(error))
        assert match is not None and match[4] == flag
        allowed, needed, more = map(int, match.groups()[:3])
        assert allowed == values[name] < needed == allowed + more
        if "offload more layers" in str(error):
            assert values["offloaded"] is not None and values["offloaded"] < LAYERS
        other = {"device_memory" if host else "host_memory": PLENTY}
        sizes(**values | {name: needed} | other)
        with pytest.raises(MemoryPlanError):
            sizes(**values | {name: needed - 1} | other)
        return
    wanted = sizes(**values | {"device_memory": PLENTY, "host_memory": PLENTY})
    assert found.device_bytes <= values["device_memory"]
    assert found.host_bytes <= values["host_memory"]
    assert found.device_pages <= wanted.device_pages
    assert found.host_pages <= wanted.host_pages


def test_free_memory_of_the_cpu_is_a_positive_number_of_bytes() -> None:
    assert tiers.free_memory(torch.device("cpu")) > 1 << 20


def test_only_what_helps_is_advised() -> None:
    with pytest.raises(MemoryPlanError, match=r"raise --gpu-memory by that, or lower --slots$"):
        sizes(offloaded=4, device_memory=1)
    with pytest.raises(MemoryPlanError, match=r"raise --gpu-memory by that, or lower --slots, or offload more layers$"):
        sizes(offloaded=3, device_memory=1)
    with pytest.raises(MemoryPlanError, match=r"raise --gpu-memory by that$"):
        sizes(offloaded=None, slots=0, device_memory=1)

"""Sizes of the tiers: never beyond the memory that was allowed, and an error names the bytes that would do."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specontext.core import ModelShape
from specontext.memory import tiers
from specontext.memory.tiers import MemoryPlanError, TierSizes, size_tiers

SHAPE = ModelShape(
    layers=4, hidden_size=64, query_heads=8, kv_heads=2, head_dim=16, vocab_size=9, max_position=512, dtype=torch.float16
)
PAGE = 16 * 2 * 2 * 16 * 2  # tokens, KV heads, K and V, head dim, bytes
KEY_PAGE = 16 * 40
PLENTY = 1 << 40


def sizes(**changes: Any) -> TierSizes:
    values: dict[str, Any] = {
        "resident_layers": 3,
        "slots": 40,
        "key_bytes_per_token": 40,
        "seats": 2,
        "max_tokens": 100,
        "page_size": 16,
        "device": torch.device("cpu"),
        "gpu_memory": PLENTY,
        "host_memory": PLENTY,
    }
    return size_tiers(SHAPE, **values | changes)


def test_what_the_requests_need_by_hand() -> None:
    found = sizes()  # 100 tokens are 7 pages, 40 slots are 3 pages; one null page in each pool
    assert found.device_pages == 1 + 2 * (3 * 7 + 1 * 3)
    assert found.host_pages == 1 + 2 * 7
    assert found.key_pages == 1 + 2 * 7
    assert found.device_bytes == found.device_pages * PAGE + found.key_pages * KEY_PAGE
    assert found.host_bytes == found.host_pages * PAGE


def test_without_offloaded_layers_there_is_no_host_tier_and_without_a_head_no_keys() -> None:
    found = sizes(resident_layers=4, key_bytes_per_token=0, host_memory=1)
    assert (found.device_pages, found.host_bytes) == (1 + 2 * 4 * 7, 0)
    assert found.device_bytes == found.device_pages * PAGE


def test_all_layers_offloaded() -> None:
    found = sizes(resident_layers=0, key_bytes_per_token=0)
    assert (found.device_pages, found.host_pages) == (1 + 2 * 4 * 3, 1 + 2 * 4 * 7)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    resident_layers=st.integers(0, 4),
    slots=st.sampled_from([0, 21, 40, 64]),
    key_bytes_per_token=st.sampled_from([0, 40, 256]),
    seats=st.integers(1, 5),
    max_tokens=st.integers(1, 300),
    page_size=st.sampled_from([1, 16, 64]),
    gpu_memory=st.integers(1, 2_000_000),
    host_memory=st.integers(1, 1_000_000),
)
def test_no_tier_exceeds_its_memory_and_errors_say_what_would_do(**values: Any) -> None:
    try:
        found = sizes(**values)
    except MemoryPlanError as error:
        host = "host tier" in str(error)
        name, flag = ("host_memory", "--host-memory") if host else ("gpu_memory", "--gpu-memory")
        match = re.search(r"has (\d+) bytes and needs at least (\d+)", str(error))
        assert match is not None and flag in str(error)
        allowed, needed = map(int, match.groups())
        assert allowed == values[name] < needed
        other = {"gpu_memory" if host else "host_memory": PLENTY}
        sizes(**values | {name: needed} | other)
        with pytest.raises(MemoryPlanError):
            sizes(**values | {name: needed - 1} | other)
        return
    wanted = sizes(**values | {"gpu_memory": PLENTY, "host_memory": PLENTY})
    assert found.device_bytes <= values["gpu_memory"]
    assert found.host_bytes <= values["host_memory"]
    assert found.device_pages <= wanted.device_pages
    assert found.host_pages <= wanted.host_pages
    assert found.key_pages <= wanted.key_pages


def test_memory_that_is_not_named_is_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 60 * PAGE
    monkeypatch.setattr(tiers, "free_memory", lambda device: free)
    found = sizes(seats=50, slots=0, gpu_memory=None, host_memory=None)
    for used in (found.device_bytes, found.host_bytes):
        assert 0.5 * tiers.SHARE_OF_FREE_MEMORY * free < used <= tiers.SHARE_OF_FREE_MEMORY * free


def test_free_memory_of_the_cpu_is_a_positive_number_of_bytes() -> None:
    assert tiers.free_memory(torch.device("cpu")) > 1 << 20

"""Captured chunks of prompts, where they would take the memory of KV."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from specontext.engine.chunk_graphs import SHARE_OF_KV, without_dear_pieces
from specontext.memory.model import KVCost, MemoryModel

KV = KVCost(layers=4, resident_token=64, common_token=0, layer_slots=256, page_size=4, spare_layers=0, host_fixed=0)


def model(weights: int, graphs: int) -> MemoryModel:
    return MemoryModel("measured", {"weights": weights, "retrieval_head": 0, "runtime": 0, "graphs": graphs}, KV)


@given(st.integers(0, 10**10), st.integers(0, 10**9), st.integers(1, 10**10), st.integers(0, 2 * 10**10))
def test_chunks_are_captured_where_most_of_the_memory_stays_with_kv(weights: int, steps: int, pieces: int, limit: int) -> None:
    plan, captured = without_dear_pieces(model(weights, steps + pieces), pieces, limit)
    left = limit - weights - steps
    assert captured == (pieces <= SHARE_OF_KV * left)
    assert plan == model(weights, steps + pieces if captured else steps)
    assert not captured or plan.fixed_bytes <= limit


def test_a_card_of_8_gib_runs_what_its_plan_says() -> None:
    """Sizes of Qwen3-8B's shape in int4 on an H200 that is capped: with captured chunks it did not start."""
    beside = 6_125_611_008 + 184_565_760 + 1_121_847_680
    plan, captured = without_dear_pieces(model(beside, 1_405_267_072), 1_139_000_000, 8 << 30)
    assert not captured and (8 << 30) - plan.fixed_bytes > 800_000_000

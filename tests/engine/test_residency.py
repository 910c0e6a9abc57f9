"""Which steps prepare a move, and what they ask of the host's memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from specontext import EngineConfig, SpeContextConfig
from specontext.engine.llm_engine import LLMEngine
from specontext.engine.residency import PIN_STEPS, Residency

LENGTH = 400
PAGE = 16


@dataclass
class SlowMemory:
    """Host memory that is pinned only as far as it has been asked for, and says by whom."""

    num_bytes: int
    chunk: int
    ready_bytes: int = 0
    asked: list[int] = field(default_factory=list)

    def reach(self, end: int) -> None:
        assert end <= self.ready_bytes, "a step would have to wait"
        self.asked.append(end)
        self.ready_bytes = min(self.num_bytes, self.ready_bytes + self.chunk)


@pytest.fixture
def residency() -> Any:
    """An adaptive engine: with all layers on the device a request of LENGTH tokens fits, and one of PIN_STEPS more does not."""
    method = SpeContextConfig(budget=64)
    config = EngineConfig("nano", method=method, device="cpu", max_num_seqs=1, max_model_len=4096, gpu_memory=1_200_000)
    engine = LLMEngine(config)
    found = engine.parts.residency
    found.kv.open(0, LENGTH)
    assert found.policy(1).fits(0, LENGTH, 1) and not found.policy(1).fits(0, LENGTH + PIN_STEPS, 1)
    yield found
    engine.close()


def layer_bytes(residency: Residency) -> int:
    kv = residency.kv
    return kv.pages_for(LENGTH) * kv.host.page_bytes


def test_the_next_layers_place_is_pinned_without_waiting(residency: Any) -> None:
    host = residency.kv.host
    host.memory = memory = SlowMemory(host.num_bytes, chunk=2 * host.page_bytes)
    calls = 0
    while not residency.pin_ahead(lambda steps: [LENGTH + steps]):
        calls += 1
    assert calls == len(memory.asked) > 1
    assert layer_bytes(residency) <= memory.ready_bytes < 3 * layer_bytes(residency)


def test_nothing_is_pinned_for_a_layer_that_stays(residency: Any) -> None:
    host = residency.kv.host
    host.memory = memory = SlowMemory(host.num_bytes, chunk=host.page_bytes)
    assert residency.pin_ahead(lambda steps: [LENGTH - PIN_STEPS + steps])
    assert memory.asked == []


def test_a_move_is_wanted_early_enough_to_arrive(residency: Any) -> None:
    most = residency.policy(1).capacity(0, 1)

    def wanted(length: int) -> int:
        return residency.wanted({0: length}, lambda steps: [length + steps])

    residency.chunk_bytes = 10 * residency.kv.host.page_bytes  # so a layer of `most` tokens takes this many steps:
    steps = -(-most // (10 * PAGE))
    assert wanted(most - steps - PAGE) == 0
    assert wanted(most - steps) == 1

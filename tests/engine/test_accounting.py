"""The memory plan says what the engine allocates: every pool, table and weight is in it, to the byte where bytes are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from specontext import LLM
from specontext.errors import MemoryPlanError

MakeLLM = Callable[..., LLM]


def tensors_of(thing: object, seen: set[int]) -> Iterator[Tensor]:
    """All tensors that an object of the engine holds, each memory once."""
    if isinstance(thing, Tensor):
        if thing.untyped_storage().data_ptr() not in seen:
            seen.add(thing.untyped_storage().data_ptr())
            yield thing
    elif isinstance(thing, list | tuple):
        for part in thing:
            yield from tensors_of(part, seen)
    elif type(thing).__module__.startswith("specontext.") and not isinstance(thing, torch.nn.Module):
        yield from tensors_of(list(getattr(thing, "__dict__", {}).values()), seen)


@pytest.mark.parametrize("method", ["speculative", "streaming", "random", "oracle", "full"])
@pytest.mark.parametrize("offload_layers", [None, 0, 2])
def test_every_table_is_in_the_plan(method: str, offload_layers: int | None, make_llm: MakeLLM) -> None:
    options: dict[str, Any] = {"max_num_seqs": 3, "max_model_len": 200, "offload_layers": offload_layers}
    llm = make_llm("llama", method, budget=None if method == "full" else 24, **options)
    parts = llm.engine.parts
    kv, plan = parts.kv, parts.plan
    pools = {kv.arena.rows.untyped_storage().data_ptr(), kv.host.rows.untyped_storage().data_ptr()}
    tables = sum(t.nbytes for t in tensors_of([kv, parts.selector, parts.meter], set(pools)))
    null_page = kv.arena.page_bytes
    planned = plan.fixed["tables"] - null_page
    assert tables <= planned, "a table that the plan does not know"
    if offload_layers != 0:  # else there are no slot tables, which the plan counts all the same
        assert planned <= 1.03 * tables


def test_weights_and_head_are_counted_exactly(make_llm: MakeLLM) -> None:
    llm = make_llm("llama")
    parts, model = llm.engine.parts, llm.engine.loaded.model
    assert parts.plan.fixed["weights"] == sum(p.nbytes for p in model.parameters())
    assert parts.head is not None
    assert parts.plan.fixed["retrieval_head"] == sum(p.nbytes for p in parts.head.parameters())


@pytest.mark.parametrize("gpu_memory", [70_000, 120_000, 400_000])
@pytest.mark.parametrize("method", ["speculative", "full", "streaming"])
def test_pools_stay_within_what_was_allowed(method: str, gpu_memory: int, make_llm: MakeLLM) -> None:
    try:
        llm = make_llm("llama", method, budget=None if method == "full" else 24, gpu_memory=gpu_memory, host_memory=300_000)
    except MemoryPlanError:
        assert gpu_memory == 70_000
        return
    kv, sizes = llm.engine.parts.kv, llm.engine.parts.sizes
    assert kv.arena.rows.nbytes == sizes.device_bytes <= gpu_memory
    assert kv.host.rows.nbytes <= 300_000

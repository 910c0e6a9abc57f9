"""Kernels that are compiled beside each other, before a step launches them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from specontext.core import Choice
from specontext.engine.graphs import DecodeGraphs, sizes
from specontext.kernels import compiling
from specontext.kernels.compiling import Compilers
from specontext.kernels.top_k import top_k_positions

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    "make",
    [
        lambda like: torch.empty(4000, dtype=torch.int64),
        lambda like: torch.empty_like(like),
        lambda like: like.new_empty((50, 80)),
        lambda like: torch.empty_strided((50, 80), (80, 1), dtype=torch.int32),
        lambda like: like.new_empty_strided((50, 80), (1, 50)),
    ],
)
def test_memory_that_nobody_has_written_is_zero(make: Callable[[Tensor], Tensor]) -> None:
    like = torch.full((4000,), 7, dtype=torch.int64)
    with compiling._Zeros():
        for _ in range(3):
            made = make(like)
            assert not made.any()
            made.fill_(1)  # what the next one may be given again
            del made
        assert like.clone().eq(7).all() and torch.ones(3).eq(1).all(), "what is written stays"


def test_launches_of_our_kernels_by_this_thread_compile_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    seen: list[bool] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        seen.append(warmup)

    monkeypatch.setattr(JITFunction, "run", run)
    ours, another = (SimpleNamespace(module=name) for name in ("specontext.kernels.triton.rows", "fla.ops.gated_delta_rule"))

    def launch(kernel: Any) -> None:
        JITFunction.run(kernel, 1, grid=(1,), warmup=False)

    with compiling._nothing_launched():
        launch(ours)
        launch(another)
        other = threading.Thread(target=launch, args=(ours,))  # of another engine
        other.start()
        other.join()
    launch(ours)
    assert seen == [True, False, False, False]
    with pytest.raises(ValueError, match="a step"), compiling._nothing_launched():
        raise ValueError("a step")
    assert JITFunction.run is run


def test_nothing_is_walked_on_a_cpu() -> None:
    with Compilers(torch.device("cpu")) as compilers:
        assert not compilers.walk(lambda: pytest.fail("walked"))


def test_a_walk_meets_all_sizes_and_all_spans() -> None:
    batches = [*DecodeGraphs(seats=5, device=torch.device("cpu")).paddings([24, 300, 4096], Choice("quest", 24))]
    assert {(len(batch.token_ids), batch.span) for batch in batches} == {(size, 4096) for size in sizes(5)} | {(1, 24), (1, 300)}
    assert all(bool((batch.positions < 0).all()) and bool((batch.seats == 5).all()) for batch in batches), "nobody's"
    assert {lane.choice for batch in batches for lane in batch.lanes} == {Choice("quest", 24)}


@GPU
def test_a_walk_launches_nothing_and_what_follows_is_right() -> None:
    device = torch.device("cuda")
    scores = torch.rand((3, 5000), device=device)
    walked: list[Tensor] = []
    with Compilers(device) as compilers:
        compilers.walk(lambda: walked.append(top_k_positions(scores, 77)))
        assert not walked[0].any(), "zeros, which no kernel has filled"
        beside = top_k_positions(scores, 77)
    assert torch.equal(beside, scores.topk(77).indices.sort().values)
    assert torch.equal(top_k_positions(scores, 77), beside)

"""Exact top-k, in Triton and in PyTorch, against a sort: ties, gaps, rows that one program holds, rows of many parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from specontext.kernels import top_k as dispatched
from specontext.kernels.dispatch import reference_of
from specontext.kernels.top_k import choose, top_k_by_rank
from specontext.kernels.triton import top_k as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [torch.float32, torch.float16, torch.bfloat16]
QUICK = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
INF = float("inf")
# Exact in every format; 2 ** -24 is subnormal in float16.
LEVELS = [-INF, -1.0, -0.0, 0.0, 2.0**-24, 0.25, 0.2578125, 0.5, 1.0, 1.5, 3.0, INF]

TopK = Callable[[Tensor, int], Tensor]


def in_parts(scores: Tensor, k: int) -> Tensor:
    """What the kernels do with rows that no program can hold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "HELD", 0)
        return kernels.top_k_positions(scores, k)


# The last is what the reference does on a GPU and, on a CPU, with rows that have ties at the edge.
EACH = pytest.mark.parametrize(
    "top_k",
    [kernels.top_k_positions, in_parts, reference_of(dispatched.top_k_positions), dispatched._with_ties],
    ids=["triton", "parts", "torch", "ties"],
)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts and several steps of each also in short rows."""
    monkeypatch.setattr(kernels, "BLOCK", 128)
    monkeypatch.setattr(kernels, "MOST_PARTS", 4)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are launched from now on."""
    seen: list[str] = []

    class Noting:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(kernels, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            seen.append(self.name)
            return self.kernel[grid]

    for name in ("_held_row", "_count_digits", "_write_positions"):
        monkeypatch.setattr(kernels, name, Noting(name))
    return seen


def sorted_top_k(row: list[float], k: int) -> list[int]:
    ranked = sorted((p for p, score in enumerate(row) if score >= 0), key=lambda p: (row[p], p), reverse=True)
    chosen = sorted(ranked[:k])
    return chosen + [-1] * (k - len(chosen))


def check(top_k: TopK, rows: Tensor, k: int) -> None:
    found = top_k(rows.to(DEVICE), k)
    assert found.dtype == torch.int64 and found.shape == (*rows.shape[:-1], k)
    expected = [sorted_top_k(row, k) for row in rows.flatten(0, -2).tolist()]
    assert found.flatten(0, -2).tolist() == expected


@EACH
@QUICK
@given(
    st.lists(st.lists(st.sampled_from(LEVELS), min_size=9, max_size=9), min_size=1, max_size=3),
    st.integers(1, 12),
    st.sampled_from(FORMATS),
)
def test_ties_gaps_and_short_rows(top_k: TopK, rows: list[list[float]], k: int, dtype: torch.dtype) -> None:
    check(top_k, torch.tensor(rows, dtype=dtype), k)


@EACH
@QUICK
@given(st.integers(1, 700), st.integers(1, 750), st.integers(1, 12), st.integers(0, 2**31))
@example(span=1, k=1, levels=1, seed=0)
@example(span=640, k=640, levels=2, seed=0)
@example(span=513, k=1, levels=1, seed=0)
@pytest.mark.slow
def test_rows_of_several_parts_with_many_ties(top_k: TopK, span: int, k: int, levels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(LEVELS)[torch.randperm(len(LEVELS), generator=generator)[:levels]]
    check(top_k, values[torch.randint(levels, (2, span), generator=generator)], k)


@EACH
@QUICK
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40), st.integers(1, 44))
def test_any_numbers(top_k: TopK, row: list[float], k: int) -> None:
    check(top_k, torch.tensor([row]), k)


@EACH
@pytest.mark.parametrize("value", [-1.0, -0.0, 0.25, INF])
@pytest.mark.parametrize("k", [1, 130, 300, 400])
@pytest.mark.slow
def test_constant_rows_keep_the_last_positions(top_k: TopK, value: float, k: int) -> None:
    check(top_k, torch.full((2, 300), value), k)


@EACH
def test_neighbouring_numbers_are_told_apart(top_k: TopK) -> None:
    bits = 0x3E000000 + torch.randperm(600, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    check(top_k, bits.view(torch.float32).view(2, 300), 77)


@EACH
@pytest.mark.parametrize("shape", [(500,), (2, 3, 260), (2, 0, 5)])
def test_shapes_and_strides(top_k: TopK, shape: tuple[int, ...]) -> None:
    scores = torch.rand(*shape[:-1], shape[-1] * 2, generator=torch.Generator().manual_seed(0))[..., ::2]
    found = top_k(scores.to(DEVICE), 60)
    assert found.shape == (*shape[:-1], 60)
    assert found.flatten().tolist() == [p for row in scores.reshape(-1, shape[-1]).tolist() for p in sorted_top_k(row, 60)]


@pytest.mark.parametrize("block", [256, 1024])
def test_a_long_row(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", block)
    monkeypatch.setattr(kernels, "MOST_PARTS", 256)
    row = torch.rand(5000, generator=torch.Generator().manual_seed(0)).mul(300).floor()[None]  # many ties at the edge
    check(in_parts, row, 257)
    check(kernels.top_k_positions, row, 257)


@pytest.mark.parametrize(("span", "launches"), [(1, 1), (257, 1), (kernels.HELD, 1), (kernels.HELD + 1, 5)])
def test_rows_that_one_program_holds_take_one_launch(span: int, launches: int, launched: list[str]) -> None:
    row = torch.rand(span, generator=torch.Generator().manual_seed(0))[None]
    check(kernels.top_k_positions, row, 20)
    assert len(launched) == launches


@EACH
@pytest.mark.parametrize("k", [1, 4, 5, 6])
def test_as_many_as_there_are_or_one_more_or_less(top_k: TopK, k: int) -> None:
    check(top_k, torch.tensor([[0.0, -1.0, 0.0, 0.0, -0.0, 0.0], [-1.0, INF, INF, 2.0, INF, 2.0], [-1.0] * 6, [1.0] * 6]), k)


def test_the_public_function_chooses_the_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.rand(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE)
    called: list[torch.dtype] = []
    original = kernels.top_k_positions

    def noting(scores: Tensor, k: int) -> Tensor:
        called.append(scores.dtype)
        return original(scores, k)

    monkeypatch.setattr(kernels, "top_k_positions", noting)
    for choice, expected in (("torch", []), ("triton", [torch.float32])):
        monkeypatch.setenv("SPECONTEXT_KERNELS", choice)
        for dtype in (torch.float32, torch.float64):  # the kernel has no room for 64 bits
            check(dispatched.top_k_positions, scores.to(dtype).cpu(), 7)
        assert called == expected


@pytest.mark.parametrize("granularity", ["head", "batch", "union"])
def test_granularities_agree(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.rand(1, 2, 200, generator=torch.Generator().manual_seed(0)).mul(40).floor().sub(4).to(DEVICE)
    found = []
    for choice in ("torch", "triton"):
        monkeypatch.setenv("SPECONTEXT_KERNELS", choice)
        found.append(choose(scores, granularity, 33).cpu())
    assert torch.equal(*found)


@QUICK
@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=1, max_size=9), st.integers(1, 12))
def test_ranks(row: list[float], k: int) -> None:
    ranked = sorted((p for p, score in enumerate(row) if score >= 0), key=lambda p: (row[p], p), reverse=True)[:k]
    expected = [-1.0] * len(row)
    for rank, position in enumerate(ranked):
        expected[position] = k - rank
    ranks = top_k_by_rank(torch.tensor([row], device=DEVICE), k)
    assert ranks.dtype == torch.float32 and ranks.tolist() == [expected]

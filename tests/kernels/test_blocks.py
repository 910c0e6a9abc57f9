"""Blocks of tokens and what is known of them, in Triton and in PyTorch, against what is said of them, block by block."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from specontext.kernels import blocks as dispatched
from specontext.kernels.dispatch import reference_of
from specontext.kernels.top_k import top_k_positions
from specontext.kernels.triton import blocks as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
FORMATS = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # the interpreter does not round to bfloat16
NEAR = {torch.float32: {"rtol": 1e-6, "atol": 1e-6}, torch.float16: {"rtol": 2e-3, "atol": 1e-3}}
NEAR[torch.bfloat16] = {"rtol": 8e-3, "atol": 4e-3}


def both(name: str) -> pytest.MarkDecorator:
    operations = [getattr(kernels, name), reference_of(getattr(dispatched, name))]
    return pytest.mark.parametrize("operation", operations, ids=["triton", "torch"])


@pytest.fixture(autouse=True)
def small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs a row."""
    monkeypatch.setattr(kernels, "PLACES", 8)


def best_blocks(weights: list[float], size: int, first: int, end: int, room: int) -> list[int]:
    """Tokens of one row: whole blocks, the best first, the later of two equal ones first."""
    order = sorted((n for n, weight in enumerate(weights) if weight >= 0), key=lambda n: (weights[n], n), reverse=True)
    taken: list[int] = []
    for block in order:
        tokens = range(first + block * size, min(first + (block + 1) * size, end))
        if len(taken) + len(tokens) > room:
            break
        taken += tokens
    return sorted(taken)


@both("tokens_of_blocks")
@QUICK
@given(
    sizes=st.tuples(st.integers(1, 16), st.integers(0, 5), st.integers(1, 60)),
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=3),
    groups=st.integers(1, 2),
    ties=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_whole_blocks(
    operation: Callable[..., Tensor],
    sizes: tuple[int, int, int],
    lengths: list[int],
    groups: int,
    ties: bool,
    seed: int,
) -> None:
    size, first, room = sizes
    ends = [first + length for length in lengths]
    most = max(1, -(-max(lengths) // size))
    weights = torch.rand(len(ends), groups, most, generator=torch.Generator().manual_seed(seed))
    weights = (weights * 3).round() / 3 if ties else weights
    weights[0, 0, 0] = torch.inf
    for row, length in enumerate(lengths):
        weights[row, :, -(-length // size) :] = -1.0
    blocks = top_k_positions(weights, room // size + 1)
    found = operation(blocks.to(DEVICE), weights.to(DEVICE), size, first, torch.tensor(ends, device=DEVICE), room)
    assert found.dtype == torch.int64 and found.shape == (len(ends), groups, room)
    for row, end in enumerate(ends):
        for group in range(groups):
            tokens = best_blocks(weights[row, group].tolist(), size, first, end, room)
            assert found[row, group].tolist() == tokens + [-1] * (room - len(tokens))


@both("follow_bounds")
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_bounds_are_those_of_all_keys_of_a_block(operation: Callable[..., None], dtype: torch.dtype) -> None:
    heads, dim, size, first, steps = 2, 12, 4, 3, 13
    keys = torch.randn(3, steps, heads, dim, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    bounds = torch.full((4 + 1, heads, 5, 2, dim), 7.0, dtype=dtype, device=DEVICE)  # of an earlier request
    seats, at = torch.tensor([2, 0, 3], device=DEVICE), torch.tensor([0, 2, -20], device=DEVICE)  # the last one is padding
    for step in range(steps):
        operation(bounds, keys[:, step], at + step, seats, size, first)
    for row, seat in enumerate((2, 0)):
        seen = keys[row, max(0, first - int(at[row])) :]
        for block in range(-(-len(seen) // size)):
            part = seen[block * size : (block + 1) * size]
            assert torch.equal(bounds[seat, :, block, 0], part.amax(0)) and torch.equal(bounds[seat, :, block, 1], part.amin(0))
    assert (bounds[[1, 3]] == 7.0).all(), "seats of others"


@both("follow_means")
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_means_are_those_of_all_keys_of_a_block(operation: Callable[..., None], dtype: torch.dtype) -> None:
    heads, dim, size, first, steps = 2, 12, 4, 3, 13
    keys = torch.randn(3, steps, heads, dim, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    means = torch.full((4 + 1, heads, 5, dim), 7.0, dtype=dtype, device=DEVICE)
    sums = torch.full((4 + 1, heads, dim), 7.0, device=DEVICE)
    seats, at = torch.tensor([2, 0, 3], device=DEVICE), torch.tensor([0, 2, -20], device=DEVICE)
    for step in range(steps):
        operation(means, sums, keys[:, step], at + step, seats, size, first)
    for row, seat in enumerate((2, 0)):
        seen = keys[row, max(0, first - int(at[row])) :].double()
        for block in range(-(-len(seen) // size)):
            expected = seen[block * size : (block + 1) * size].mean(0)
            torch.testing.assert_close(means[seat, :, block].double(), expected, **NEAR[dtype])
    assert (means[[1, 3]] == 7.0).all() and (sums[[1, 3]] == 7.0).all(), "seats of others"


def test_both_follow_alike() -> None:
    """Not only nearly: what is chosen by them must not depend on who computed them."""
    heads, dim = 3, 20
    keys = torch.randn(2, 40, heads, dim, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.float16)
    seats, at = torch.tensor([0, 1], device=DEVICE), torch.tensor([1, 6], device=DEVICE)
    tables = []
    for follow in (kernels.follow_means, reference_of(dispatched.follow_means)):
        means = torch.zeros(3, heads, 8, dim, dtype=torch.float16, device=DEVICE)
        sums = torch.zeros(3, heads, dim, device=DEVICE)
        for step in range(40):
            follow(means, sums, keys[:, step], at + step, seats, 8, 2)
        tables.append((means[:2], sums[:2]))
    assert all(torch.equal(*pair) for pair in zip(*tables, strict=True))

"""One set for each group, or one for all: unions that fit, the best by any group, ties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specontext.kernels.top_k import choose, groups_of


def plain_union(scores: list[list[float]], k: int) -> set[int]:
    """The best k' of every group with the greatest k' whose union fits, then tokens of the next rank, the later first."""
    span = len(scores[0])
    ranked = [sorted((t for t in range(span) if row[t] >= 0), key=lambda t, row=row: (-row[t], -t))[:k] for row in scores]
    share = max(n for n in range(k + 1) if len(set().union(*(set(r[:n]) for r in ranked))) <= k)
    union = set().union(*(set(r[:share]) for r in ranked))
    following = sorted({r[share] for r in ranked if len(r) > share} - union, reverse=True)
    return union | set(following[: k - len(union)])


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 9), st.integers(0, 2**31), st.booleans())
def test_union_is_the_shrunk_sets_of_all_groups(groups: int, span: int, k: int, seed: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(groups, span, generator=generator)
    if ties:
        scores = (scores * 3).round()
    absent = torch.rand(span, generator=generator) < 0.2
    scores[:, absent] = -1.0
    chosen = choose(scores, "union", k)
    assert chosen.shape == (1, k)
    found = [t for t in chosen[0].tolist() if t >= 0]
    assert found == sorted(set(found)) and not set(found) & set(absent.nonzero().flatten().tolist())
    expected = plain_union(scores.tolist(), k)
    assert set(found) == expected


def test_batch_takes_the_best_score_of_any_group_and_head_one_set_each() -> None:
    scores = torch.tensor([[[0.9, 0.1, 0.5, 0.3], [0.0, 0.8, 0.4, 0.6]]])
    assert choose(scores, "batch", 2).tolist() == [[[0, 1]]]
    assert choose(scores, "head", 2).tolist() == [[[0, 2], [1, 3]]]
    assert choose(scores, "union", 2).tolist() == [[[0, 1]]]
    assert choose(scores, "union", 3).tolist() == [[[0, 1, 3]]]  # one each, then the later of the second bests


@pytest.mark.parametrize(("granularity", "expected"), [("head", 5), ("union", 1), ("batch", 1)])
def test_number_of_sets(granularity: str, expected: int) -> None:
    scores: Tensor = torch.rand(2, 5, 9)
    assert groups_of(granularity, 5) == choose(scores, granularity, 3).shape[1] == expected


def test_with_one_group_all_levels_are_the_same() -> None:
    scores = torch.rand(3, 1, 40)
    assert torch.equal(choose(scores, "head", 7), choose(scores, "union", 7))
    assert torch.equal(choose(scores, "head", 7), choose(scores, "batch", 7))

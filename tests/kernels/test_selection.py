"""Kernels of selection and loading: scores, top-k, rows and slots, each against a plain Python reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from specontext.kernels.retrieval_scores import group_weights, paged_retrieval_scores
from specontext.kernels.rows import gather_rows
from specontext.kernels.slot_plan import plan_slots
from specontext.kernels.top_k import top_k_positions

QUICK = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
FORMATS = [torch.float32, torch.float16, torch.bfloat16]


# Scores ---------------------------------------------------------------------------------------------------------------


def naive_scores(query: Tensor, keys: Tensor, start: int, stops: list[int]) -> Tensor:
    requests, heads, dim = query.shape
    span, groups = keys.shape[1:3]
    scores = torch.full((requests, groups, span), -1.0, dtype=torch.float64)
    for r in range(requests):
        for head in range(heads):
            group = head * groups // heads
            seen = keys[r, start : stops[r], group].double()
            weights = torch.softmax(seen @ query[r, head].double() / dim**0.5, 0)
            scores[r, group, start : stops[r]] = torch.maximum(scores[r, group, start : stops[r]], weights)
    return scores


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(("groups", "ratio", "span", "dim"), [(1, 1, 1, 64), (2, 3, 41, 80), (1, 16, 100, 96), (3, 2, 17, 128)])
def test_retrieval_scores(groups: int, ratio: int, span: int, dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, groups * ratio, dim, generator=generator).to(dtype)
    keys = torch.randn(3, span, groups, dim, generator=generator).to(dtype)
    stops = [span, max(span // 2, 1), 0]  # the last request has no candidate
    start = min(2, span - 1)
    table = torch.arange(3 * span).view(3, span)  # pages of one token
    scores = paged_retrieval_scores(query, keys.reshape(-1, 1, groups, dim), table, start, torch.tensor(stops), span)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), naive_scores(query, keys, start, stops), rtol=1e-4, atol=1e-6)
    assert (scores[2] == -1).all()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_a_request_gets_the_same_scores_alone_and_among_others(page_size: int, dtype: torch.dtype) -> None:
    """Bit for bit, and whatever the span; the keys lie in pages in any order."""
    generator = torch.Generator().manual_seed(0)
    count = -(-900 // page_size)
    table = torch.randperm(4 * count, generator=generator).view(4, count)
    query = torch.randn(4, 6, 64, generator=generator).to(dtype)
    keys = torch.randn(4 * count, page_size, 3, 64, generator=generator).to(dtype)
    stops = [900, 5, 301, 0]
    together = paged_retrieval_scores(query, keys, table, 2, torch.tensor(stops), 900)
    gathered = keys[table].flatten(1, 2)[:, :900]
    torch.testing.assert_close(together.double(), naive_scores(query, gathered, 2, stops), rtol=1e-4, atol=1e-6)
    for r, stop in enumerate(stops):
        for span in {max(stop, 1), 900}:
            alone = paged_retrieval_scores(query[r : r + 1], keys, table[r : r + 1], 2, torch.tensor([stop]), span)
            assert torch.equal(alone[0], together[r, :, :span])


def test_weights_are_normalised_over_the_candidates_alone() -> None:
    logits = torch.randn(2, 3, 1, 20, generator=torch.Generator().manual_seed(0))
    logits[..., :4] = 50.0  # sinks that would take all mass
    weights = group_weights(logits, 4, torch.tensor([20, 9]))
    for r, stop in enumerate((20, 9)):
        torch.testing.assert_close(weights[r, :, 4:stop].sum(-1), torch.ones(3))
        assert (weights[r, :, :4] == -1).all() and (weights[r, :, stop:] == -1).all()


# Top-k ----------------------------------------------------------------------------------------------------------------


def naive_top_k(row: list[float], k: int) -> list[int]:
    ranked = sorted((p for p, score in enumerate(row) if score >= 0), key=lambda p: (row[p], p), reverse=True)
    chosen = sorted(ranked[:k])
    return chosen + [-1] * (k - len(chosen))


@QUICK
@given(st.data(), st.integers(1, 12), st.sampled_from(FORMATS))
def test_top_k_is_exact_with_ties_gaps_and_short_rows(data: st.DataObject, k: int, dtype: torch.dtype) -> None:
    span = data.draw(st.integers(1, 10))
    score = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0])
    rows = data.draw(st.lists(st.lists(score, min_size=span, max_size=span), min_size=1, max_size=4))
    chosen = top_k_positions(torch.tensor(rows, dtype=dtype)[None], k)
    assert chosen.dtype == torch.int64 and chosen.shape == (1, len(rows), k)
    assert chosen[0].tolist() == [naive_top_k(row, k) for row in rows]


def test_top_k_of_a_long_row() -> None:
    row = torch.rand(5000, generator=torch.Generator().manual_seed(0)).mul(300).floor()  # many ties at the edge
    assert top_k_positions(row, 257).tolist() == naive_top_k(row.tolist(), 257)


def test_equal_scores_are_won_by_the_later_position() -> None:
    assert top_k_positions(torch.tensor([0.5, 0.5, 0.9, 0.5, 0.1]), 2).tolist() == [2, 3]


# Rows -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_gather_copies_the_named_rows_and_nothing_else(dtype: torch.dtype) -> None:
    source = torch.arange(2.0 * 7 * 3).view(7, 2, 3).to(dtype)
    target = torch.full((5, 2, 3), -9.0, dtype=dtype)
    gather_rows(source, torch.tensor([[6, -1], [0, 3]]), target, torch.tensor([[4, 2], [1, 0]]))
    expected = torch.full_like(target, -9.0)
    expected[4], expected[1], expected[0] = source[6], source[0], source[3]
    assert torch.equal(target, expected)


def test_gather_of_nothing_changes_nothing() -> None:
    target = torch.ones(2, 2, 3)
    gather_rows(torch.zeros(4, 2, 3), torch.tensor([-1, -1]), target, torch.tensor([0, 1]))
    assert torch.equal(target, torch.ones(2, 2, 3))
    empty = torch.empty(0, dtype=torch.int64)
    gather_rows(torch.zeros(4, 1, 36, dtype=torch.int8), empty, torch.empty(0, 1, 36, dtype=torch.int8), empty)


# Slots ----------------------------------------------------------------------------------------------------------------


class LRU:
    """The slots of one (seat, group): what each holds and when it was last read."""

    def __init__(self, slots: int) -> None:
        self.token: list[int | None] = [None] * slots
        self.used = [0] * slots

    def read(self, tokens: list[int], step: int) -> tuple[list[int], list[bool]]:
        missing = [t not in self.token for t in tokens]
        hits = {self.token.index(t) for t, absent in zip(tokens, missing, strict=True) if not absent}
        victims = iter(sorted(set(range(len(self.token))) - hits, key=lambda slot: (self.used[slot], slot)))
        slots = [next(victims) if absent else self.token.index(t) for t, absent in zip(tokens, missing, strict=True)]
        for token, slot in zip(tokens, slots, strict=True):
            self.token[slot], self.used[slot] = token, step
        return slots, missing


@QUICK
@given(st.data(), st.integers(1, 6), st.integers(0, 3), st.integers(1, 3))
def test_slots_are_a_least_recently_used_cache(data: st.DataObject, width: int, spare: int, groups: int) -> None:
    seats, span, slots = 3, 12, width + spare
    caches = [[LRU(slots) for _ in range(groups)] for _ in range(seats)]
    slot_of_token = torch.full((seats, groups, span), -1, dtype=torch.int32)
    token_of_slot = torch.full((seats, groups, slots), -1, dtype=torch.int32)
    last_used = torch.zeros((seats, groups, slots), dtype=torch.int32)
    for step in range(1, data.draw(st.integers(1, 8)) + 1):
        chosen = data.draw(st.lists(st.integers(0, seats - 1), min_size=1, max_size=seats, unique=True))
        entry = st.integers(0, span - 1) | st.just(-1)
        padded = st.lists(entry, min_size=width, max_size=width, unique_by=lambda t: t if t >= 0 else object())
        tokens = [[data.draw(padded) for _ in range(groups)] for _ in chosen]
        planned, missing = plan_slots(torch.tensor(tokens), torch.tensor(chosen), slot_of_token, token_of_slot, last_used, step)
        for r, seat in enumerate(chosen):
            for g in range(groups):
                wanted = [t for t in tokens[r][g] if t >= 0]
                expected_slots, expected_missing = caches[seat][g].read(wanted, step)
                real = torch.tensor(tokens[r][g]) >= 0
                assert planned[r, g][real].tolist() == expected_slots and (planned[r, g][~real] == -1).all()
                assert missing[r, g][real].tolist() == expected_missing and not missing[r, g][~real].any()
        for seat in range(seats):
            for g in range(groups):
                held = [-1 if t is None else t for t in caches[seat][g].token]
                assert token_of_slot[seat, g].tolist() == held
                assert slot_of_token[seat, g].tolist() == [held.index(t) if t in held else -1 for t in range(span)]

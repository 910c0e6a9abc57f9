"""Budget: sinks, scored tokens and recent tokens never overlap, never exceed the budget, and fit any length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specontext.kernels.top_k import top_k_positions
from specontext.model_shape import ModelShape
from specontext.retrieval.methods import make_selectors
from specontext.retrieval.methods.oracle import OracleSelector
from specontext.retrieval.methods.random import RandomSelector
from specontext.retrieval.methods.streaming import StreamingSelector
from specontext.retrieval.selector import AheadSelector, Budget, LaneTokens, LayerSelector, LayerView, MethodContext

QUICK = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
SHAPE = ModelShape(
    layers=2, hidden_size=8, query_heads=4, kv_heads=2, head_dim=4, vocab_size=9, max_position=64, dtype=torch.float32
)


def select_from_random_scores(budget: Budget, lengths: list[int], groups: int) -> tuple[list[list[list[int]]], torch.Tensor]:
    ends = budget.candidates_end(torch.tensor(lengths))
    scores = torch.rand(len(lengths), groups, max(lengths), generator=torch.Generator().manual_seed(0))
    position = torch.arange(max(lengths))
    scores.masked_fill_((position < budget.sink) | (position >= ends[:, None, None]), -1.0)
    selection = budget.compose(top_k_positions(scores, budget.scored), torch.tensor(lengths))
    assert selection.tokens.shape == (len(lengths), groups, budget.total)
    assert not selection.scored[selection.tokens < 0].any()
    kept = [[[t for t in row.tolist() if t >= 0] for row in request] for request in selection.tokens]
    return kept, torch.where(selection.scored, selection.tokens, -1)


@QUICK
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)),
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.integers(1, 3),
)
def test_a_selection_is_sinks_then_scored_then_recent_and_no_token_twice(
    sizes: tuple[int, int, int], lengths: list[int], groups: int
) -> None:
    sink, recent, scored = sizes
    kept, chosen = select_from_random_scores(Budget(sum(sizes), sink, recent), lengths, groups)
    for r, length in enumerate(lengths):
        always = set(range(min(sink, length))) | set(range(max(length - recent, 0), length))
        for g in range(groups):
            assert kept[r][g] == sorted(set(kept[r][g])), "ascending, and nothing twice"
            assert len(kept[r][g]) == min(length, sum(sizes)), "as much as the budget allows"
            assert always <= set(kept[r][g]) <= set(range(length))
            assert {t for t in chosen[r, g].tolist() if t >= 0} == set(kept[r][g]) - always
            assert len(set(kept[r][g]) - always) <= scored


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (1, [0]),  # shorter than the sinks
        (3, [0, 1, 2]),
        (5, [0, 1, 2, 3, 4]),  # shorter than sinks and recent tokens
        (7, list(range(7))),
        (8, list(range(8))),  # the first candidate
        (10, list(range(10))),  # exactly the budget
    ],
)
def test_a_context_within_the_budget_is_read_whole(length: int, expected: list[int]) -> None:
    assert select_from_random_scores(Budget(10, 3, 4), [length], 1)[0] == [[expected]]


def test_one_token_beyond_the_budget_drops_exactly_one_candidate() -> None:
    ((tokens,),), _ = select_from_random_scores(Budget(10, 3, 4), [11], 1)
    (dropped,) = set(range(11)) - set(tokens)
    assert 3 <= dropped < 7


def context(budget: Budget, granularity: str = "head") -> MethodContext:
    return MethodContext(SHAPE, budget, granularity, seats=4, max_tokens=400, device=torch.device("cpu"))


class Shown(LayerView):
    """A layer with these logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        self._logits = logits

    def logits(self) -> torch.Tensor:
        return self._logits


def decode_tokens(lengths: list[int]) -> LaneTokens:
    count = torch.arange(len(lengths))
    return LaneTokens(count, count, torch.tensor(lengths) - 1, torch.tensor(lengths), 5 + count, max(lengths))


def choose(selector: AheadSelector | LayerSelector, lengths: list[int]) -> torch.Tensor:
    step = decode_tokens(lengths)
    if not isinstance(selector, LayerSelector):
        return selector.select(step).tokens
    logits = torch.full((len(lengths), SHAPE.query_heads, max(lengths)), -torch.inf)
    for r, length in enumerate(lengths):
        logits[r, :, :length] = torch.randn(SHAPE.query_heads, length, generator=torch.Generator().manual_seed(r))
    return selector.select_in_layer(0, step, Shown(logits)).tokens


@pytest.mark.parametrize("granularity", ["head", "union", "batch"])
@pytest.mark.parametrize("method", [RandomSelector, OracleSelector])
def test_batch_granularity_gives_one_set_for_all_heads(method: type, granularity: str) -> None:
    selector = method(context(Budget(8, 1, 2), granularity))
    groups = 2 if granularity == "head" else 1
    assert choose(selector, [30, 12]).shape == (2, groups, 8)
    assert selector.head_map.tolist() == [[0, groups - 1]] * 2


@pytest.mark.parametrize("method", ["random", "oracle", "streaming"])
def test_a_request_s_set_does_not_depend_on_its_company(method: str) -> None:
    selector = make_selectors([method], context(Budget(8, 1, 2)))[method]
    together = choose(selector, [20, 35])
    assert torch.equal(together[:1], choose(selector, [20]))


def test_random_sets_change_with_step_seed_and_group_and_are_spread_evenly() -> None:
    selector = RandomSelector(context(Budget(13, 1, 2)))
    base = choose(selector, [40, 40])
    assert not torch.equal(base[0], base[1]) and not torch.equal(base[0, 0], base[0, 1])
    counts = torch.zeros(400)
    for length in range(200, 400):
        counts += torch.bincount(choose(selector, [length])[:, :, 1:-2].flatten(), minlength=400)
    share = counts[1:190].sum() / counts.sum()  # of the first 190 of 200 to 400 candidates
    assert 0.60 < share < 0.70


def test_streaming_keeps_the_first_and_the_last() -> None:
    tokens = choose(StreamingSelector(context(Budget(8, 2, 3))), [30, 9, 6])
    assert tokens[0, 0].tolist() == [0, 1, 24, 25, 26, 27, 28, 29]
    assert sorted(t for t in tokens[1, 0].tolist() if t >= 0) == [0, 1, 3, 4, 5, 6, 7, 8]
    assert sorted(t for t in tokens[2, 0].tolist() if t >= 0) == [0, 1, 2, 3, 4, 5]


def test_oracle_takes_the_heaviest_entries_of_any_head_of_the_group() -> None:
    selector = OracleSelector(context(Budget(5, 1, 2)))
    logits = torch.zeros(1, 4, 20)
    for head, token in enumerate((4, 9, 11, 15)):
        logits[0, head, token] = 5.0
    tokens = selector.select_in_layer(0, decode_tokens([20]), Shown(logits)).tokens
    assert tokens[0].tolist() == [[0, 4, 9, 18, 19], [0, 11, 15, 18, 19]]

"""Methods that select inside a layer: they choose what the papers say, in the budget, whatever the batch, chunks and seats."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specontext.core import Segment
from specontext.errors import ConfigError
from specontext.retrieval.clustering import cosine_clusters
from specontext.retrieval.methods.clusterkv import ClusterKVSelector
from specontext.retrieval.methods.h2o import H2OSelector
from specontext.retrieval.methods.quest import PAGE, QuestSelector
from specontext.retrieval.methods.shadowkv import ShadowKVSelector
from specontext.retrieval.methods.snapkv import SnapKVSelector
from specontext.retrieval.selector import Budget, LaneTokens
from specontext.retrieval.stateful import StatefulSelector
from tests.retrieval.method_cases import KV_HEADS, LAYERS, SCALE, SHAPE, Talk, View, context, decode, prefill, run, sets_of
from tests.retrieval.method_references import reference

QUICK = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
METHODS: dict[str, type[StatefulSelector]] = {
    "h2o": H2OSelector,
    "snapkv": SnapKVSelector,
    "quest": QuestSelector,
    "shadowkv": ShadowKVSelector,
    "clusterkv": ClusterKVSelector,
}
PROMPT_ONLY = ("snapkv-prompt", "quest-prompt", "shadowkv-prompt", "clusterkv-prompt")
ALL = (*METHODS, *PROMPT_ONLY)


def make(name: str, budget: Budget, *, seats: int = 4, max_tokens: int = 400) -> StatefulSelector:
    selector = METHODS[name.partition("-")[0]](context(budget, seats=seats, max_tokens=max_tokens))
    if "-" not in name:
        return selector
    variant = selector.variant("prompt")
    assert isinstance(variant, StatefulSelector) and variant.keep_generated and not selector.keep_generated
    return variant


# Against float64 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("prompt", "steps", "budget"),
    [
        (203, 70, Budget(64, 4, 16)),  # neither pages nor chunks end where the prompt does
        (150, 24, Budget(90, 3, 5)),  # a recent window smaller than pages and chunks
        (100, 20, Budget(21, 4, 16)),  # one entry is chosen, and no page fits
        (30, 40, Budget(64, 4, 16)),  # the budget holds the prompt and then no longer
        (2, 40, Budget(32, 4, 8)),  # sinks are generated tokens
    ],
)
def test_a_method_chooses_as_in_float64(name: str, prompt: int, steps: int, budget: Budget) -> None:
    talk = Talk.random(prompt, steps, seed=prompt)
    assert run(make(name, budget), talk, steps) == reference(name, talk, budget, range(steps))


@pytest.mark.parametrize("name", ["clusterkv", "clusterkv-prompt"])
def test_clusters_of_generated_tokens_are_made_when_their_window_is_full(name: str) -> None:
    talk, budget = Talk.random(90, 326, seed=1), Budget(120, 4, 16)
    read = run(make(name, budget, max_tokens=416), talk, 326)
    for steps in (range(1), range(317, 326)):
        assert [read[step] for step in steps] == reference(name, talk, budget, steps)


@QUICK
@given(
    name=st.sampled_from(ALL),
    prompt=st.integers(1, 90),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 20), st.integers(1, 70)),
    seed=st.integers(0, 1000),
)
def test_any_budget_and_prompt(name: str, prompt: int, sizes: tuple[int, int, int], seed: int) -> None:
    talk, budget = Talk.random(prompt, 12, seed), Budget(sum(sizes), sizes[0], sizes[1])
    assert run(make(name, budget), talk, 12) == reference(name, talk, budget, range(12))


def test_no_logit_in_a_page_exceeds_its_bound() -> None:
    budget = Budget(64, 4, 16)
    selector, talks = make("quest", budget), [Talk.random(75, 40, seed=2), Talk.random(120, 40, seed=3)]
    for seat, talk in enumerate(talks):
        prefill(selector, seat, talk)
    for step in range(40):
        decode(selector, [0, 1], talks, step)
        positions = torch.tensor([talk.prompt + step for talk in talks])
        for layer in range(LAYERS):
            view = View(talks, positions.tolist(), layer)
            logits = view.logits()[..., budget.sink :].unflatten(1, (KV_HEADS, -1))
            pages = torch.nn.functional.pad(logits, (0, -logits.shape[-1] % PAGE), value=-torch.inf)
            greatest = pages.unflatten(-1, (-1, PAGE)).amax(-1)
            high, low = selector.tables["bounds"][layer, [0, 1], :, None, : greatest.shape[-1]].unbind(-2)
            query = view.query.unflatten(1, (KV_HEADS, -1))[:, :, :, None] * SCALE
            bounds = torch.maximum(query * high, query * low).sum(-1)
            there = greatest > -torch.inf
            assert there.sum() > 50 and (bounds[there] >= greatest[there] - 1e-5).all()
            assert (bounds[there] - greatest[there]).mean() > 0.1, "a bound, not the logits themselves"


def test_clusters_hold_keys_that_point_the_same_way() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(6)[:4].repeat_interleave(25, dim=0)
    directions = centres + 0.1 * torch.randn(2, 100, 6, generator=generator)
    keys = directions * (0.2 + torch.rand(2, 100, 1, generator=generator))  # the length of a key plays no part
    means, numbers = cosine_clusters(keys, 4)
    assert torch.equal(numbers, torch.arange(4).repeat_interleave(25).expand(2, -1))
    assert torch.allclose(means, keys.unflatten(1, (4, 25)).mean(2))


# The budget -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_selection_keeps_to_the_budget(name: str) -> None:
    budget = Budget(50, 4, 8)
    talks = [Talk.random(prompt, 45, seed=prompt) for prompt in (130, 41, 77)]
    selector = make(name, budget)
    for seat, talk in enumerate(talks):
        prefill(selector, seat, talk)
    for step in range(45):
        selections = decode(selector, [0, 1, 2], talks, step)
        for row, talk in enumerate(talks):
            length = talk.prompt + step + 1
            generated = set(range(talk.prompt, length)) if selector.keep_generated else set()
            for layer, heads in enumerate(sets_of(selections, row)):
                for head, tokens in enumerate(heads):
                    assert tokens == sorted(set(tokens)), "ascending, and nothing twice"
                    assert set(range(4)) | set(range(length - 8, length)) | generated <= set(tokens) <= set(range(length))
                    assert len(set(tokens) - generated) <= budget.total
                    scored = selections[layer].tokens[row, head][selections[layer].scored[row, head]].tolist()
                    assert len(scored) <= budget.scored and set(scored) <= set(range(4, length - 8)) - generated
                    assert scored, "something is chosen"


@pytest.mark.parametrize("name", ALL)
def test_everything_is_read_while_it_fits(name: str) -> None:
    budget, talk = Budget(75, 4, 16), Talk.random(40, 35, seed=4)
    for step, layers in enumerate(run(make(name, budget), talk, 35)):
        assert all(tokens == list(range(41 + step)) for heads in layers for tokens in heads)


@pytest.mark.parametrize("name", ["h2o", "snapkv", "snapkv-prompt"])
def test_what_was_dropped_does_not_come_back(name: str) -> None:
    talk = Talk.random(120, 100, seed=5)
    read = run(make(name, Budget(48, 4, 8)), talk, 100)
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            seen = [set(step[layer][head]) for step in read]
            for step in range(1, 100):
                assert seen[step] <= seen[step - 1] | {talk.prompt + step}


def test_budgets_share_the_state_and_each_keeps_to_its_own() -> None:
    talk, small, large = Talk.random(150, 30, seed=6), Budget(40, 4, 16), Budget(90, 4, 16)
    for name in ("quest", "shadowkv", "clusterkv"):
        selector = make(name, large)
        other = selector.with_budget(small)
        prefill(selector, 1, talk)
        read = [sets_of(decode(other, [1], [talk], step), 0) for step in range(30)]
        assert read == run(make(name, small), talk, 30)


# Batches, chunks and seats --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_batch_mates_make_no_difference(name: str) -> None:
    budget = Budget(48, 4, 8)
    talks = [Talk.random(prompt, 40, seed=prompt) for prompt in (61, 140, 17)]
    selector, seats = make(name, budget), [2, 0, 3]
    for seat, talk in zip(seats, talks, strict=True):
        prefill(selector, seat, talk)
    together = [decode(selector, seats, talks, step) for step in range(40)]
    for row, talk in enumerate(talks):
        assert [sets_of(selections, row) for selections in together] == run(make(name, budget), talk, 40)


@pytest.mark.parametrize("name", ALL)
def test_requests_come_and_go(name: str) -> None:
    """One begins to decode while another is in the middle, and takes a seat that a third has left."""
    budget = Budget(48, 4, 8)
    first, second = Talk.random(90, 30, seed=7), Talk.random(70, 20, seed=8)
    selector = make(name, budget, seats=2)
    run(selector, Talk.random(180, 20, seed=9), 20, seat=1)
    selector.close(1)
    early = run(selector, first, 10)
    prefill(selector, 1, second)
    late = []
    for step in range(20):  # the talks stand at different steps, so the first one is shown as if its prompt were longer
        rest = Talk(first.keys, first.queries, first.prompt + 10)
        late.append(decode(selector, [0, 1], [rest, second], step))
    assert early + [sets_of(one, 0) for one in late] == run(make(name, budget), first, 30)
    assert [sets_of(one, 1) for one in late] == run(make(name, budget), second, 20)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("chunk", [7, 64])
def test_the_chunks_of_a_prompt_make_no_difference(name: str, chunk: int) -> None:
    talk, budget = Talk.random(133, 10, seed=10), Budget(60, 4, 8)
    assert run(make(name, budget), talk, 10, chunk=chunk) == run(make(name, budget), talk, 10)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("before", [0, 21])
def test_a_request_goes_on_in_another_seat(name: str, before: int) -> None:
    talk, budget, steps = Talk.random(101, 36, seed=11), Budget(48, 4, 8), 36
    selector = make(name, budget, seats=3)
    read = run(selector, talk, before)
    state = selector.save(0, talk.prompt + before)
    selector.close(0)
    for seat in (0, 2):  # its old seat and the next one are used by others
        run(selector, Talk.random(150, 5, seed=12 + seat), 5, seat=seat)
    selector.close(2)
    selector.open(2, talk.prompt + before)
    selector.restore(2, talk.prompt + before, state)
    read += [sets_of(decode(selector, [2], [talk], step), 0) for step in range(before, steps)]
    assert read == run(make(name, budget), talk, steps)


def test_half_a_prompt_can_wait() -> None:
    """Methods that watch prompts keep what they have seen of one."""
    talk, budget = Talk.random(90, 5, seed=13), Budget(40, 4, 8)
    for name in ("h2o", "snapkv"):
        selector = make(name, budget)
        half = Talk(talk.keys, talk.queries, 50)
        prefill(selector, 0, half)
        state = selector.save(0, 50)
        selector.close(0)
        selector.open(1, 50)
        selector.restore(1, 50, state)
        for layer in range(LAYERS):
            keys = talk.keys[layer, :90]
            selector.observe_chunk(layer, Segment(1, 50, 40, 0), talk.queries[layer, 50:90], SCALE, lambda keys=keys: keys)
        read = [sets_of(decode(selector, [1], [talk], step), 0) for step in range(5)]
        assert read == run(make(name, budget), talk, 5)


# Accounts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_state_takes_the_memory_that_was_announced(name: str) -> None:
    where = context(Budget(64, 4, 16), seats=5, max_tokens=333)
    selector = METHODS[name](where)
    held = [*selector.tables.values(), selector.prompts]
    assert METHODS[name].state_bytes(where) == sum(tensor.nbytes for tensor in held)


def test_bytes_of_choosing() -> None:
    """Four requests with 0, 1, 100 and 1,600 candidates, of which 1, 2, 101 and 701 tokens were generated."""
    lengths, prompts = torch.tensor([20, 21, 120, 1620]), torch.tensor([19, 19, 19, 919])
    none = torch.zeros(4, dtype=torch.int64)
    step = LaneTokens(none, torch.arange(4), lengths - 1, lengths, none, 1620)
    heads, vector = LAYERS * KV_HEADS, SHAPE.head_dim * 4

    def counted(name: str, budget: int = 64) -> list[float]:
        selector = make(name, Budget(budget, 4, 16))
        selector.prompts[:4] = prompts
        return [size / heads for size in selector.selection_bytes(step).tolist()]

    assert counted("quest") == [2 * vector * pages for pages in (0, 1, 7, 100)]
    assert counted("quest-prompt") == [2 * vector * pages for pages in (0, 1, 1, 58)]
    assert counted("shadowkv") == [vector * chunks for chunks in (0, 1, 13, 200)]  # 5 chunks fit: no outlier
    assert counted("shadowkv", 20 + 152)[2] == (vector + 1) * 13  # 3 outliers: ranks are read
    assert counted("shadowkv-prompt") == [vector * chunks for chunks in (0, 1, 2, 115)]
    assert counted("clusterkv") == [vector * c + 2 * t for c, t in ((2, 0), (3, 1), (102, 100), (12 + 8 + 61, 1600))]
    assert counted("clusterkv-prompt") == [vector * c + 2 * t for c, t in ((1, 0), (1, 1), (1, 15), (12, 915))]


@pytest.mark.parametrize("name", METHODS)
def test_one_set_for_all_heads_is_refused_with_words(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"method {name} .*granularity 'batch'.*'head'"):
        METHODS[name](context(Budget(64, 4, 16), granularity="batch"))

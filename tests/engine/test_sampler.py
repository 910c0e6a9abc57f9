"""Sampling against naive references, and the promise that nothing but the request itself decides a token."""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from specontext.core import AllowedTokens, Request
from specontext.engine.failures import Failures
from specontext.engine.restrictions import restricted
from specontext.engine.sampler import Drawn
from specontext.errors import LogitsError, SpeContextError
from specontext.kernels import token_choice
from specontext.kernels.counter_random import combine_keys
from specontext.kernels.token_choice import gumbel
from specontext.sampling_params import SamplingParams

VOCAB = 37


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def request(
    *,
    prompt: tuple[int, ...] = (1, 2),
    output: tuple[int, ...] = (),
    seed: int = 0,
    index: int = 0,
    name: str = "r",
    **params: Any,
) -> Request:
    return Request(name, [*prompt, *output], len(prompt), SamplingParams(**params), seed, index=index)


def random_logits(rows: int, vocab: int = VOCAB, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(5)) * scale


class Sampled(NamedTuple):
    token_ids: list[int]
    logprobs: list[dict[int, float] | None]


def sample(logits: Tensor, requests: Sequence[Request], *, end_token_ids: Collection[int]) -> Sampled:
    """One token for each row; raises what is wrong with some."""
    failures = Failures()
    found = Drawn(logits, [*enumerate(requests)], end_token_ids).read(failures)
    if failures.found:
        raise failures.take()
    assert [each.request for each in found] == list(requests)
    return Sampled([each.token for each in found], [each.logprobs for each in found])


def draws(row: Tensor, count: int, **params: Any) -> list[int]:
    """The token of each of `count` output indices of one request whose logits are `row`."""
    requests = [request(index=index, **params) for index in range(count)]
    return sample(row.expand(count, -1), requests, end_token_ids=()).token_ids


def naive_support(row: Tensor, *, temperature: float = 1.0, min_p: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> set[int]:
    probabilities = (row.double() / temperature).softmax(0)
    order = sorted(range(len(row)), key=lambda token: (-probabilities[token].item(), token))
    kept = [token for token in order if probabilities[token] >= min_p * probabilities[order[0]]]
    kept = kept[:top_k] if top_k else kept
    mass = sum(probabilities[token].item() for token in kept)
    support, before = set(), 0.0
    for token in kept:
        if before < top_p * mass:
            support.add(token)
        before += probabilities[token].item()
    return support


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_greedy_is_argmax_in_every_number_format(dtype: torch.dtype) -> None:
    logits = random_logits(6).to(dtype)
    result = sample(logits, [request(temperature=0.0) for _ in range(6)], end_token_ids=())
    assert result.token_ids == logits.float().argmax(dim=1).tolist()
    assert result.logprobs == [None] * 6


@pytest.mark.parametrize(
    "params",
    [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-320, "top_k": 1}, {"top_k": 300, "top_p": 1e-9}],
)
def test_equal_logits_are_won_by_the_lowest_id(params: dict[str, Any]) -> None:
    row = torch.full((400,), -1.0)
    row[[70, 300, 12, 399]] = 0.0
    row[5] = -0.0
    assert set(draws(row, 20, **params)) == {5}
    row[[5, 12]] = -2.0
    assert set(draws(row, 20, **params)) == {70}


@pytest.mark.parametrize("vocab", [1, 7, 256, 257, 1000])
def test_top_k_of_one_is_greedy(vocab: int) -> None:
    logits = random_logits(8, vocab)
    requests = [request(top_k=1, temperature=0.5 + seed, seed=seed) for seed in range(8)]
    assert sample(logits, requests, end_token_ids=()).token_ids == logits.argmax(dim=1).tolist()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("restriction", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_draws_follow_the_softmax(temperature: float, restriction: dict[str, Any]) -> None:
    count, row = 8000, random_logits(1, 12, scale=1.0)[0]
    support = naive_support(row, temperature=temperature, **restriction)
    expected = {token: math.exp(row[token] / temperature) for token in support}
    total = sum(expected.values())
    # Positions differ as well as indices, since decoding walks along positions.
    requests = [
        request(output=(3,) * (n % 20), index=n // 20, seed=11, temperature=temperature, **restriction) for n in range(count)
    ]
    seen = Counter(sample(row.expand(count, -1), requests, end_token_ids=()).token_ids)
    assert set(seen) <= support
    chi_square = sum((seen[token] - count * p / total) ** 2 / (count * p / total) for token, p in expected.items())
    freedom = len(support) - 1
    assert chi_square <= freedom + 4 * math.sqrt(2 * freedom) + 4


def test_random_numbers_are_uniform_and_uncorrelated() -> None:
    keys = torch.stack([combine_keys(list(torch.tensor([seed, 0, n]))) for seed in (0, 1) for n in range(50)])
    uniform = torch.exp(-torch.exp(-gumbel(keys.unsqueeze(1), torch.arange(1000).unsqueeze(0))))  # [100, 1000]
    assert abs(uniform.mean() - 0.5) < 0.004 and abs(uniform.var() - 1 / 12) < 0.002
    correlation = torch.corrcoef(uniform) - torch.eye(100)
    assert correlation.abs().max() < 0.17
    assert abs(torch.corrcoef(torch.stack((uniform[:, :-1].flatten(), uniform[:, 1:].flatten())))[0, 1]) < 0.015


def mixed_requests() -> list[Request]:
    choices: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"top_k": 3},
        {"top_k": 290, "top_p": 0.8},
        {"top_p": 0.5, "temperature": 2.0},
        {"min_p": 0.05},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"min_tokens": 9, "stop_token_ids": [4]},
        {"logprobs": 3},
    ]
    return [
        request(prompt=(n % 5, 2), output=(4,) * (n % 7), seed=n // 3, index=n % 2, name=str(n), **choices[n % len(choices)])
        for n in range(45)
    ]


def test_neither_batch_mates_nor_order_change_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    requests, logits = mixed_requests(), random_logits(45, 300, scale=1.0)
    together = sample(logits, requests, end_token_ids=(9,))
    alone = [sample(logits[row : row + 1], [requests[row]], end_token_ids=(9,)).token_ids[0] for row in range(45)]
    assert together.token_ids == alone
    order = torch.randperm(45, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = sample(logits[order], [requests[row] for row in order], end_token_ids=(9,))
    assert shuffled.token_ids == [together.token_ids[row] for row in order]
    assert [entry and list(entry) for entry in shuffled.logprobs] == [
        together.logprobs[row] and list(together.logprobs[row] or ()) for row in order
    ]
    monkeypatch.setattr(token_choice, "_CHUNK", 700)
    assert sample(logits, requests, end_token_ids=(9,)).token_ids == together.token_ids


def test_seed_index_and_position_each_change_the_draws() -> None:
    row = torch.zeros(1, 1000)

    def token(**changes: Any) -> int:
        return sample(row, [request(**changes)], end_token_ids=()).token_ids[0]

    by_seed = [token(seed=seed) for seed in (0, 1, 2, 2**32, 2**63 - 1)]
    by_index = [token(index=index) for index in range(1, 6)]
    by_position = [token(output=(3,) * length) for length in range(1, 6)]
    assert len({*by_seed, *by_index, *by_position}) == 15
    assert by_seed == [token(seed=seed) for seed in (0, 1, 2, 2**32, 2**63 - 1)]
    assert token(output=(3, 4)) == token(prompt=(1, 2, 7), output=(9,))  # the position counts, not what stands before it


@pytest.mark.parametrize("vocab", [VOCAB, 600])
@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 4},
        {"top_k": 300},
        {"top_k": 10_000},
        {"top_p": 0.3},
        {"top_p": 0.85},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"top_k": 8, "top_p": 0.7},
        {"top_k": 8, "min_p": 0.1, "top_p": 0.9},
        {"temperature": 2.0, "top_p": 0.5, "min_p": 0.3},
        {"temperature": 0.5, "top_k": 3, "top_p": 0.99},
    ],
)
def test_only_the_allowed_candidates_are_drawn(vocab: int, params: dict[str, Any]) -> None:
    row = random_logits(1, vocab, scale=1.2)[0]
    support = naive_support(row, **params)
    seen = Counter(draws(row, 1500, **params))
    assert set(seen) <= support
    weights = (row.double() / params.get("temperature", 1.0)).exp()
    total = sum(weights[token].item() for token in support)
    likely = {token for token in support if weights[token] / total > 0.01}
    assert likely <= set(seen)


def test_penalties_equal_the_naive_formula() -> None:
    logits = random_logits(1)
    parameters: dict[str, Any] = {"repetition_penalty": 1.7, "frequency_penalty": 0.3, "presence_penalty": -0.9}
    prompt, output = (1, 2, 2, 30), (5, 5, 5, 2, 8)
    expected = logits[0].clone()
    for token in set(prompt + output):
        expected[token] = expected[token] / 1.7 if expected[token] > 0 else expected[token] * 1.7
    for token, times in Counter(output).items():
        expected[token] -= 0.3 * times - 0.9
    before = logits.clone()
    adjusted = restricted(logits, [request(prompt=prompt, output=output, **parameters)], ())
    torch.testing.assert_close(adjusted[0], expected)
    assert torch.equal(logits, before)


class Counting(list[int]):
    """Tokens that know how many of them were read."""

    read = 0

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        Counting.read += len(found) if isinstance(index, slice) else 1
        return found

    def __iter__(self) -> Any:
        raise AssertionError("all tokens were read")


@pytest.mark.parametrize(
    "parameters",
    [
        {"repetition_penalty": 1.7},
        {"frequency_penalty": 0.3},
        {"presence_penalty": -0.9},
        {"repetition_penalty": 0.6, "frequency_penalty": -0.3, "presence_penalty": 0.9},
    ],
)
def test_penalties_keep_up_with_the_tokens_and_read_each_once(parameters: dict[str, Any]) -> None:
    prompt, made = tuple(i % 7 for i in range(5000)), [3, 8, 8, 0, 8, 3, 9, 1]
    growing = request(prompt=prompt, output=made[:2], **parameters)
    growing.token_ids = Counting(growing.token_ids)
    Counting.read = 0
    for count in range(2, len(made) + 1):
        logits = random_logits(1, vocab=12)
        fresh = request(prompt=prompt, output=tuple(made[:count]), **parameters)
        assert torch.equal(restricted(logits, [growing], ()), restricted(logits, [fresh], ()))
        growing.token_ids += made[count : count + 1]
    assert Counting.read <= len(prompt) + len(made)


def test_penalties_change_the_choice_of_their_own_request_only() -> None:
    row = torch.zeros(10)
    row[4], row[6], row[7] = 2.0, 1.5, 1.0
    requests = [
        request(temperature=0.0),
        request(temperature=0.0, output=(4,), presence_penalty=1.0),
        request(temperature=0.0, prompt=(4,), presence_penalty=2.0, frequency_penalty=2.0),  # these look at the output only
        request(temperature=0.0, prompt=(4,), repetition_penalty=1.5),
        request(temperature=0.0, output=(4, 6, 4), frequency_penalty=0.6),
    ]
    assert sample(row.expand(5, -1), requests, end_token_ids=()).token_ids == [4, 6, 4, 6, 7]


def test_end_tokens_wait_for_min_tokens() -> None:
    row = torch.zeros(10)
    row[[3, 5, 7]] = torch.tensor([3.0, 2.0, 1.0])
    common: dict[str, Any] = {"temperature": 0.0, "min_tokens": 2}
    requests = [
        request(**common),
        request(**common, output=(1,), stop_token_ids=[5, 10**6]),
        request(**common, output=(1, 1), stop_token_ids=[5]),
        request(**common, ignore_eos=True),
        request(**common, ignore_eos=True, stop_token_ids=[3]),
        request(temperature=0.0),
    ]
    assert sample(row.expand(6, -1), requests, end_token_ids={3, 10**6}).token_ids == [5, 7, 3, 3, 5, 3]
    assert 3 not in sample(row.expand(200, -1), [request(min_tokens=1, index=n) for n in range(200)], end_token_ids=[3]).token_ids


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = random_logits(5).bfloat16()
    requests = [
        request(temperature=0.0, logprobs=3),
        request(temperature=0.0),
        request(temperature=5.0, logprobs=2, seed=3),
        request(temperature=5.0, logprobs=0, repetition_penalty=2.0, output=(1, 2, 3)),
        request(logprobs=1000),
    ]
    result = sample(logits, requests, end_token_ids=())
    reference = torch.log_softmax(logits.float(), dim=1)
    assert result.logprobs[1] is None
    for row, count in ((0, 3), (2, 2), (3, 0), (4, VOCAB)):
        entry = result.logprobs[row]
        assert entry is not None
        chosen = result.token_ids[row]
        top = reference[row].topk(count)
        assert set(entry) == {*top.indices.tolist(), chosen}
        assert list(entry.values()) == sorted(entry.values(), reverse=True)
        assert list(entry.values()) == pytest.approx([reference[row, token].item() for token in entry])
    assert result.logprobs[0] is not None and next(iter(result.logprobs[0])) == result.token_ids[0]


def test_equal_logprobs_are_listed_by_id() -> None:
    result = sample(torch.zeros(1, 300), [request(logprobs=4, temperature=0.0)], end_token_ids=())
    assert result.logprobs[0] is not None and list(result.logprobs[0]) == [0, 1, 2, 3]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_values_that_are_not_numbers_name_their_requests(value: float, temperature: float) -> None:
    logits = random_logits(4)
    logits[1, 7], logits[3, 0] = value, value
    requests = [request(name=name, temperature=temperature, top_p=0.9, logprobs=1) for name in ("a", "b", "c", "d")]
    with pytest.raises(LogitsError, match=r"not numbers for b, d: .*float32") as caught:
        sample(logits, requests, end_token_ids=())
    assert caught.value.request_ids == ("b", "d")
    assert isinstance(caught.value, SpeContextError)


def test_minus_infinity_forbids_a_token_but_not_a_whole_row() -> None:
    row = torch.full((20,), -math.inf)
    row[[4, 9]] = 0.0
    assert set(draws(row, 50)) == set(draws(row, 50, top_k=15)) == set(draws(row, 50, top_p=0.99)) == {4, 9}
    with pytest.raises(LogitsError):
        draws(torch.full((20,), -math.inf), 1)


def test_extreme_temperatures_stay_numbers() -> None:
    row = random_logits(1)[0]
    assert set(draws(row, 50, temperature=1e-320)) == {int(row.argmax())}
    assert len(set(draws(row, 300, temperature=1e18))) > 30


def test_who_has_ended_meanwhile_gets_no_token_and_no_error() -> None:
    logits = random_logits(3)
    logits[1] = math.nan
    requests = [request(name=name, temperature=0.0, logprobs=row) for row, name in enumerate(("a", "b", "c"))]
    drawn, failures = Drawn(logits, [*enumerate(requests)], ()), Failures()
    logits.fill_(math.nan)
    requests[0].finish_reason = requests[1].finish_reason = "stop"
    [found] = drawn.read(failures)
    assert (found.row, found.request, found.token) == (2, requests[2], int(random_logits(3)[2].argmax()))
    assert found.logprobs is not None and len(found.logprobs) == 2 and not failures.found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_does_not_change_a_token() -> None:
    logits = random_logits(45, 3000, scale=1.0)
    here = sample(logits, mixed_requests(), end_token_ids=(9,)).token_ids
    assert sample(logits.cuda(), mixed_requests(), end_token_ids=(9,)).token_ids == here  # a request remembers on its device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_waits_for_the_device_before_tokens_are_read() -> None:
    requests, logits = mixed_requests(), random_logits(45, 3000, scale=1.0).cuda()
    requests[1].allowed = AllowedTokens(torch.full((1, 94), -1, dtype=torch.int32, device="cuda"), 0)
    changes = ({"allowed_token_ids": [5, 6, 7]}, {"logit_bias": {3: 1.0}})
    requests[2:4] = [request(name=str(n), **change) for n, change in enumerate(changes)]
    ready = [*enumerate(requests)]
    expected = [each.token for each in Drawn(logits, ready, (9,)).read(Failures())]  # kernels are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = Drawn(logits, ready, (9,))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [each.token for each in drawn.read(Failures())] == expected

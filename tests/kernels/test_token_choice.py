"""Tokens by their logits, in Triton and in PyTorch, against a plain ranking of Python's numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from specontext.kernels import token_choice as dispatched
from specontext.kernels.counter_random import combine_keys
from specontext.kernels.dispatch import reference_of
from specontext.kernels.token_choice import UNIT, Draw, gumbel
from specontext.kernels.top_k import best_tokens
from specontext.kernels.triton import token_choice as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Function = Callable[..., Any]
BEST = pytest.mark.parametrize("best_tokens", [kernels.best_tokens, reference_of(best_tokens)], ids=["triton", "torch"])
DRAWS = pytest.mark.parametrize(
    "draw_tokens", [kernels.draw_tokens, reference_of(dispatched.draw_tokens)], ids=["triton", "torch"]
)
SIZES = pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 300])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows have several parts, and parts several blocks; the reference looks at few tokens first, and some times at all then."""
    for name, width in {"_NARROW": 64, "_FEW": 32}.items():
        monkeypatch.setattr(dispatched, name, width)
    for name, value in {"CHUNK": 128, "BLOCK": 64, "MOST_GROUPS": 64, "NEAR": 32, "LISTED": 64}.items():
        monkeypatch.setattr(kernels, name, value)


def expected(row: Tensor, draw: Draw) -> int:
    """The token of a draw, from the definition: candidates by rank, then the greatest score with noise."""
    logits = row.double().tolist()
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    temperature, floor, top_p = draw.numbers()
    scores = {token: (logits[token] - logits[order[0]]) / temperature for token in order}
    mass = {token: int(math.exp(scores[token]) * UNIT) if scores[token] >= floor else 0 for token in order}
    order = order[: draw.limit(len(logits))]
    enough, above, kept = math.ceil(top_p * sum(mass[token] for token in order)), 0, []
    for token in order:
        if scores[token] >= floor and (top_p == 1 or above < enough):
            kept.append(token)
        above += mass[token]
    key = combine_keys([torch.tensor([[part]]) for part in (draw.seed, draw.output, draw.position)])
    noise = gumbel(key, torch.tensor([kept]))[0].tolist()
    return max(zip(kept, noise, strict=True), key=lambda pair: scores[pair[0]] + pair[1])[0]


def some_logits(rows: int, size: int, dtype: torch.dtype, seed: int, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, size, generator=generator) * spread).to(dtype)


def found_by(draw_tokens: Function, logits: Tensor, draws: list[Draw]) -> list[int]:
    tokens = best_tokens(logits.to(DEVICE))[0]
    draw_tokens(logits.to(DEVICE), tokens, draws)
    return tokens.tolist()  # type: ignore[no-any-return]


@BEST
@SIZES
@DTYPES
def test_the_most_likely_token_is_the_first_of_its_equals(best_tokens: Function, size: int, dtype: torch.dtype) -> None:
    logits = some_logits(5, size, dtype, size).round()  # with many equals
    logits[3] = -math.inf
    logits[4, -1] = 90.0
    found = best_tokens(logits.to(DEVICE)).tolist()
    assert found[0] == [row.index(max(row)) for row in logits.tolist()]
    assert found[1] == [0] * 5 and found[2] == [0, 0, 0, 1, 0]


@BEST
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 70, 299])
def test_a_broken_row_is_named_and_no_other(best_tokens: Function, value: float, place: int) -> None:
    logits = some_logits(3, 300, torch.float32, 0)
    logits[1, place] = value
    logits[2] = -math.inf
    logits[2, place] = value
    token, broken, nothing = best_tokens(logits.to(DEVICE)).tolist()
    assert broken == [0, 1, 1] and nothing == [0, 0, 0]
    assert token[0] == logits[0].argmax() and all(0 <= one < 300 for one in token)


LIMITS: dict[str, dict[str, float]] = {
    "none": {},
    "top-p": {"top_p": 0.9},
    "little mass": {"top_p": 0.05},
    "nearly all mass": {"top_p": 1 - 1e-12},
    "top-k": {"top_k": 20},
    "one": {"top_k": 1},
    "many": {"top_k": 700},
    "more than are listed": {"top_k": 100},
    "many and top-p": {"top_k": 100, "top_p": 0.9},
    "min-p": {"min_p": 0.1},
    "top-k and top-p": {"top_k": 20, "top_p": 0.8},
    "all": {"top_k": 40, "top_p": 0.95, "min_p": 0.01},
}


@DRAWS
@DTYPES
@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_draws_are_those_of_the_definition(draw_tokens: Function, dtype: torch.dtype, limits: dict[str, Any]) -> None:
    """Where many tokens have the same logit, some of which are candidates."""
    logits = some_logits(2, 200, dtype, 0)
    logits[0] = logits[0].round()
    options = {"min_p": 0.0, "top_p": 1.0, "top_k": 0} | limits
    draws = [Draw(row, temperature, **options, seed=row, output=row, position=9) for row, temperature in enumerate((1.0, 0.6))]
    assert found_by(draw_tokens, logits, draws) == [expected(logits[draw.row], draw) for draw in draws]


@DRAWS
@pytest.mark.parametrize("spread", [0.05, 1.0, 20.0])
def test_rows_as_flat_or_steep_as_may_be(draw_tokens: Function, spread: float) -> None:
    """With any limits: few tokens decide, or many, or one."""
    random = Random(spread)
    logits = some_logits(24, 260, torch.bfloat16, 7, spread)
    draws = [
        Draw(row, random.choice((0.3, 1.0, 2.0)), random.choice((0.0, 0.0, 0.02)), random.choice((0.4, 0.95, 1.0)),
             random.choice((0, 0, 3, 33, 120)), seed=row, output=1, position=row)
        for row in range(24)
    ]  # fmt: skip
    assert found_by(draw_tokens, logits, draws) == [expected(logits[draw.row], draw) for draw in draws]


@DRAWS
@pytest.mark.parametrize("size", [1, 3, 129])
def test_rows_of_any_kind(draw_tokens: Function, size: int) -> None:
    logits = some_logits(5, size, torch.float32, size)
    logits[0] = 0.5  # all are equal
    logits[1, 1::2] = -math.inf
    logits[2, : size // 2] = -0.0  # which equals 0.0
    logits[2, size // 2 :] = 0.0
    temperatures = (1.0, 1.0, 1.0, 1e-30, 50.0)
    seeds = (0, -5, 1 << 62, 1, 2)
    draws = [Draw(row, temperatures[row], 0.0, 0.7, 0, seeds[row], 0, 0) for row in range(5)]
    assert found_by(draw_tokens, logits, draws) == [expected(logits[draw.row], draw) for draw in draws]


@DRAWS
def test_limits_of_others_change_no_draw(draw_tokens: Function) -> None:
    """Rows with each kind of limit and with none in one batch, in any order; a row that draws nothing keeps its token."""
    kinds = [LIMITS[name] for name in ("top-k", "none", "top-p", "all")]
    logits = some_logits(len(kinds) + 1, 150, torch.bfloat16, 1)
    draws = [
        Draw(row, 0.8, **({"min_p": 0.0, "top_p": 1.0, "top_k": 0} | limits), seed=row, output=0, position=4)  # type: ignore[arg-type]
        for row, limits in enumerate(kinds)
    ]
    for order in (draws, draws[::-1]):
        assert found_by(draw_tokens, logits, order) == [
            *(expected(logits[draw.row], draw) for draw in draws),
            logits[-1].float().argmax(),
        ]


@DRAWS
def test_rows_that_are_broken_end_nothing(draw_tokens: Function) -> None:
    """What they get is not said; others get theirs."""
    logits = some_logits(5, 200, torch.float32, 3)
    logits[1, 7], logits[2, 8], logits[3] = math.nan, math.inf, -math.inf
    draws = [Draw(row, 1.0, 0.0, 0.9, top_k, seed=row, output=0, position=0) for row in range(5) for top_k in [7 * (row % 2)]]
    found = found_by(draw_tokens, logits, draws)
    assert found[0] == expected(logits[0], draws[0]) and found[4] == expected(logits[4], draws[4])


@DRAWS
def test_rows_need_not_follow_each_other(draw_tokens: Function) -> None:
    logits = some_logits(6, 130, torch.bfloat16, 4)
    draws = [Draw(row, 1.0, 0.0, 0.7, 0, seed=row, output=0, position=0) for row in (1, 2)]
    assert found_by(draw_tokens, logits[::2], draws)[1:] == [expected(logits[2 * draw.row], draw) for draw in draws]


@DRAWS
def test_nobody_draws(draw_tokens: Function) -> None:
    logits = some_logits(2, 50, torch.float32, 5)
    assert found_by(draw_tokens, logits, []) == logits.argmax(1).tolist()


@DRAWS
def test_a_large_vocabulary(draw_tokens: Function, monkeypatch: pytest.MonkeyPatch) -> None:
    """As models have them, with the parts of a GPU."""
    for name in ("CHUNK", "BLOCK", "MOST_GROUPS"):
        monkeypatch.setattr(kernels, name, 4096)
    logits = some_logits(1, 40_009, torch.bfloat16, 6)
    draw = Draw(0, 0.6, 0.0, 0.95, 50, 1, 0, 0)
    assert found_by(draw_tokens, logits, [draw]) == [expected(logits[0], draw)]


def test_every_way_launches_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that those who warm up compile all of them, for logits of both kinds."""
    launched: dict[str, int] = {}

    class Watched:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            launched[self.name] = launched.get(self.name, 0) + 1
            return self.kernel[grid]

    names = ["_best_of_parts", "_best_of_rows", "_survey", "_choose"]
    for name in names:
        monkeypatch.setattr(kernels, name, Watched(name, getattr(kernels, name)))
    monkeypatch.setattr(dispatched, "best_tokens", kernels.best_tokens)
    monkeypatch.setattr(dispatched, "draw_tokens", kernels.draw_tokens)
    dispatched.choose_in_every_way(50, torch.bfloat16, torch.device(DEVICE))
    assert launched == dict.fromkeys(names, 2)

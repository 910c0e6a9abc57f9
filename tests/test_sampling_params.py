"""SamplingParams: every bound is checked where the object is made, and the message names the field."""

import math
from itertools import count, cycle
from typing import Any

import pytest

from specontext.errors import RequestError
from specontext.sampling_params import SamplingParams


def test_defaults_are_valid() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.max_tokens) == (1, 1.0, 1.0, 0, 16)
    assert params.stop == () and params.stop_token_ids == () and params.seed is None and params.logprobs is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("n", value) for value in (0, -1, 1.0, True, "1", None, math.nan, 10**400, 1025)),
        *(("temperature", value) for value in (-0.1, math.nan, math.inf, 10**400, "1", True, None)),
        *(("top_p", value) for value in (0.0, -0.1, 1.01, math.nan, math.inf, "1", None)),
        *(("top_k", value) for value in (-2, 1.5, True, None, 10**400)),
        *(("min_p", value) for value in (-0.01, 1.01, math.nan, None)),
        *(("max_tokens", value) for value in (0, -1, 1.0, 10**400)),
        *(("min_tokens", value) for value in (-1, 17, 1.0)),
        *(("presence_penalty", value) for value in (-2.01, 2.01, math.nan, "0")),
        *(("frequency_penalty", value) for value in (-2.01, 2.01, math.nan, "0")),
        *(("repetition_penalty", value) for value in (0.0, -1.0, math.nan, math.inf)),
        *(("logprobs", value) for value in (-1, 1.0, True)),
        *(("seed", value) for value in (-(2**63) - 1, 2**63, 1.0, True)),
        *(("stop", value) for value in ("", [""], ["a", ""], ["a\ud800"], [1], [None], 3, ["a"] * 65, cycle("a"))),
        *(("stop_token_ids", value) for value in ([-1], [1.0], [True], ["1"], "1", 3, [5] * 1025, count())),
        *(("logit_bias", value) for value in (5, "ab", [5], [(5,)], [(5, "a")], {"5": 1}, {5: math.nan}, {5: 101})),
        *(("allowed_token_ids", value) for value in (5, "5", [], [-1], [1.0])),
        *(("bad_words", value) for value in ([5], 5, [" "], ["a\ud800"])),
        *(("thinking", value) for value in (True, {"inside": True})),
        *(
            (flag, value)
            for flag in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")
            for value in (None, "no", 1)
        ),
        *(("structured_outputs.regex", value) for value in ("\ud800", "", 5)),
    ],
)
def test_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^{name} must (be|map)"):
        field, _, inner = name.partition(".")
        SamplingParams(**{field: {inner: value} if inner else value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("n", value) for value in (1, 8, 1024)),
        *(("temperature", value) for value in (0, 0.0, 1e-320, 5)),
        *(("top_p", value) for value in (1e-9, 1, 1.0)),
        *(("top_k", value) for value in (0, 1, 2**63 - 1)),
        *(("min_p", value) for value in (0.0, 1.0)),
        *(("max_tokens", value) for value in (1, 2**40, None)),
        *(("min_tokens", value) for value in (0, 16)),
        *(("presence_penalty", value) for value in (-2.0, 2.0)),
        *(("frequency_penalty", value) for value in (-2.0, 2.0)),
        *(("repetition_penalty", value) for value in (1e-9, 100.0)),
        *(("logprobs", value) for value in (None, 0, 20)),
        *(("seed", value) for value in (None, 0, 2**63 - 1)),
    ],
)
def test_the_ends_of_every_range_are_accepted(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("n", 1025, "at most 1024, got 1025"),
        ("stop", ["a"] * 100, "at most 64, got 100"),
        ("stop", ["b", "a" * (2**17 + 1)], "at most 131072 characters, got one of 131073"),
        ("stop_token_ids", range(2000), "at most 1024, got 2000"),
        ("max_tokens", 10**5000, "got an integer of 16610 bits"),
        ("temperature", "x" * 10**6, r"got 'x{40}' \(1000000 characters in all\)"),
        ("top_k", [0] * 10**6, r"got list \(1000000 items in all\)"),
    ],
    ids=["n", "stops", "stop", "stop_token_ids", "integer", "text", "list"],
)
def test_bounds_are_named_and_what_was_given_is_shown_in_few_words(name: str, value: Any, says: str) -> None:
    with pytest.raises(RequestError, match=f"^{name} must be .*{says}$") as caught:
        SamplingParams(**{name: value})
    assert len(str(caught.value)) < 300


def test_the_longest_lists_and_texts_are_accepted() -> None:
    params = SamplingParams(stop=["a" * 2**17] * 64, stop_token_ids=list(range(1024)))
    assert (len(params.stop), len(params.stop_token_ids)) == (64, 1024)


def test_minus_one_means_no_top_k() -> None:
    assert SamplingParams(top_k=-1).top_k == 0


def test_stop_is_a_tuple_however_it_is_given() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=[3, 4]).stop_token_ids == (3, 4)
    nothing: Any = None
    assert SamplingParams(stop=nothing, stop_token_ids=nothing) == SamplingParams()


def test_min_tokens_is_bounded_by_max_tokens() -> None:
    assert SamplingParams(max_tokens=3, min_tokens=3).min_tokens == 3
    with pytest.raises(RequestError, match="min_tokens must be an integer of at least 0 and at most 3, got 4"):
        SamplingParams(max_tokens=3, min_tokens=4)


def test_a_seed_of_minus_one_is_none() -> None:
    assert SamplingParams(seed=-1) == SamplingParams()
    assert SamplingParams(seed=-5).seed == -5 and SamplingParams(seed=-(2**63)).seed == -(2**63)

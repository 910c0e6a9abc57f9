"""Usage of several outputs: what every statistic of them becomes when they are put together."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from specontext.engine.output_statistics import OutputStatistics, merge
from specontext.engine.residency import Move
from specontext.server.usage import make_usage
from tests.server.serving import Server

SETTINGS = {"method": "speculative", "budget": 64, "sink": 4, "recent": 16, "slots": 64, "granularity": "head"}


def move(step: int, layer: int, *, to_host: bool = True, stall_s: float = 0.0) -> Move:
    return Move(step, layer, to_host, bytes=512, stall_s=stall_s)


def stats(steps: int, **others: Any) -> OutputStatistics:
    nothing: dict[str, Any] = dict.fromkeys(field.name for field in fields(OutputStatistics))
    counted = {"prompt_tokens": 9, "cached_tokens": 0, "completion_tokens": steps + 1, "decode_steps": steps, "moves": ()}
    return OutputStatistics(**nothing | SETTINGS | counted | others)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("captured_steps", (10, 0, 5), 15),
        ("preemptions", (1, 0, 2), 3),
        ("queue_s", (0.2, 0.1, 0.4), 0.1),
        ("ttft_s", (0.7, 0.9, 0.6), 0.6),
        ("offloaded_layers", (2, 3, 1), 3),
        ("tokens_read_per_step", (8.0, 16.0, 24.0), 13.0),
        ("bytes_loaded_per_step", (160.0, 0.0, 320.0), 180.0),
        ("bytes_full_per_step", (16.0, 32.0, 64.0), 30.0),
        ("selection_bytes_per_step", (1.0, 1.0, 1.0), 1.0),
        ("overlap", (0.5, None, 1.0), 9 / 14),
        ("hit_rate", (1.0, 0.5, 0.25), 0.75),
        ("attention_recall", (None, None, None), None),
        ("attention_recall_by_layer", ([8.0, 1.0], [16.0, 1.0], [24.0, 1.0]), [13.0, 1.0]),
        ("tpot_s", (0.016, 0.032, 0.008), 0.016),
        ("slots", (None, None, None), None),
    ],
)
def test_every_statistic_has_its_rule(name: str, values: tuple[Any, ...], expected: Any) -> None:
    outputs = [stats(steps, **{name: value}) for steps, value in zip((10, 2, 4), values, strict=True)]
    merged = merge(outputs).as_dict()
    assert merged[name] == (pytest.approx(expected) if isinstance(expected, float) else expected)
    assert merged["decode_steps"] == 16
    assert all(merged[setting] == value for setting, value in SETTINGS.items() if setting != name)


def test_moves_are_those_that_any_output_saw() -> None:
    first, second, third = move(3, 3), move(9, 2, stall_s=0.5), move(12, 2, to_host=False)
    merged = merge([stats(5, moves=(first, second)), stats(5, moves=(second, third)), stats(5, moves=())])
    assert merged.moves == (first, second, third)
    assert merge([stats(5, moves=(third,)), stats(5, moves=(first, third))]).moves == (first, third)


def test_one_output_is_left_as_it_is_and_none_has_no_statistics() -> None:
    one = stats(3, moves=(move(1, 1),), overlap=None, queue_s=0.5)
    assert merge([one]) == one
    shown = make_usage(9, 4, [one, None], n=2).specontext
    apart = ("prompt_tokens", "completion_tokens", "cached_tokens")
    assert shown == {name: value for name, value in one.as_dict().items() if name not in apart}
    assert shown["moves"] == [{"step": 1, "layer": 1, "to_host": True, "bytes": 512, "stall_s": 0.0}]
    assert make_usage(9, 0, [None, None], n=2).specontext is None


def test_every_field_says_how_it_is_merged() -> None:
    assert all("merge" in field.metadata for field in fields(OutputStatistics))


def test_a_prompt_s_cached_tokens_count_once() -> None:
    found = [stats(1, cached_tokens=count) for count in (0, 16, 16, 32, 32, 32)]
    usage = make_usage(80, 12, found, n=3)
    assert usage.prompt_tokens_details is not None and usage.prompt_tokens_details.cached_tokens == 32
    assert make_usage(80, 12, [None], n=1).prompt_tokens_details is None


def test_usage_of_several_outputs(server: Server) -> None:
    body = {"prompt": ["the sun", "a book about the moon"], "n": 2, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    usage = server.post("/v1/completions", body).json()["usage"]
    found = usage["specontext"]
    assert found["decode_steps"] == 4 * 5 and usage["completion_tokens"] == 24
    assert found["method"] == "speculative" and found["budget"] == 64 and found["offloaded_layers"] == 2

"""A clock that learns meets the steps of whatever engine it follows, and does not follow noise."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from specontext.memory.learning import DEADBAND, PERIOD, TRAFFIC, LearnedClock, Seen, Traffic
from specontext.memory.presets import find_preset
from specontext.memory.step_time import H100, StepClock

LLAMA = find_preset("llama-3.1-8b")
assert LLAMA is not None
FACTS = LLAMA.facts()
PRIOR = StepClock(FACTS, H100, 2048)
Step = Callable[[Sequence[int], int], float]

# Seconds of a step of some requests, with layers away, of engines that the constants were not fitted to.
ENGINES: dict[str, Step] = {
    "captured": lambda lengths, away: 1.07 * PRIOR.decode(lengths, away).seconds,
    "eager": lambda lengths, away: PRIOR.decode(lengths, away).seconds + 0.024,
    "quest": lambda lengths, away: PRIOR.decode(lengths, 0).seconds + 32 * 90e-6 + 1.5e-8 * sum(lengths),
    "shadowkv, eager": lambda lengths, away: PRIOR.decode(lengths, 0).seconds + 32 * 900e-6 + 4e-8 * sum(lengths),
    "slower bus": lambda lengths, away: StepClock(FACTS, replace(H100, host=18e9), 2048).decode(lengths, away).seconds,
    "other overlap": lambda lengths, away: StepClock(FACTS, H100, 2048, 0.6).decode(lengths, away).seconds,
    "slower memory": lambda lengths, away: StepClock(FACTS, replace(H100, device=1.5e12), 2048).decode(lengths, away).seconds,
}


class Run:
    """An engine that decodes, as its clock sees it."""

    def __init__(self, step: Step, clock: LearnedClock | None = None) -> None:
        self.clock, self.step, self.at, self.number = clock or LearnedClock(PRIOR), step, 100.0, 0
        self.traffic = Traffic(0, 0, 0, 0)

    def decode(self, lengths: list[int], away: int, windows: int, noise: Callable[[], float] = lambda: 1.0) -> list[int]:
        """Some windows of steps; the lengths after them."""
        for _ in range(windows + 1):
            seen = Seen(self.at, self.number, tuple(range(len(lengths))), tuple(lengths), away, away)
            self.clock.look(seen, lambda: self.traffic)
            assert self.clock.due == self.number + PERIOD
            self.at += PERIOD * self.step(lengths, away) * noise()
            self.number += PERIOD
            lengths = [length + PERIOD for length in lengths]
        return lengths


@pytest.mark.parametrize("name", ENGINES)
def test_within_a_tenth_after_some_windows_over_the_grid(name: str) -> None:
    """Each number of requests as it grows from 2K to 32K and beyond, with and without layers away, and from one to the next."""
    run = Run(ENGINES[name])
    for requests, away in ((1, 0), (4, 0), (4, 32), (16, 0), (24, 14), (32, 8)):
        for length in (2048, 8192, 18432, 33792):
            lengths = run.decode([length] * requests, away, 5)
            expected = run.clock.decode(lengths, away).seconds
            assert expected == pytest.approx(run.step(lengths, away), rel=0.1), (requests, away, length)
            assert run.clock.expected_s == pytest.approx(run.clock.step_s, rel=0.1)


@pytest.mark.parametrize("name", ["captured", "eager", "shadowkv, eager"])
def test_what_was_learned_of_some_requests_holds_for_more(name: str) -> None:
    run = Run(ENGINES[name])
    lengths = run.decode([8192] * 4, 0, 5)
    for more in (5, 6, 8):
        lengths = [8192] * more
        assert run.clock.decode(lengths, 0).seconds == pytest.approx(run.step(lengths, 0), rel=0.1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(1 - 0.9 * DEADBAND, 1 + 0.9 * DEADBAND), min_size=5, max_size=40), st.sampled_from(sorted(ENGINES)))
def test_noise_changes_nothing(noise: list[float], name: str) -> None:
    """Once it has learned a step, steps that are a little longer or shorter do not make it think again."""
    run = Run(ENGINES[name])
    run.decode([16384] * 8, 8, 8)
    at_rest = run.clock.decode([16384] * 8, 8).seconds
    run.step = lambda lengths, away: at_rest
    clock = run.clock.now
    for factor in noise:
        run.clock.learn([16384] * 8, 8, at_rest * factor)
    assert run.clock.now is clock


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.floats(1e-6, 1e4), st.sampled_from([0, 8, 32]), st.floats(-1, 2)), min_size=1, max_size=40),
    st.integers(1, 16),
)
def test_no_trace_makes_it_absurd(trace: list[tuple[float, int, float]], requests: int) -> None:
    """Whatever is measured, expectations stay finite and above nothing, and grow with lengths; a true step is learned again."""
    clock = LearnedClock(PRIOR)
    for seconds, away, overlap in trace:
        clock.learn([20000] * requests, away, seconds)
        clock.learn_overlap(overlap)
        steps = [clock.decode([length] * requests, away).seconds for length in (100, 4096, 65536)]
        assert 0 < steps[0] <= steps[1] <= steps[2] < 1e5 and 0 <= clock.now.overlap <= 1
    for _ in range(10):
        clock.learn([20000] * requests, 0, 0.011)
    assert clock.decode([20000] * requests, 0).seconds == pytest.approx(0.011, rel=0.1) or clock.now.weights / 3.1e12 > 0.011


def test_a_single_slow_window_is_not_believed() -> None:
    run = Run(ENGINES["captured"])
    lengths = run.decode([4096] * 4, 0, 6)
    run.clock.learn(lengths, 0, 3.0)
    assert run.clock.decode(lengths, 0).seconds == pytest.approx(run.step(lengths, 0), rel=0.1)


def test_only_undisturbed_steps_count() -> None:
    clock = LearnedClock(PRIOR)
    base = Seen(1.0, PERIOD, (1, 2), (100, 200), 0, 0)
    later = Seen(3.0, 2 * PERIOD, (1, 2), (100 + PERIOD, 200 + PERIOD), 0, 0)
    nothing = Traffic(0, 0, 0, 0)
    for disturbed in (
        replace(later, requests=(1, 3)),
        replace(later, requests=(1,), lengths=(100 + PERIOD,)),
        replace(later, lengths=(100 + PERIOD, 900)),
        replace(later, moves=1),
        replace(later, away=1),
        replace(later, at=1.0),
        replace(later, requests=(), lengths=()),
    ):
        clock.look(base, lambda: nothing)
        clock.look(disturbed, lambda: nothing)
        assert clock.step_s is None and clock.now is PRIOR
    clock.look(base, lambda: nothing)
    clock.look(later, lambda: nothing)
    middle = [100 + PERIOD // 2, 200 + PERIOD // 2]
    assert clock.step_s == 2.0 / PERIOD and clock.expected_s == PRIOR.decode(middle, 0).seconds
    assert clock.decode(middle, 0).seconds == pytest.approx(2.0 / PERIOD)


@pytest.mark.parametrize("away", [0, 8])
def test_the_overlap_is_that_of_the_requests_that_there_are(away: int) -> None:
    """With layers away what was really loaded counts, so slots beyond the budget do, too."""
    run, rng = Run(ENGINES["captured"]), random.Random(1)
    for _ in range(8):
        run.decode([16384] * 4, away, TRAFFIC)
        share = 0.7 + 0.02 * rng.random()
        was = run.traffic
        missed = 100.0 * (1 - share) * away / 32
        run.traffic = Traffic(was.selected + 100, was.hits + 100 - missed, was.overlap + share, was.overlap_steps + 1)
    assert run.clock.now.overlap == pytest.approx(0.71, abs=0.05)


def test_where_processes_decide_alike_nothing_is_learned() -> None:
    run = Run(ENGINES["eager"], LearnedClock(PRIOR, learns=False))
    run.decode([4096] * 4, 0, 6)
    assert run.clock.now is PRIOR and run.clock.step_s is not None
    cpu = Run(ENGINES["slower bus"], LearnedClock(PRIOR, learns_bus=False))
    cpu.decode([16384] * 16, 32, 6)
    assert cpu.clock.now.bus == 1.0

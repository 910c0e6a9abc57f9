"""What `end_to_end.py` measures: first tokens, many prompts at once, serving (loop, mixed steps, latencies), and first steps."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from engine_runs import SYSTEMS, Driver, HuggingFace, Setup, StepTime

from specontext.engine.generation import Generation

ON_DEVICE = ("full", "speculative")
NEW_QUESTION = 32  # tokens of a further question on a known prompt
OUTPUT = 2048  # tokens that requests may generate while something is measured beside them: more than they will
Report = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is measured; tokens unless something else is said.

    Attributes:
        lengths: of prompts whose first token is awaited.
        prompts, prompt: how many at once, and of what length each.
        requests, context: that decode while the loop is measured; `mixed` of them while a prompt comes, `streams` while
            several do.
        arriving: length of prompts that come while others decode; `arrivals` of them for latencies.
        chunks: of a prompt beside which mixed steps are measured.
        sizes: numbers of requests of which the first steps are measured.
        crossing: context of these requests, shortly before captured steps have to serve a larger one.
        steps: decode steps of a round, and between two prompts.
        rounds: at most, and `seconds` for the rounds of one case: no new one begins after them.
    """

    lengths: tuple[int, ...]
    prompts: int
    prompt: int
    requests: int
    context: int
    mixed: int
    streams: int
    arriving: int
    arrivals: int
    chunks: int
    sizes: tuple[int, ...]
    crossing: int
    steps: int
    rounds: int
    seconds: float


def rounds_of(sizes: Sizes, *calls: Callable[[], float]) -> list[list[float]]:
    """Samples of calls that take turns: of each at least one, and as many as there is time for."""
    began = time.perf_counter()
    found: list[list[float]] = [[] for _ in calls]
    while len(found[0]) < sizes.rounds and (not found[0] or time.perf_counter() - began < sizes.seconds):
        for samples, call in zip(found, calls, strict=True):
            samples.append(call())
    return found


def with_thread_time(call: Callable[[], float], spent: list[float]) -> Callable[[], float]:
    """A call that adds the processor seconds of its thread to a list. On a CPU the thread does its part of all that runs in
    parallel, and all that does not: about what a machine without other programs would take."""

    def run() -> float:
        began = time.thread_time()
        value = call()
        spent.append(time.thread_time() - began)
        return value

    return run


def by_system(systems: Sequence[str], measured: Callable[[str], Report]) -> Report:
    """What a function finds of each system: value by field and system."""
    report: Report = defaultdict(dict)
    for system in systems:
        for field, value in measured(system).items():
            report[field][system] = value
    return dict(report)


# First tokens ---------------------------------------------------------------------------------------------------------


def first_tokens(setup: Setup, sizes: Sizes) -> Report:
    """Time to first token by length and system, beside Hugging Face in the same rounds; and of a second question."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for system in SYSTEMS:
        found[system] = first_tokens_of(setup, sizes, system)
    fields = next(iter(next(iter(found.values())).values()))
    lengths = [str(length) for length in sorted(sizes.lengths)]
    return {field: {name: {system: found[system][name][field] for system in SYSTEMS} for name in lengths} for field in fields}


def first_tokens_of(setup: Setup, sizes: Sizes, system: str) -> dict[str, dict[str, Any]]:
    theirs = HuggingFace(setup.loaded)
    seats = 2 if system == "host" else 1  # room for what is kept of a prompt, beside the request's own
    with setup.engine(system, seats=seats, longest=max(sizes.lengths) + 2 * NEW_QUESTION) as driver:
        driver.engine.warm_up()
        warm_up = setup.prompt(min(sizes.lengths))
        theirs.seconds([warm_up])
        driver.seconds([warm_up])
        return {str(length): first_token(setup, sizes, theirs, driver, length) for length in sorted(sizes.lengths)}


def first_token(setup: Setup, sizes: Sizes, theirs: HuggingFace, driver: Driver, length: int) -> dict[str, Any]:
    document: list[int] = []

    def ours() -> float:
        document[:] = setup.prompt(length)
        return driver.seconds([document])

    spent: tuple[list[float], list[float]] = ([], [])
    calls = with_thread_time(lambda: theirs.seconds([setup.prompt(length)]), spent[0]), with_thread_time(ours, spent[1])
    samples = rounds_of(sizes, *calls)
    hf, own = map(statistics.median, samples)
    known = driver.seconds([document + setup.prompt(NEW_QUESTION)])
    return {
        "ttft_s": own,
        "ttft_hf_s": hf,
        "ttft_over_hf": own / hf,
        "ttft_samples_s": samples[1],
        "ttft_hf_samples_s": samples[0],
        "ttft_thread_over_hf": statistics.median(spent[1]) / statistics.median(spent[0]),
        "known_over_first": known / own,
    }


def fresh_prompts(setup: Setup, count: int, length: int) -> list[list[int]]:
    return [setup.prompt(length) for _ in range(count)]


def many_prompts(setup: Setup, sizes: Sizes) -> Report:
    """Tokens a second of prompts that come at once, against Hugging Face one by one."""
    theirs, tokens = HuggingFace(setup.loaded), sizes.prompts * sizes.prompt
    fresh = partial(fresh_prompts, setup, sizes.prompts, sizes.prompt)

    def measured(system: str) -> Report:
        with setup.engine(system, seats=sizes.prompts, longest=sizes.prompt + NEW_QUESTION) as driver:
            warm_up = setup.prompt(sizes.prompt)
            theirs.seconds([warm_up])
            driver.seconds([warm_up])
            samples = rounds_of(sizes, lambda: theirs.seconds(fresh()), lambda: driver.seconds(fresh()))
        hf, own = (tokens / statistics.median(values) for values in samples)
        return {"prefill_tokens_per_s": own, "prefill_hf_tokens_per_s": hf, "prefill_over_hf": own / hf}

    return by_system(ON_DEVICE, measured)


# Serving --------------------------------------------------------------------------------------------------------------


def serving(setup: Setup, sizes: Sizes, wanted: Collection[str]) -> Report:
    """The engine's loop against the step alone, latencies while prompts come, and mixed steps against their parts: those of
    "loop", "latency" and "mixed" that are wanted. One engine of each system serves all of them."""

    def measured(system: str) -> Report:
        looping = system in ON_DEVICE and "loop" in wanted
        most = {"loop": sizes.requests if looping else 0, "latency": sizes.streams, "mixed": sizes.mixed}
        several = max(most[part] for part in wanted)
        longest = max(sizes.arriving, sizes.context, sizes.chunks * setup.mixed_chunk) + OUTPUT
        report: Report = {}
        if not several:
            return report
        # A chunk alone is as large as one beside requests that decode, so that mixed steps can be compared with their parts.
        with setup.engine(system, seats=several + 1, longest=longest, chunk=setup.mixed_chunk) as driver:
            driver.engine.warm_up()
            driver.seconds([setup.prompt(setup.mixed_chunk + NEW_QUESTION)])
            before = prompt_alone(setup, sizes, driver) if "mixed" in wanted else 0.0
            decoding = driver.start(fresh_prompts(setup, several, sizes.context), OUTPUT)
            for _ in range(2):
                driver.step()
            if looping:
                report |= loop(sizes, driver)
            if "latency" in wanted:
                driver.end(decoding[sizes.streams :])
                report["itl_s"] = latencies(setup, sizes, driver, decoding[: sizes.streams])
            if "mixed" in wanted:
                driver.end(decoding[sizes.mixed :])
                prompts, decodes = mixed_rounds(setup, sizes, driver)
                assert not any(one.finished for one in decoding[: sizes.mixed]) or sizes.mixed == 0
                driver.end(decoding)
                report |= mixed_report(sizes, [before, prompt_alone(setup, sizes, driver)], prompts, decodes)
        return report

    return by_system(SYSTEMS, measured)


def loop(sizes: Sizes, driver: Driver) -> dict[str, float]:
    """Seconds of a step of the engine's loop, and of the model's step alone for the same requests."""

    def engine_steps() -> float:
        began = time.perf_counter()
        for _ in range(sizes.steps):
            driver.step()
        return (time.perf_counter() - began) / sizes.steps

    driver.captured_seconds(2)
    driver.step()
    samples = rounds_of(sizes, engine_steps, lambda: driver.captured_seconds(sizes.steps))
    whole, step = (statistics.median(values) for values in samples)
    return {"loop_step_s": whole, "captured_step_s": step, "loop_over_step": whole / step}


def prompt_alone(setup: Setup, sizes: Sizes, driver: Driver) -> float:
    """Seconds of a prompt while nothing decodes."""
    return driver.seconds([setup.prompt(beside(setup, sizes))])


def beside(setup: Setup, sizes: Sizes) -> int:
    """Tokens of a prompt that takes `chunks` steps, alone and beside requests that decode."""
    return sizes.chunks * (setup.mixed_chunk - sizes.mixed)


def mixed_rounds(setup: Setup, sizes: Sizes, driver: Driver) -> tuple[list[list[StepTime]], list[float]]:
    """Steps of prompts beside requests that decode, and seconds of steps of these requests alone, in turns."""
    prompts: list[list[StepTime]] = []
    decodes: list[float] = []

    def alone() -> float:
        decodes.extend(driver.step().seconds for _ in range(sizes.steps))
        return 0.0

    def mixed() -> float:
        [arriving] = driver.add([setup.prompt(beside(setup, sizes))], 1)
        prompts.append([step for step in driver.run([arriving]) if step.prompt_tokens])
        return 0.0

    mixed()
    prompts.clear()  # what the first mixed steps cost beyond the others is `first_steps`' matter
    rounds_of(sizes, alone, mixed)
    return prompts, decodes


def mixed_report(sizes: Sizes, alone: Sequence[float], prompts: list[list[StepTime]], decodes: list[float]) -> dict[str, float]:
    decode, chunks = statistics.median(decodes), statistics.median(len(steps) for steps in prompts)
    whole, apart = statistics.median(sum(step.seconds for step in steps) for steps in prompts), statistics.mean(alone)
    return {
        "mixed_step_s": whole / chunks,
        "chunk_step_s": apart / sizes.chunks,
        "decode_step_s": decode,
        "mixed_over_parts": whole / (apart + chunks * decode),
        "mixed_over_bound": whole / (apart + 1.2 * chunks * decode),  # what a mixed step may take
    }


def latencies(setup: Setup, sizes: Sizes, driver: Driver, streams: Sequence[Generation]) -> dict[str, float]:
    """p50 and p99 of the seconds between two tokens of a stream while prompts come, and of steps in which none does."""
    gaps: list[float] = []
    quiet: list[float] = []

    def step() -> None:
        taken = driver.step()
        if not taken.prompt_tokens:
            quiet.append(taken.seconds)
        for place, one in enumerate(streams):
            before, now = seen[place], one.last_token_at
            if now != before:
                if before is not None and now is not None:
                    gaps.append(now - before)
                seen[place] = now

    driver.step()
    seen = [one.last_token_at for one in streams]
    for _ in range(sizes.arrivals):
        [arriving] = driver.add([setup.prompt(sizes.arriving)], 1)
        while not arriving.finished:
            step()
        for _ in range(sizes.steps):
            step()
    gaps.sort()
    return {
        "p50": statistics.median(gaps),
        "p99": gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))],
        "decode_only": statistics.median(quiet),
    }


# First steps ----------------------------------------------------------------------------------------------------------


def first_steps(setup: Setup, sizes: Sizes) -> Report:
    """Every step of an engine from the moment at which a server says it is ready, against the median of its kind."""
    # While the last of the prompts are computed, the first ones decode.
    meanwhile = 2 * max(sizes.sizes) * -(-sizes.crossing // setup.mixed_chunk)
    output = 2 * sizes.steps + sizes.chunks + meanwhile + 8
    longest = max(sizes.crossing + output, sizes.chunks * setup.mixed_chunk + NEW_QUESTION)

    def measured(system: str) -> Report:
        kinds: dict[str, list[float]] = defaultdict(list)
        with setup.engine(system, seats=max(sizes.sizes) + 1, longest=longest) as driver:
            driver.engine.warm_up()
            for requests in sizes.sizes:
                added = driver.add(fresh_prompts(setup, requests, sizes.crossing), output)
                left = 2 * sizes.steps
                while left:
                    count(driver, kinds)
                    left -= all(one.request.decoding for one in added)
                [arriving] = driver.add([setup.prompt(sizes.chunks * setup.mixed_chunk)], 1)
                while not arriving.finished:
                    count(driver, kinds)
                driver.end(added)
        found = {
            kind: {"steps": len(seconds), "worst_s": max(seconds), "median_s": statistics.median(seconds)}
            for kind, seconds in kinds.items()
        }
        worst = max(one["worst_s"] / one["median_s"] for one in found.values())
        return {"worst_step_after_ready_over_median": worst, "steps_by_kind": found}

    return by_system(ON_DEVICE, measured)


def count(driver: Driver, kinds: dict[str, list[float]]) -> None:
    """Run a step and put it with those of its kind: mixed ones together, whatever decodes in them."""
    step = driver.step(wait=True)
    kind = f"{step.decodes} decodes" if not step.prompt_tokens else "mixed" if step.decodes else "chunks"
    kinds[kind].append(step.seconds)

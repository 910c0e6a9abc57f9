"""What a grammar costs a step: decode steps of many requests that follow a JSON schema, against the same number that are free.

    python benchmarks/structured_outputs.py nano
    python benchmarks/structured_outputs.py MODEL_DIRECTORY --load-format dummy --device cuda --prompt 4096

On a CPU two engines, one whose requests are free and one whose follow the schema, take turns step by step, so that both see the
same machine, and ratios are those of neighbouring steps. On a GPU, where a step runs on while the host has gone on to the next,
batches take turns on one engine. The schema wants a long list of objects, which no output completes. Steps are timed by the clock
and, since other programs disturb it, by processor time: of the thread that runs the steps, beside which masks are written on a
CPU, and of all threads. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence

from specontext import LLM, SamplingParams, SpeContextConfig, StructuredOutputsParams
from specontext.engine.llm_engine import LLMEngine
from specontext.engine.start import pick_device

ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"type": "integer"}, "kind": {"enum": ["a", "b", "c"]}},
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": ITEM, "minItems": 1000}
WARM_UP = 5  # steps


CLOCKS = {"clock": time.perf_counter, "step_thread": time.thread_time, "all_threads": time.process_time}


Times = list[float]  # seconds of a step, by each clock


def begin(llm: LLM, options: argparse.Namespace, wanted: StructuredOutputsParams | None, seed: int) -> LLMEngine:
    """An engine whose requests have their first tokens."""
    params = SamplingParams(temperature=1.0, seed=seed, max_tokens=options.steps, ignore_eos=True, structured_outputs=wanted)
    engine = llm.engine
    prompts = [[5 + (seed + number + place) % 100 for place in range(options.prompt)] for number in range(options.requests)]
    generations = [engine.add_request(f"{seed}-{number}", ids, params, index=number) for number, ids in enumerate(prompts)]
    while not all(len(each.request.output_token_ids) for each in generations):
        engine.step()
    return engine


def step(engine: LLMEngine) -> Times:
    began = [clock() for clock in CLOCKS.values()]
    engine.step()
    return [clock() - then for clock, then in zip(CLOCKS.values(), began, strict=True)]


def steps(
    llms: Sequence[LLM], options: argparse.Namespace, wanted: StructuredOutputsParams, seed: int
) -> tuple[list[Times], ...]:
    """The decode steps of a free batch and of a constrained one, without the first and the last ones."""
    found: tuple[list[Times], list[Times]] = ([], [])
    if len(llms) == 1:
        for kind, times in zip((None, wanted), found, strict=True):
            engine = begin(llms[0], options, kind, seed)
            while engine.has_work:
                times.append(step(engine))
    else:
        pairs = [(begin(llm, options, kind, seed), times) for llm, kind, times in zip(llms, (None, wanted), found, strict=True)]
        while any(engine.has_work for engine, _ in pairs):
            pairs.reverse()
            for engine, times in pairs:
                times.append(step(engine))
    return tuple(times[WARM_UP:-WARM_UP] for times in found)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--load-format", default="auto")
    options = parser.parse_args(words)
    device = pick_device(options.device).type
    llms = [
        LLM(
            options.model,
            config=SpeContextConfig(budget=options.budget),
            device=device,
            load_format=options.load_format,
            max_num_seqs=options.requests,
            max_model_len=options.prompt + options.steps + 16,
        )
        for _ in range(2 if device == "cpu" else 1)
    ]
    wanted = StructuredOutputsParams(json=SCHEMA)
    began = time.perf_counter()
    llms[-1].engine.intake.grammars.compile(wanted)
    first = time.perf_counter() - began
    rounds = []
    for number in range(-1, options.rounds):
        free, constrained = steps(llms, options, wanted, number * 2 + 10)
        if number < 0:  # it warms up
            continue
        if len(llms) == 2:
            ratios = {
                name: statistics.median(after[clock] / before[clock] for before, after in zip(free, constrained, strict=True))
                for clock, name in enumerate(CLOCKS)
            }
        else:
            ratios = {
                name: statistics.median(times[clock] for times in constrained) / statistics.median(times[clock] for times in free)
                for clock, name in enumerate(CLOCKS)
            }
        free_ms, constrained_ms = (statistics.median(times[0] for times in each) * 1e3 for each in (free, constrained))
        rounds.append({"free_ms": free_ms, "constrained_ms": constrained_ms} | ratios)
        shown = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
        print(f"free {free_ms:7.3f} ms, constrained {constrained_ms:7.3f} ms; ratios: {shown}", flush=True)
    found = {name: statistics.median(each[name] for each in rounds) for name in CLOCKS}
    shown = ", ".join(f"{name} {ratio:.3f}" for name, ratio in found.items())
    load = os.getloadavg()[0]
    print(f"median ratios over {len(rounds)} rounds, load {load:.1f}: {shown}; vocabulary and schema {first:.2f} s")
    report = {"benchmark": "structured_outputs", "model": options.model, "requests": options.requests, "ratios": found}
    print(json.dumps(report | {"compile_s": first, "rounds": rounds}))


if __name__ == "__main__":
    main()

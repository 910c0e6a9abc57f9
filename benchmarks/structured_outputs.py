"""What a grammar costs a step: decode steps of many requests that follow a JSON schema, against the same number that are free.

    python benchmarks/structured_outputs.py nano
    python benchmarks/structured_outputs.py MODEL_DIRECTORY --load-format dummy --device cuda --prompt 4096

Free and constrained batches take turns on one engine, so that both see the same machine. The schema wants a long list of objects,
which no output completes. Steps are timed by the clock and, since other programs disturb it, by processor time: of the thread
that runs the steps, beside which masks are written on a CPU, and of all threads. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence

from specontext import LLM, SamplingParams, SpeContextConfig, StructuredOutputsParams

ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"type": "integer"}, "kind": {"enum": ["a", "b", "c"]}},
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": ITEM, "minItems": 1000}
WARM_UP = 5  # steps


CLOCKS = {"clock": time.perf_counter, "step_thread": time.thread_time, "all_threads": time.process_time}


def batch(llm: LLM, options: argparse.Namespace, wanted: StructuredOutputsParams | None, seed: int) -> dict[str, float]:
    """Median seconds of a batch's decode steps, by each clock."""
    params = SamplingParams(temperature=1.0, seed=seed, max_tokens=options.steps, ignore_eos=True, structured_outputs=wanted)
    engine = llm.engine
    prompts = [[5 + (seed + number + place) % 100 for place in range(options.prompt)] for number in range(options.requests)]
    generations = [engine.add_request(f"{seed}-{number}", ids, params, index=number) for number, ids in enumerate(prompts)]
    while not all(len(each.request.output_token_ids) for each in generations):
        engine.step()
    times = []
    while engine.has_work:
        began = [clock() for clock in CLOCKS.values()]
        engine.step()
        times.append([clock() - then for clock, then in zip(CLOCKS.values(), began, strict=True)])
    medians = map(statistics.median, zip(*times[WARM_UP:-WARM_UP], strict=True))
    return dict(zip(CLOCKS, medians, strict=True))


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
    llm = LLM(
        options.model,
        config=SpeContextConfig(budget=options.budget),
        device=options.device,
        load_format=options.load_format,
        max_num_seqs=options.requests,
        max_model_len=options.prompt + options.steps + 16,
    )
    wanted = StructuredOutputsParams(json=SCHEMA)
    began = time.perf_counter()
    llm.engine.grammars.compile(wanted)
    first = time.perf_counter() - began
    rounds = []
    for number in range(-1, options.rounds):
        free, constrained = (batch(llm, options, kind, number * 2 + 10) for kind in (None, wanted))
        if number >= 0:  # the one before warms up
            ratios = {name: constrained[name] / free[name] for name in CLOCKS}
            rounds.append({"free_ms": free["clock"] * 1e3, "constrained_ms": constrained["clock"] * 1e3} | ratios)
            shown = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
            print(
                f"free {free['clock'] * 1e3:7.3f} ms, constrained {constrained['clock'] * 1e3:7.3f} ms; ratios: {shown}",
                flush=True,
            )
    found = {name: statistics.median(each[name] for each in rounds) for name in CLOCKS}
    shown = ", ".join(f"{name} {ratio:.3f}" for name, ratio in found.items())
    load = os.getloadavg()[0]
    print(f"median ratios over {len(rounds)} rounds, load {load:.1f}: {shown}; vocabulary and schema {first:.2f} s")
    report = {"benchmark": "structured_outputs", "model": options.model, "requests": options.requests, "ratios": found}
    print(json.dumps(report | {"compile_s": first, "rounds": rounds}))


if __name__ == "__main__":
    main()

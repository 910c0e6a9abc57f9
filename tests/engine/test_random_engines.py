"""Engines and requests drawn by chance: what a request gets is what it gets alone, resident and in one chunk, or words."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from specontext import LLM, SamplingParams
from specontext.errors import MemoryPlanError, RequestError
from tests.engine.test_equality import check_idle

FAMILIES = ("llama", "bands", "windows", "chunks", "delta", "conv", "latents")
METHODS = ("full", "speculative", "shared-oracle", "quest", "h2o", "streaming", "snapkv", "oracle")


def random_params(rng: random.Random) -> SamplingParams:
    options: dict[str, Any] = {
        "max_tokens": rng.choice((1, 5, 17)),
        "temperature": rng.choice((0.0, 1.0)),
        "seed": rng.randrange(9),
    }
    options |= rng.choice(({}, {"stop": ["e"]}, {"repetition_penalty": 1.3}, {"min_tokens": 1}, {"logprobs": 2}))
    return SamplingParams(ignore_eos=rng.random() < 0.5, **options)


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 60))])
def test_any_engine(seed: int, make_llm: Callable[..., LLM], tokenizer: Any) -> None:
    rng = random.Random(seed)
    family, method, budget, page_size = (
        rng.choice(FAMILIES),
        rng.choice(METHODS),
        rng.choice((8, 24, 200)),
        rng.choice((1, 7, 16)),
    )
    common = {"budget": budget, "page_size": page_size, "methods": (method,)}
    options: dict[str, Any] = {
        "offload_layers": rng.choice((None, 0, 1, 2, -1)),
        "max_num_seqs": rng.choice((1, 2, 4)),
        "max_num_batched_tokens": rng.choice((2, 9, 64, 1024)),
        "enable_prefix_caching": rng.random() < 0.6,
        "verify_loads": rng.random() < 0.5,
    }
    options |= {"slots": budget + rng.choice((0, 3, 40))} if rng.random() < 0.4 else {}
    options |= {"gpu_memory": int(2 ** rng.uniform(17, 22))} if rng.random() < 0.4 else {}
    try:
        llm = make_llm(family, method, **common, **options)
    except MemoryPlanError:
        return
    alone, engine, known = make_llm(family, method, **common, offload_layers=0, enable_prefix_caching=False), llm.engine, []
    shared = [rng.randrange(4, len(tokenizer)) for _ in range(90)]
    waiting = [
        (
            shared[: rng.choice((0, 20, 60))] + [rng.randrange(4, len(tokenizer)) for _ in range(rng.choice((1, 7, 30)))],
            random_params(rng),
        )
        for _ in range(4)
    ]
    while waiting or engine.has_work:
        if waiting and (rng.random() < 0.4 or not engine.has_work):
            prompt, params = waiting.pop()
            try:
                engine.intake.check(prompt, params)
            except RequestError:  # memory is too small for it
                continue
            known.append((engine.add_request(f"r{len(known)}", prompt, params), prompt, params))
        if known and rng.random() < 0.02 and not known[-1][0].finished:
            engine.abort(known.pop()[0].request.request_id)
        if engine.has_work:
            engine.step()
            engine.check_integrity()
    check_idle(llm)
    for generation, prompt, params in known:
        if not generation.request.preemptions or method == "full":
            assert generation.request.output_token_ids == alone.generate([prompt], params)[0].token_ids, (family, method, options)

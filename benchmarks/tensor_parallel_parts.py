"""What one process of `tensor_parallel.py` measures: the sums of ranks alone, or the steps of one engine."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from engine_runs import Driver
from measure import clock, machine

from specontext.config import EngineConfig, SpeContextConfig
from specontext.engine.parallel_engine import make_engine
from specontext.evaluation.paper.shapes import config_of, word_tokenizer
from specontext.locations import read_config, resolve_model_path
from specontext.memory.facts import ModelFacts, facts_of_config
from specontext.memory.presets import PRESETS
from specontext.memory.sharing import Share
from specontext.memory.speed import decode_floor, measure_bandwidths
from specontext.models.ranks import Ranks

PARTS = ("sums", "resident", "large", "host")
WARM = 12  # decode steps before those that are timed
SPARE = 4  # after them
CHUNK = 8192  # tokens of prompts in a step


def run_part(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of a part, as they come."""
    yield from sums(part) if part["kind"] == "sums" else steps(part)


def facts_of(part: dict[str, Any]) -> ModelFacts:
    """Sizes of the whole model."""
    config = read_config(resolve_model_path("nano")) if part["model"] == "nano" else config_of(part["model"])
    return facts_of_config(part["model"], config, dtype=getattr(torch, part["dtype"]))


# Sums -----------------------------------------------------------------------------------------------------------------


def sums(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a step pays for several ranks: two sums a layer and the logits, for each number of requests."""
    size, device = part["ranks"], torch.device("cuda:0" if part["device"] == "cuda" else "cpu")
    ranks = Ranks(Share(0, size))
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_other, args=(part, rank, ranks.port), daemon=True) for rank in range(1, size)]
    for process in others:
        process.start()
    for requests, milliseconds in _sums(part, ranks, device):
        yield {"model": part["model"], "ranks": size, "requests": requests, "sums_ms": milliseconds}
    for process in others:
        process.join(20)
    ranks.close()


def _other(part: dict[str, Any], rank: int, port: int) -> None:
    device = torch.device(f"cuda:{rank}" if part["device"] == "cuda" else "cpu")
    ranks = Ranks(Share(rank, part["ranks"]), port)
    list(_sums(part, ranks, device))
    ranks.close()


@torch.inference_mode()
def _sums(part: dict[str, Any], ranks: Ranks, device: torch.device) -> list[tuple[int, float]]:
    """Median milliseconds by number of requests."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ranks.connect(device)
    shape, found = facts_of(part).shape, []
    for requests in sorted({requests for requests, _ in part["cases"]}):
        states = torch.zeros((requests, shape.hidden_size), dtype=shape.dtype, device=device)
        own = ranks.share.outputs(shape.vocab_size)
        logits = torch.zeros((requests, own.stop - own.start), dtype=shape.dtype, device=device)

        def step(states: torch.Tensor = states, logits: torch.Tensor = logits) -> None:
            for _ in range(2 * shape.depth):
                ranks.sum_(states)
            ranks.gather(logits, shape.vocab_size)

        step()
        run: Any = step
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                step()
            run = graph.replay
        times = []
        for _ in range(part["steps"]):
            began = clock(device)
            run()
            times.append(clock(device) - began)
        found.append((requests, 1000 * statistics.median(times)))
    return found


# Steps ----------------------------------------------------------------------------------------------------------------


def steps(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """An engine's decode steps in each case."""
    size, cuda = part["ranks"], part["device"] == "cuda"
    whole = facts_of(part)
    facts = Share(0, size).facts(whole)
    device = torch.device("cuda:0" if cuda else "cpu")
    speed = measure_bandwidths(device, 1 << (30 if cuda else 26))
    if cuda:
        torch.cuda.empty_cache()
    offloaded = whole.shape.layers if part["kind"] == "host" else 0
    # The first requests of a case decode until its last prompt is computed, and so many tokens more.
    tokens = {case: WARM + part["steps"] + SPARE + 2 * case[0] for case in map(tuple, part["cases"])}
    with TemporaryDirectory() as folder:
        began = time.perf_counter()
        engine = make_engine(_settings(part, whole, Path(folder)))
        try:
            engine.warm_up()
            start_s = time.perf_counter() - began
            for requests, context in part["cases"]:
                driver, generator = Driver(engine), torch.Generator().manual_seed(context)
                output = tokens[requests, context]
                shape = (requests, context - output)
                prompts = torch.randint(whole.shape.vocab_size, shape, generator=generator).tolist()
                began = clock(device)
                added = driver.start(prompts, output)
                prompt_s = clock(device) - began
                for _ in range(WARM):
                    driver.step()
                timed = [driver.step() for _ in range(part["steps"])]
                assert all(step.decodes == requests and not step.prompt_tokens for step in timed), "requests ended too early"
                times = [step.seconds for step in timed]
                driver.run(added)
                stats = [one.stats for one in added if one.stats is not None]
                loaded = size * sum(one.bytes_loaded_per_step or 0.0 for one in stats)
                overlap = [one.overlap for one in stats if one.overlap is not None]
                mean = statistics.mean(overlap) if overlap else None
                floor = decode_floor(
                    facts,
                    speed,
                    length=context,
                    requests=requests,
                    offloaded=offloaded,
                    budget=part["budget"],
                    overlap=mean or 0.0,
                )
                yield {
                    "model": part["model"],
                    "ranks": size,
                    "kv": "host" if offloaded else "resident",
                    "large": part["kind"] == "large",
                    "requests": requests,
                    "context": context,
                    "step_ms": 1000 * statistics.median(times),
                    "step_ms_p90": 1000 * statistics.quantiles(times, n=10)[-1],
                    "floor_ms": 1000 * floor.seconds,
                    "overlap": mean,
                    "loaded_bytes": loaded,
                    "captured": min((one.captured_steps for one in stats), default=0) > 0,
                    "prompt_s": prompt_s,
                    "prompt_tokens_s": requests * (context - output) / prompt_s,
                    "start_s": start_s,
                    "device_gb_s": speed.device / 1e9,
                    "host_gb_s": speed.host / 1e9,
                    "offloaded_layers": len(engine.parts.kv.offloaded),
                    "machine": machine(device),
                }
                engine.reset_prefix_cache()
        finally:
            engine.close()


def _settings(part: dict[str, Any], whole: ModelFacts, folder: Path) -> EngineConfig:
    """An engine for all cases of a part: as many seats as the largest, and memory for its KV."""
    model = part["model"]
    if model in PRESETS:
        config_of(model).save_pretrained(folder)
        word_tokenizer(whole.shape.vocab_size).save_pretrained(folder)
    most = max(requests for requests, _ in part["cases"])
    longest = max(context for _, context in part["cases"])
    host = max(requests * context for requests, context in part["cases"]) + 64 * most
    needed = int(1.1 * host * whole.kv_bytes_per_token) if part["kind"] == "host" else 1 << 28
    return EngineConfig(
        str(folder) if model in PRESETS else model,
        method=SpeContextConfig(budget=part["budget"], offload_layers=-1 if part["kind"] == "host" else 0),
        load_format="dummy" if model in PRESETS else "auto",
        device=part["device"],
        dtype=part["dtype"],
        tensor_parallel_size=part["ranks"],
        max_num_seqs=most,
        min_num_seqs=most,
        max_model_len=longest + 8,
        max_num_batched_tokens=min(CHUNK, longest),
        max_num_mixed_tokens=min(CHUNK, longest),  # requests that decode wait for prompts, or they would end before the last one
        gpu_memory=None if part["device"] == "cuda" else 1 << 30,
        host_memory=part["host_memory"] or needed * max(1, part["ranks"] // whole.shape.kv_heads),
    )

"""What is measured of a column: prefill and decode steps of Hugging Face's systems and of ours, and what they take at least."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from specontext.config import EngineConfig
from specontext.engine.build import facts_of_loaded
from specontext.engine.llm_engine import LLMEngine
from specontext.errors import DeviceMemoryError, HostMemoryError, MemoryPlanError
from specontext.evaluation.paper import hugging_face
from specontext.evaluation.paper.columns import Column, Scale
from specontext.evaluation.paper.hugging_face import Theirs
from specontext.evaluation.paper.loop import FULL, Way, free, looping, mean_step, now
from specontext.evaluation.paper.progress import Progress
from specontext.evaluation.paper.setup import Setup
from specontext.evaluation.paper.shapes import DTYPES, TINY, random_model, word_tokenizer
from specontext.memory.facts import NO_HEAD
from specontext.memory.free import free_host_memory
from specontext.memory.probe import machine_speed
from specontext.memory.speed import Bandwidths, decode_floor, measure_bandwidths, measure_products, prefill_operations
from specontext.models.attention import ATTENTION_NAME
from specontext.models.compiled import keep_compiled
from specontext.retrieval.random_head import random_head
from specontext.sampling_params import SamplingParams

SHARE_OF_GPU, SHARE_OF_HOST = 0.9, 0.6
STATIC_SHARE = 0.8  # of the memory that a static cache may take beside the weights
MORE_AWAY = 3  # layers that may be on the host beyond those that were planned
LEAST_CHUNK = 64  # tokens of a prompt that Hugging Face reads at once
TOO_MUCH = (torch.OutOfMemoryError, MemoryPlanError, DeviceMemoryError, HostMemoryError)
Row = dict[str, Any]


class TheirStep(NamedTuple):
    """Seconds of a step of Hugging Face's: with the faster choice of attention kernels, and as PyTorch chooses by itself."""

    seconds: float
    by_default: float


@dataclass(frozen=True)
class Bench(Setup):
    """Measures on a setup.

    Attributes:
        progress: what was measured of the part that runs.
    """

    progress: Progress = field(default_factory=Progress)

    # What they take ---------------------------------------------------------------------------------------------------

    def steps(self, way: Way, column: Column, requests: int, lengths: Sequence[int]) -> dict[int, tuple[float, int]]:
        """Seconds of a step by length, with the layers that were on the host.

        At the model's own maximum the steps that are timed are the last ones before it. Where an engine has less room than was
        planned, since it measures its buffers, more layers are on the host, if they may be.
        """
        found = {}
        for length in lengths:
            away = self.away(way, requests, length, column.longest)
            if away is None:
                raise torch.OutOfMemoryError(f"{requests} requests of {length} tokens do not fit")
            most = min(away + MORE_AWAY, self.facts.shape.layers) if way.method == "speculative" else away
            while length not in found:
                with suppress(*(TOO_MUCH if away < most else ())):
                    found[length] = self._step(way, requests, length, away), away
                if length not in found:
                    free(self.device)  # which what was raised held
                    away += 1
        return found

    def _step(self, way: Way, requests: int, length: int, away: int) -> float:
        """Seconds of a step of so many requests with some layers on the host."""
        room = self.scale.warm_up + self.scale.steps + 1
        with looping(
            self.loaded,
            way,
            requests=requests,
            context=max(min(length, self.loaded.shape.reach - room), self.scale.budget + room),
            budget=self.scale.budget,
            away=away,
            overlap=self.overlap,
            room=room,
            chunk=self.chunk,
        ) as loop:
            return mean_step(loop, warm_up=self.scale.warm_up, steps=self.scale.steps)

    def ours(self, way: Way, column: Column, requests: int) -> Row:
        """A row of one of our systems."""
        steps = self.steps(way, column, requests, self._lengths(column))
        prefill = requests * self.prefill_s(way, column.prompt) if column.output else 0.0
        row = self.row(way.name, way.words, column, requests, {n: s for n, (s, _) in steps.items()}, prefill)
        row["offloaded_layers"] = {str(length): away for length, (_, away) in steps.items()}
        row["expected_tokens_per_s"] = self.expected(way, column, requests)
        return row | self._floor(way, column, requests, {n: a for n, (_, a) in steps.items()}, row["decode_s"])

    def theirs(self, way: Theirs, column: Column, requests: int) -> Row:
        """A row of one of Hugging Face's systems.

        A single request runs as far as memory goes, which `reached` then says, and its prompt is read in chunks where it does
        not fit at once (`prefill_chunk`).
        """
        lengths = self._lengths(column) if way.cache != "offloaded" else [column.prompt, column.longest]
        reached = self._their_reach(way, lengths) if requests == 1 and way.cache == "dynamic" else {}
        steps = reached or self._their_steps(way, requests, lengths)
        one, chunk = self._their_prompt(way, column.prompt, in_chunks=requests == 1) if column.output else (0.0, None)
        ended, last = column, max(steps)
        if last < column.longest:
            ended = replace(column, output=last - column.prompt)
        row = self.row(way.name, way.words, ended, requests, {n: step.seconds for n, step in steps.items()}, requests * one)
        if any(step.by_default > step.seconds for step in steps.values()):
            row["step_s_by_default"] = {str(length): step.by_default for length, step in steps.items()}
        row |= self._floor(FULL, ended, requests, dict.fromkeys(steps, 0), row["decode_s"])
        row |= {} if chunk is None else {"prefill_chunk": chunk}
        return row if ended == column else row | {"output": column.output, "reached": last}

    def _their_prompt(self, way: Theirs, tokens: int, *, in_chunks: bool) -> tuple[float, int | None]:
        """Seconds of a prompt, and the tokens of its chunks where it does not fit at once."""
        chunk: int | None = None
        while True:
            try:
                return hugging_face.prefill_seconds(self.loaded, way, tokens, repeats=1, chunk=chunk), chunk
            except TOO_MUCH:
                chunk = (chunk or tokens) // 2
                if not in_chunks or chunk < LEAST_CHUNK:
                    raise
                free(self.device)

    def _their_reach(self, way: Theirs, lengths: Sequence[int]) -> dict[int, TheirStep]:
        """A single request's steps by length, as far as memory goes; nothing where it does not go on."""
        found: dict[int, TheirStep] = {}
        for length in lengths:
            try:
                found |= self._their_steps(way, 1, [length])
            except TOO_MUCH:
                free(self.device)
                break
        return found if len(found) >= min(2, len(lengths)) else {}

    def most_of_theirs(self, way: Theirs, column: Column) -> int | None:
        """The number of requests, among doubling ones, with which Hugging Face makes the most tokens a second, by three steps of
        each that fits; of a static cache the most that fit, since each number would be compiled for itself."""
        counts = [requests for requests in (1, 4, 8, 16, 32, 64) if requests <= self.scale.most_requests]
        if way.cache == "static":
            weights = self.facts.weight_bytes if self.device.type == "cuda" else 0
            room = STATIC_SHARE * self.memory - weights
            fitting = [n for n in counts if n * column.longest * self.facts.kv_bytes_per_token <= room]
            return fitting[-1] if fitting else None
        best: tuple[float, int] | None = None
        for requests in counts:
            try:
                self._their_steps(way, requests, [column.longest], steps=1)
                [(seconds, _)] = self._their_steps(way, requests, column.lengths(1), steps=3).values()
            except TOO_MUCH:
                free(self.device)
                break
            best = max(best or (0.0, 0), (requests / seconds, requests))
        return None if best is None else best[1]

    def _their_steps(
        self, way: Theirs, requests: int, lengths: Sequence[int], *, steps: int | None = None
    ) -> dict[int, TheirStep]:
        """Steps by length, at their best of the kernels that PyTorch can choose from."""
        warm_up, steps = (self.scale.warm_up, self.scale.steps) if steps is None else (steps - 1, steps)
        if way.cache == "offloaded":  # all KV comes over the bus in every step
            warm_up, steps = 1, min(steps, 2)
        measure = partial(hugging_face.decode_steps, self.loaded, way, requests=requests, lengths=lengths)
        default, *others = (
            measure(warm_up=warm_up, steps=steps, cudnn=cudnn) for cudnn in hugging_face.kernel_choices(way, self.device)
        )
        return {n: TheirStep(min([seconds, *(other[n] for other in others)]), seconds) for n, seconds in default.items()}

    def prefill_s(self, way: Way, length: int) -> float:
        """Seconds of a prompt up to its first token in our engine, of some that come at once; the best of two."""
        count = self.scale.prefills

        def timed(engine: LLMEngine, turn: int) -> float:
            prompts = [self.prompt(length, count * turn + number) for number in range(count)]
            began = now(self.device)
            self.generate(engine, prompts, 1, f"{turn}-")
            return (now(self.device) - began) / count

        with_engine = self.engine(way, seats=count, longest=max(length + 1, min(length + 16, self.loaded.shape.reach)))
        try:
            return min([timed(with_engine, turn) for turn in range(3)][1:])
        finally:
            with_engine.close()
            free(self.device)

    def engine(self, way: Way, *, seats: int, longest: int) -> LLMEngine:
        """An engine as `LLM` starts it."""
        self.loaded.model.set_attn_implementation(ATTENTION_NAME)
        method = replace(way.config(self.scale.budget, 0), offload_layers=None)
        config = EngineConfig(
            self.loaded.name,
            method=method,
            methods=(),
            load_format="dummy",
            max_num_seqs=seats,
            max_model_len=longest,
            max_num_batched_tokens=self.chunk,
            enable_prefix_caching=False,
            enforce_eager=not way.captured,
            compile=way.captured,
        )
        return LLMEngine(config, self.loaded)

    def prompt(self, length: int, seed: int) -> list[int]:
        """Random tokens."""
        generator = torch.Generator().manual_seed(seed)
        tokens: list[int] = torch.randint(self.loaded.shape.vocab_size, (length,), generator=generator).tolist()
        return tokens

    def generate(self, engine: LLMEngine, prompts: Sequence[list[int]], tokens: int, prefix: str = "") -> None:
        """Run prompts to their end, as `LLM.generate` does."""
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        for number, prompt in enumerate(prompts):
            engine.add_request(f"{prefix}{number}", prompt, params, awaited=False)
        while engine.has_work:
            engine.step()

    # Rows -------------------------------------------------------------------------------------------------------------

    def _lengths(self, column: Column) -> list[int]:
        return column.lengths(self.scale.points) if column.output else [column.prompt]

    def row(self, name: str, words: str, column: Column, requests: int, steps: dict[int, float], prefill: float) -> Row:
        """What was measured of a system, and tokens a second of the whole column."""
        decode = column.decode_seconds(steps) if column.output else steps[column.prompt]
        return {
            "model": self.loaded.name,
            "column": column.name,
            "prompt": column.prompt,
            "output": column.output,
            "system": name,
            "words": words,
            "requests": requests,
            "tokens_per_s": requests * max(column.output, 1) / (prefill + decode),
            "decode_tokens_per_s": requests * max(column.output - 1, 1) / decode,
            "prefill_s": prefill,
            "decode_s": decode,
            "step_s": {str(length): seconds for length, seconds in steps.items()},
            "sampled": bool(column.output),
        }

    def _floor(self, way: Way, column: Column, requests: int, away: dict[int, int], decode: float) -> Row:
        """The least that decoding and prefill could take: bytes over bandwidths, products over their rate."""
        full = way.method == "full"
        facts = replace(self.facts, head=NO_HEAD) if full else self.facts
        speed = Bandwidths(self.machine.device, self.machine.host)
        steps = {
            length: decode_floor(
                facts,
                speed,
                length=length,
                requests=requests,
                offloaded=layers,
                budget=length if full else self.scale.budget,
                overlap=self.overlap,
            ).seconds
            for length, layers in away.items()
        }
        floor = column.decode_seconds(steps) if column.output else steps[column.prompt]
        prefill = requests * prefill_operations(facts, column.prompt) / self.machine.products if column.output else 0.0
        return {"decode_floor_s": floor, "prefill_floor_s": prefill, "decode_over_floor": decode / floor}


def open_bench(
    model: str, scale: Scale, device: torch.device, *, memory: int | None, host_memory: int | None, overlap: float
) -> Bench:
    """Random weights and a random head in a model's shape on a device."""
    changes: dict[str, Any] = TINY if scale.tiny else {}
    loaded = random_model(model, DTYPES[scale.dtype], device, **changes)
    loaded = replace(loaded, tokenizer=word_tokenizer(loaded.shape.vocab_size))
    if device.type == "cuda":
        keep_compiled()
        speed = machine_speed(device)
        total = torch.cuda.get_device_properties(device).total_memory
        limit = min(memory or total, int(SHARE_OF_GPU * total))
    else:
        found, size = measure_bandwidths(device, 1 << 24), 256
        speed = replace(
            machine_speed(device), device=found.device, host=found.host, products=measure_products(device, torch.float32, size)
        )
        limit = scale.device_memory
    facts = facts_of_loaded(loaded, random_head(loaded.shape))
    return Bench(loaded, facts, speed, scale, limit, host_memory or int(SHARE_OF_HOST * free_host_memory()), overlap)


def measured(bench: Bench, name: str, words: str, column: Column, requests: int | None, measure: Callable[[], Row]) -> Row:
    """A row, as it was measured before the part was broken off or as it is measured now; or why there is none."""
    key = f"{name}, {column.name} of {column.prompt}, {requests} requests, overlap {bench.overlap:g}"
    return dict(bench.progress.once(key, lambda: _measured(bench, name, words, column, requests, measure)))


def _measured(bench: Bench, name: str, words: str, column: Column, requests: int | None, measure: Callable[[], Row]) -> Row:
    broken: Row = {}
    try:
        if requests is not None:
            return measure()
        error = "not even one request fits"
    except TOO_MUCH as failed:
        free(bench.device)
        error, broken = f"{requests} requests do not fit: {first_line(failed)}", {"too_many": True}
    except Exception as failed:  # the systems beside it are measured all the same, and the part is not kept
        traceback.print_exc()
        free(bench.device)
        error, broken = f"it failed: {first_line(failed)}", {"failed": True}
    nothing: Row = dict.fromkeys(("tokens_per_s", "decode_tokens_per_s", "prefill_s", "decode_s", "step_s"))
    return (
        nothing
        | broken
        | {
            "model": bench.loaded.name,
            "column": column.name,
            "prompt": column.prompt,
            "output": column.output,
            "system": name,
            "words": words,
            "requests": requests,
            "sampled": False,
            "error": error,
        }
    )


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    return next(iter(str(error).splitlines()), type(error).__name__)

"""Engines as `LLM` starts them, driven step by step as a server's loop does, and Hugging Face's prefill of the same weights."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import specontext  # noqa: F401  # isort: skip  # before torch: it says how torch's threads wait
import torch
from measure import clock
from transformers import DynamicCache

from specontext.config import EngineConfig, SpeContextConfig
from specontext.engine.generation import Generation
from specontext.engine.llm_engine import LLMEngine
from specontext.evaluation.paper.shapes import DTYPES, random_model, word_tokenizer
from specontext.memory.presets import PRESETS
from specontext.models.attention import attention_of
from specontext.models.checking import cache_name
from specontext.models.loading import LoadedModel, load_model
from specontext.sampling_params import SamplingParams

SYSTEMS = ("full", "speculative", "host")  # the last one is speculative with the KV of all layers on the host


@dataclass(frozen=True)
class StepTime:
    """One step of an engine: seconds of the host's clock, decode tokens, and tokens of prompts."""

    seconds: float
    decodes: int
    prompt_tokens: int


@dataclass(frozen=True)
class Setup:
    """The model that all parts of a run share.

    Attributes:
        dummy: weights are random, and so is the head.
        chunk, mixed_chunk: `max_num_batched_tokens` and `max_num_mixed_tokens` of the engines; None for theirs.
    """

    loaded: LoadedModel
    dummy: bool
    budget: int
    chunk: int | None
    mixed_chunk: int | None
    generator: torch.Generator

    @property
    def device(self) -> torch.device:
        return self.loaded.model.device

    def prompt(self, tokens: int) -> list[int]:
        """Random tokens, others in every call, so that no prompt is known from an earlier one."""
        return torch.randint(self.loaded.shape.vocab_size, (tokens,), generator=self.generator).tolist()

    @contextmanager
    def engine(self, system: str, *, seats: int, longest: int, chunk: int | None = None, spill: bool = False) -> Iterator[Driver]:
        """An engine of one of SYSTEMS for so many requests of that many tokens; it is closed afterwards.

        Args:
            chunk: instead of `self.chunk`.
            spill: whether layers may leave the device where memory makes it necessary.

        Raises:
            SystemExit: layers had to leave the device of a system that is to have them there.
        """
        full = system == "full"
        # None is what LLM has: layers leave when memory makes it necessary.
        method = SpeContextConfig(
            method="full" if full else "speculative",
            budget=None if full else self.budget,
            offload_layers=-1 if system == "host" else None,
        )
        config = EngineConfig(
            self.loaded.name,
            method=method,
            load_format="dummy" if self.dummy else "auto",
            max_num_seqs=seats,
            max_model_len=longest,
            max_num_batched_tokens=chunk or self.chunk,
            max_num_mixed_tokens=self.mixed_chunk,
        )
        engine = LLMEngine(config, self.loaded)
        try:
            yield Driver(engine)
            if system != "host" and not spill and engine.parts.kv.offloaded:
                raise SystemExit(f"{system}: {seats} requests of {longest} tokens do not fit this device: choose smaller sizes")
        finally:
            engine.close()


def load(name: str, dtype: str, device: torch.device) -> tuple[LoadedModel, bool]:
    """A model, and whether its weights are random: in the shape of a public model by name, else a checkpoint."""
    if name not in PRESETS:
        return load_model(name, dtype=dtype, device=device), False
    loaded = random_model(name, DTYPES[dtype], device)
    return replace(loaded, tokenizer=word_tokenizer(loaded.shape.vocab_size)), True


class HuggingFace:
    """A model with Hugging Face's SDPA attention and cache."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded, self._device = loaded, loaded.model.device

    @torch.inference_mode()
    def first_token(self, prompt: Sequence[int]) -> int:
        """What `generate` does up to its first token: one forward pass, logits of the last token only, its KV in a cache."""
        model = self._loaded.model
        with attention_of(model, "sdpa"):
            ids, cache = torch.tensor([prompt], device=self._device), DynamicCache(config=model.config)
            logits = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_name(model): cache}).logits
        return int(logits[0, -1].argmax())

    def seconds(self, prompts: Sequence[Sequence[int]]) -> float:
        """Seconds until the first tokens of prompts are there, one prompt after the other."""
        began = clock(self._device)
        for prompt in prompts:
            self.first_token(prompt)
        return clock(self._device) - began


class Driver:
    """Runs an engine's steps and keeps what they took.

    Attributes:
        live: requests that have not ended.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self.engine, self.device = engine, engine.device
        self.live: list[Generation] = []
        self._unread: list[Generation] = []
        self._names = map(str, itertools.count())

    def add(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Generation]:
        """Queue prompts, greedy, for so many tokens each whatever they are."""
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        added = [self.engine.add_request(next(self._names), prompt, params) for prompt in prompts]
        self.live += added
        return added

    def step(self, *, wait: bool = False) -> StepTime:
        """Run a step, and read the text of the one before meanwhile.

        Args:
            wait: for all that the device was given. Without, steps that give no token return before they are computed.
        """
        before = [(one.request, one.request.computed) for one in self.live if not one.request.decoding]
        decoding = {one.request for one in self.live if one.request.decoding}
        began = clock(self.device) if wait else time.perf_counter()
        touched = self.engine.step(self._read)
        seconds = (clock(self.device) if wait else time.perf_counter()) - began
        self._unread = touched
        self.live = [one for one in self.live if not one.finished]
        decodes = sum(one.request in decoding for one in touched)
        return StepTime(seconds, decodes, sum(request.computed - computed for request, computed in before))

    def _read(self) -> None:
        for one in self._unread:
            _ = one.detokenizer.pieces  # decodes what has not been read

    def run(self, until: Sequence[Generation]) -> list[StepTime]:
        """Steps until all of these have ended."""
        steps = []
        while not all(one.finished for one in until):
            steps.append(self.step())
        return steps

    def start(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Generation]:
        """Queue prompts and run until all of them decode."""
        added = self.add(prompts, tokens)
        while any(not one.request.decoding for one in added):
            self.step()
        return added

    def seconds(self, prompts: Sequence[Sequence[int]]) -> float:
        """Seconds until the host has one token of each of some prompts that come at once. What is kept of prompts for later ones
        may still be on its way to the host then."""
        began = clock(self.device)
        self.run(self.add(prompts, 1))
        return time.perf_counter() - began

    def captured_seconds(self, steps: int) -> float:
        """Seconds of the model's step alone, as it runs for the requests that decode now: captured, on a GPU.

        The next step runs again and again, which changes nothing of what the engine knows of its requests.
        """
        self.engine.catch_up()
        schedule = self.engine.scheduler.schedule()
        assert schedule is not None and not schedule.batch.prefills
        began = clock(self.device)
        for _ in range(steps):
            self.engine.runner.run(schedule.batch)
        return (clock(self.device) - began) / steps

    def end(self, generations: Sequence[Generation]) -> None:
        """Abort requests."""
        for one in generations:
            self.engine.abort(one.request.request_id)
        self.live = [one for one in self.live if not one.finished]

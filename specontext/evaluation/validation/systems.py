"""Full attention and SpeContext, its KV on the device or in host memory, one request at a time: what it writes and how fast.

Each system is an engine of its own, as a user would start it, so captured graphs and memory are those of that system alone.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from specontext.config import SpeContextConfig
from specontext.engine.generation import Generation
from specontext.engine.llm import LLM
from specontext.errors import SpeContextError
from specontext.evaluation.run import Advance
from specontext.evaluation.suites import EvalTask, Example
from specontext.evaluation.text_tools import prompt_ids
from specontext.models.loading import LoadedModel
from specontext.sampling_params import SamplingParams

FULL, RESIDENT, OFFLOADED = "full", "speculative", "speculative, offloaded"
SYSTEMS = {FULL: ("full", 0), RESIDENT: ("speculative", 0), OFFLOADED: ("speculative", -1)}  # method, offloaded layers
WARM_UP = 8  # tokens that are generated before time counts


@dataclass(frozen=True)
class Chain:
    """What a system wrote after the prompt of the long chain of thought.

    Attributes:
        seconds: from the request to its last token.
        scores: by the rule of the task.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None
    seconds: float
    scores: dict[str, float]


@dataclass(frozen=True)
class Speed:
    """Decoding after a prompt of `context` tokens.

    Attributes:
        step_s: seconds of a token, mean over `steps` tokens.
        prefill_s: seconds to the first token, when the prompt was new.
        tokens_read, bytes_loaded, overlap: of a step, as the engine counts them.
    """

    context: int
    steps: int
    step_s: float
    prefill_s: float
    tokens_read: float | None
    bytes_loaded: float | None
    overlap: float | None


@dataclass
class SystemResult:
    """What was measured of a system.

    Attributes:
        budget: KV entries that are read, None for full attention.
        device_kv_bytes, host_kv_bytes: pools of KV, for one request of the longest context.
        peak_bytes: most memory of the GPU that was in use, weights included; None on a CPU.
        failure: why there is no more.
    """

    name: str
    budget: int | None = None
    device_kv_bytes: int | None = None
    host_kv_bytes: int | None = None
    peak_bytes: int | None = None
    chain: Chain | None = None
    speeds: list[Speed] = field(default_factory=list)
    failure: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Question:
    """The prompt of the long chain of thought."""

    task: EvalTask
    example: Example
    max_tokens: int


@dataclass(frozen=True)
class Trial:
    """What every system is asked to do.

    Attributes:
        prompts: tokens of the contexts that decoding is timed at.
        budget: KV entries; None is what the head recommends.
        steps: tokens that are timed.
        longest: tokens of the longest prompt and its output.
    """

    question: Question
    prompts: Sequence[Sequence[int]]
    budget: int | None
    steps: int
    longest: int

    @property
    def tokens(self) -> int:
        """The most that a system writes, without what warms it up."""
        return self.question.max_tokens + (self.steps + 1) * len(self.prompts)


def run_system(name: str, loaded: LoadedModel, retrieval_head: str | None, trial: Trial, advance: Advance) -> SystemResult:
    """Start a system of `SYSTEMS`, let it answer the question and time it after prompts; what fails is in the result.

    Args:
        advance: called with tokens as they come, those that warm up left out.
    """
    result, device = SystemResult(name), loaded.model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        _measure(result, loaded, retrieval_head, trial, advance)
    except SpeContextError as error:
        result.failure = str(error)
    if device.type == "cuda":
        result.peak_bytes = torch.cuda.max_memory_allocated(device)
    free_memory(device)
    return result


def _measure(result: SystemResult, loaded: LoadedModel, retrieval_head: str | None, trial: Trial, advance: Advance) -> None:
    method, offloaded = SYSTEMS[result.name]
    config = SpeContextConfig(method=method, budget=trial.budget, offload_layers=offloaded)
    head = retrieval_head if method != "full" else None
    llm = LLM(loaded, head, config, max_num_seqs=1, max_model_len=trial.longest)
    try:
        parts = llm.engine.parts
        result.budget = None if method == "full" else llm.config.budget
        result.device_kv_bytes, result.host_kv_bytes = parts.kv.arena.num_bytes, parts.kv.host.num_bytes
        result.chain = _chain(llm, trial.question, advance)
        for prompt in trial.prompts:
            result.speeds.append(_speed(llm, prompt, trial.steps, advance))
    finally:
        llm.engine.close()


def free_memory(device: torch.device) -> None:
    """Let go of the memory of an engine that is no longer in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _chain(llm: LLM, question: Question, advance: Advance) -> Chain:
    ids = prompt_ids(llm.tokenizer, question.example.prompt)
    _generate(llm, ids, WARM_UP)
    made, stats = _generate(llm, ids, question.max_tokens, advance, stop=question.example.stop)
    text, written = made.detokenizer.text, made.request.output_token_ids
    seconds = stats["ttft_s"] + (stats["tpot_s"] or 0.0) * (len(written) - 1)
    return Chain(text, written, made.request.finish_reason, seconds, question.task.score(question.example, text))


def _speed(llm: LLM, prompt: Sequence[int], steps: int, advance: Advance) -> Speed:
    _, first = _generate(llm, prompt, WARM_UP, ignore_eos=True)
    _, stats = _generate(llm, prompt, steps + 1, advance, ignore_eos=True)
    read, loaded = stats["tokens_read_per_step"], stats["bytes_loaded_per_step"]
    return Speed(len(prompt), steps, stats["tpot_s"], first["ttft_s"], read, loaded, stats["overlap"])


def _generate(
    llm: LLM, ids: Sequence[int], max_tokens: int, advance: Advance = lambda done: None, **options: Any
) -> tuple[Generation, dict[str, Any]]:
    """One greedy output and its statistics."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, **options)
    generation = llm.engine.add_request("validation", ids, params)
    try:
        while not generation.finished:
            advance(len(llm.engine.step()))
    finally:
        llm.engine.abort("validation")
    return generation, generation.stats.as_dict() if generation.stats is not None else {}


def parting(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Place of the first token in which two outputs differ; None where they are the same."""
    place = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return None if place == len(one) == len(other) else place

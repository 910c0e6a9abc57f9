"""The engine: requests go in, steps are run, tokens come out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specontext.config import EngineConfig
from specontext.core import Request
from specontext.engine.build import build_parts
from specontext.engine.failures import Failures
from specontext.engine.generation import Generation
from specontext.engine.intake import Intake
from specontext.engine.launched import Launched, Launcher
from specontext.engine.masks import Masks
from specontext.engine.output_statistics import OutputStatistics
from specontext.engine.parts import Parts
from specontext.engine.prompt_logprobs import add_prompt_logprobs, prompt_rows
from specontext.engine.rehearsal import rehearse
from specontext.engine.request_statistics import statistics_of
from specontext.engine.runner import ModelRunner, working_device
from specontext.engine.sampler import Drawn, next_tokens
from specontext.engine.scheduler import Schedule, Scheduler
from specontext.engine.start import head_of, load_configured, pick_device
from specontext.errors import ConfigError, DeviceError, DeviceMemoryError, EngineClosedError, RequestError
from specontext.kv.host_memory import settle
from specontext.memory.learning import Seen
from specontext.models.compiled import keep_compiled
from specontext.models.loading import LoadedModel
from specontext.sampling_params import SamplingParams

RESERVED_BYTES = 8 << 30  # of host memory that are ready before the first request, at most
RESERVED_STEPS = 64  # steps of prompts whose KV has room in it
UNTIL_CLOSED = ("loaded", "parts", "runner", "scheduler", "intake", "_launcher")


class LLMEngine:
    """Loads a model, holds its tiers, and runs requests step by step.

    Args:
        loaded: a model that is loaded already; None loads `config.model`.

    Attributes:
        loaded, parts, runner, scheduler: what it works with, until it is closed.
        intake: checks prompts and parameters, and makes requests of them; until then, too.
        step_tokens: tokens of prompts and outputs that the last call of `step` had computed.
        runs_ahead: where it is known what the next step does, it is launched before the tokens of this one are on the host.

    Raises:
        SpeContextError: anything in the settings or the checkpoints that does not fit.
    """

    @torch.inference_mode(False)  # what is made here is written to by steps, in whatever mode their callers are
    @torch.no_grad()
    def __init__(self, config: EngineConfig, loaded: LoadedModel | None = None) -> None:
        if config.tensor_parallel_size > 1 and (loaded is None or loaded.ranks is None):
            raise ConfigError("this runs in one process: leave tensor_parallel_size out")
        self.config = config
        self.device = loaded.model.device if loaded is not None else pick_device(config.device)
        if self.device.type == "cuda":
            keep_compiled()
        self.loaded = loaded or load_configured(config, self.device)
        head = head_of(config, self.loaded)
        self.tokenizer = self.loaded.tokenizer
        self.step_tokens = 0
        self._masks = Masks(self.device)
        self._generations: dict[str, Generation] = {}
        self._ahead: Launched | None = None
        parts = build_parts(config, self.loaded, head, self.device)
        runner = ModelRunner(
            self.loaded,
            parts,
            feature_layers=head.config.feature_layers if head is not None and head.config.variant == "features" else (),
            measure_recall=config.measure_recall,
            graphs=not config.enforce_eager,
            compiled=config.compile,
        )
        self.run_on(parts, runner)

    def run_on(self, parts: Parts, runner: ModelRunner) -> None:
        """Have all steps run on these parts from now on, and by their runner; nothing is under way."""
        assert not self._generations
        self.parts, self.runner = parts, runner
        self.scheduler = Scheduler(parts, seats=self.config.max_num_seqs)
        self.intake = Intake(self.config, self.loaded, parts, self.scheduler.check)
        self.runs_ahead = runner.captures
        self._launcher = Launcher(runner, self.scheduler, parts, self._generations, self.loaded.end_token_ids)

    @torch.inference_mode(False)
    @torch.no_grad()
    def warm_up(self) -> None:
        """Compile, capture and load now whatever requests can need on a GPU, before the first one comes; nothing is to be done on
        a CPU.

        Raises:
            DeviceMemoryError: the device is out of memory.
            DeviceError: it has failed.
        """
        host = self.parts.kv.host
        entry = sum(host.layout.layers[layer].entry_bytes for layer in host.layout.full)
        first = min(RESERVED_BYTES, RESERVED_STEPS * self.parts.step_tokens.alone * entry) if self.runner.captures else 0
        host.expect(first)
        self.runner.warm_up()
        if self.runner.captures:
            # While the driver pins memory nothing can be launched: prompts that come first are kept in what is pinned by now.
            host.reserve(first)
            rehearse(self)

    def settle(self) -> None:
        """Prepare the thread that is to run the steps, where that is not the one that has warmed up; no request is there yet.

        Raises:
            DeviceMemoryError: the device is out of memory.
            DeviceError: it has failed.
        """
        self.runner.settle()

    def add_request(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        index: int = 0,
        forced: Sequence[int] = (),
        on_logits: Callable[[Tensor], None] | None = None,
        checked: bool = False,
        awaited: bool = True,
    ) -> Generation:
        """Queue one output of a prompt.

        Args:
            index: which of the prompt's outputs it is; equal seeds give different outputs for different indices.
            checked: the prompt is what the intake's `check` returned for these parameters.
            forced, on_logits: see `Generation`.
            awaited: see `Request`.

        Raises:
            RequestError: as of `Intake.check` and `Intake.generation`; an id in use.
        """
        assert not (checked and isinstance(prompt, str))
        token_ids: list[int] = [*prompt] if checked else self.intake.check(prompt, params)
        if request_id in self._generations:
            raise RequestError(f"request id '{request_id}' is in use")
        generation = self.intake.generation(
            request_id, token_ids, params, index=index, forced=forced, on_logits=on_logits, awaited=awaited
        )
        self.scheduler.add(generation.request)
        self._generations[request_id] = generation
        return generation

    @property
    def has_work(self) -> bool:
        return not self.closed and bool(self.scheduler.running or self.scheduler.waiting)

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, meanwhile: Callable[[], None] | None = None) -> list[Generation]:
        """Run one step; the generations that got a token.

        Args:
            meanwhile: what else there is to do on the host while a GPU computes, called at most once.

        Raises:
            LogitsError: the logits of some requests are broken. They are named and have ended; all others got their tokens.
            RequestFailedError: something else broke for some requests, and the same holds.
            DeviceMemoryError: the step did not fit. Its requests are named and have ended; others may go on.
            DeviceError: the device has failed, in this step or since the one before.
        """
        ahead, self._ahead = self._ahead, None
        with working_device(0):
            schedule = self.scheduler.schedule() if ahead is None else ahead.schedule
        self.step_tokens = 0 if schedule is None or ahead is not None else len(schedule.batch.token_ids)
        if schedule is None:
            return []
        try:
            with working_device(len(schedule.batch.token_ids)):
                return self._carry_out(schedule, ahead, meanwhile)
        except DeviceMemoryError as error:
            ids = dict.fromkeys((*error.request_ids, *(request.request_id for request in schedule.requests)))
            error.request_ids = tuple(ids)
            for request_id in error.request_ids:
                self.abort(request_id)
            raise

    def _carry_out(self, schedule: Schedule, launched: Launched | None, meanwhile: Callable[[], None] | None) -> list[Generation]:
        """Run a step, or go on with one that was launched before, and receive its tokens; where it is known what the next one
        does, launch that meanwhile."""
        failures, drawn = Failures(), None
        if launched is None:
            logits, ready = self._run(schedule, failures)
        else:
            for request in launched.captured:
                request.captured_steps += request.finish_reason is None
            logits, ready, drawn = launched.logits, launched.alive, launched.drawn
        if drawn is None:
            if constrained := [r for _, r in ready if r.params.structured_outputs is not None]:
                self._masks.fill(((r, self._generations[r.request_id].constraint) for r in constrained), failures)
            if self.runs_ahead and not failures.found:
                drawn = self._launcher.draw(logits, ready)
        if drawn is not None and self.runs_ahead:
            self._launch(drawn)
        self.scheduler.prepare()
        if meanwhile is not None:
            meanwhile()
        touched = self._sample(logits, ready, failures, drawn)
        for request_id in failures.found:
            self.abort(request_id)
        if failures.found:
            raise failures.take()
        return touched

    def _run(self, schedule: Schedule, failures: Failures) -> tuple[Tensor, list[tuple[int, Request]]]:
        """Run a step: logits [requests, V] of its last tokens, and (row of them, request) pairs of those that get a token.

        Log-probabilities of its prompt tokens go to those who want them.
        """
        batch = schedule.batch
        captured = self.runner.captured_rows(batch) if self.runner.captures else ()
        if constrained := [r for r in schedule.requests if r.params.structured_outputs is not None]:
            self._masks.begin((r, self._generations[r.request_id].constraint) for r in constrained)
        rows = prompt_rows(schedule) if batch.prefills else None
        if rows is None:
            logits = self.runner.run(batch)
        else:
            logits, states = self.runner.run_with_states(batch, rows.positions)
            with failures.of(*(request.request_id for request, _ in rows.counts)):
                add_prompt_logprobs(rows, states, self.runner.logits_of, self.loaded.shape.vocab_size)
        for row in captured:
            schedule.requests[row].captured_steps += 1
        return logits, [(row, r) for row, r in self.scheduler.advance(schedule) if r.request_id not in failures.found]

    def _launch(self, drawn: Drawn) -> None:
        """Launch the step that takes the tokens that the device has chosen, where it is known."""
        launched = self._launcher.launch(drawn)
        if launched is not None:
            self.step_tokens += len(launched.schedule.batch.token_ids)
            self._ahead = launched if launched.ready else None

    def catch_up(self) -> list[Generation]:
        """Receive the tokens of a step that was launched ahead, and launch none; the generations that got one."""
        runs_ahead, self.runs_ahead = self.runs_ahead, False
        try:
            return self.step() if self._ahead is not None else []
        finally:
            self.runs_ahead = runs_ahead

    def _sample(
        self, logits: Tensor, ready: list[tuple[int, Request]], failures: Failures, drawn: Drawn | None
    ) -> list[Generation]:
        """Choose the next tokens of (row of the logits, request) pairs, or wait for those that the device has chosen."""
        if drawn is not None:
            for _, request in ready:
                request.unread -= 1
            chosen = drawn.read(failures)
        else:
            ready = [(row, request) for row, request in ready if request.request_id not in failures.found]
            chosen = next_tokens(logits, ready, failures, end_token_ids=self.loaded.end_token_ids)
        now = time.perf_counter()
        if self.parts.residency.steps >= self.parts.clock.due:
            self._look(now)
        touched = []
        for row, request, token, logprobs in chosen:
            generation = self._generations[request.request_id]
            with failures.of(request.request_id):
                if generation.on_logits is not None:
                    generation.on_logits(logits[row])
                made = len(request.token_ids) - request.prompt_length
                self._receive(generation, generation.forced[made] if made < len(generation.forced) else token, logprobs, now)
            if request.request_id in failures.found:
                continue
            touched.append(generation)
            if request.finish_reason is not None:
                self._drop(request)
        return touched

    def _look(self, now: float) -> None:
        """Let the clock learn from the steps since it looked last."""
        parts, running = self.parts, self.scheduler.running
        alike = all(r.decoding and r.choice is None for r in running) and not self.config.measure_recall
        requests = tuple(map(id, running)) if alike else ()
        moves, lengths = parts.residency.num_moves + (parts.kv.move is not None), tuple(r.computed for r in running)
        seen = Seen(now, parts.residency.steps, requests, lengths, len(parts.kv.offloaded), moves)
        parts.clock.look(seen, parts.meter.traffic)

    def _receive(self, generation: Generation, token: int, logprobs: dict[int, float] | None, now: float) -> None:
        request, params = generation.request, generation.request.params
        request.token_ids.append(token)
        if request.logprobs is not None and logprobs is not None:
            request.logprobs.append(logprobs)
        generation.first_token_at = generation.first_token_at or now
        generation.last_token_at = now
        made = len(request.token_ids) - request.prompt_length
        enough = made >= params.min_tokens
        ended = token in generation.end_token_ids
        hidden = ended and enough and not params.include_stop_str_in_output  # an end token is no part of the text
        stopped = not hidden and generation.detokenizer.append([token])
        constraint = generation.constraint
        if constraint is not None and not ended:
            constraint.accept(token, generation.detokenizer)
        if (enough and (ended or stopped)) or (constraint is not None and constraint.complete):
            request.finish_reason = "stop"
        elif made >= params.most_tokens or len(request.token_ids) >= self.parts.max_tokens:
            request.finish_reason = "length"
        if request.finish_reason is not None:
            if not stopped:
                generation.detokenizer.finish()
            if self._ahead is not None and self._ahead.counts is not None:
                self.parts.meter.take_back(request.seat, self._ahead.counts)  # a token too many was computed
            generation.stats = self._statistics(generation)

    def _statistics(self, generation: Generation) -> OutputStatistics:
        return statistics_of(generation, self.parts, weights=self.loaded.weights_note, recall=self.config.measure_recall)

    def abort(self, request_id: str) -> None:
        """End a request at once and free what it holds; unknown ids are ignored, since it may just have ended."""
        generation = self._generations.get(request_id)
        if generation is not None:
            generation.request.finish_reason = "abort"
            with suppress(DeviceError), working_device(0):  # a step has said so, or the next one will
                self._drop(generation.request)

    def _drop(self, request: Request) -> None:
        self.scheduler.finish(request)
        if self._ahead is not None and not self.scheduler.running:
            self._ahead = None
            settle()  # nobody needs its tokens, and what it writes to may be given back now
        request.history = request.allowed = None  # they lie on the device, and whoever reads the output may keep the request
        del self._generations[request.request_id]

    def check_integrity(self) -> None:
        """Raises AssertionError when a page or a table entry was lost."""
        self.parts.kv.check_integrity(self.parts.methods.held_pages)
        self.parts.prefix.check_integrity(self.scheduler.running)

    def when_lost(self, notify: Callable[[], None]) -> None:
        """Have another thread call `notify` where something the engine cannot do without is lost between two steps."""

    def raise_if_lost(self) -> None:
        """Raises RankError for what was lost."""

    def reset_prefix_cache(self) -> None:
        """Forget what is known of prompts; running requests keep what they have."""
        self.parts.prefix.reset()

    @property
    def closed(self) -> bool:
        return "parts" not in vars(self)

    def close(self) -> None:
        """End what still runs and let go of the model, both tiers and captured steps; the engine cannot be used any more.

        The model can then serve another engine. Closing again changes nothing.
        """
        if self.closed:
            return
        for request_id in list(self._generations):
            self.abort(request_id)
        settle()
        self.runner.close()
        if self.parts.kv.host.memory is not None:
            self.parts.kv.host.memory.close()
        for name in UNTIL_CLOSED:
            delattr(self, name)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in UNTIL_CLOSED:
                raise EngineClosedError("the engine was closed: make a new one")
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

"""An engine whose tokens are chosen elsewhere: it gives the logits of a request's next token, and the request is held until it
is told which one that was. Between the two it goes through the same steps as any other."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from specontext.config import EngineConfig
from specontext.core import Request
from specontext.engine.failures import Failures
from specontext.engine.generation import Generation
from specontext.engine.llm_engine import LLMEngine
from specontext.engine.output_statistics import OutputStatistics
from specontext.engine.sampler import Drawn
from specontext.errors import LogitsError, RequestError
from specontext.models.loading import LoadedModel
from specontext.sampling_params import SamplingParams


class LedEngine(LLMEngine):
    """Runs requests that are led token by token."""

    def __init__(self, config: EngineConfig, loaded: LoadedModel) -> None:
        super().__init__(config, loaded)
        self.runs_ahead = False  # the next tokens are chosen elsewhere
        self._ids = itertools.count()
        self._next_logits: dict[str, Tensor] = {}  # [V], by request

    def lead(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Generation]:
        """Queue prompts whose outputs somebody else chooses, all of them or none.

        Args:
            max_tokens: of each output, at most.

        Raises:
            RequestError: as of `Intake.check_all`; more prompts than may run at the same time.
        """
        if len(prompts) > self.config.max_num_seqs:
            raise RequestError(
                f"a batch of {len(prompts)} is more than the {self.config.max_num_seqs} outputs that may run at the same time: "
                "raise max_num_seqs, or give smaller batches"
            )
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max(1, max_tokens))
        checked = self.intake.check_all(prompts, [params] * len(prompts))
        return [self.add_request(f"led-{next(self._ids)}", prompt, params, checked=True) for prompt in checked]

    def next_logits(self, led: Sequence[Generation]) -> list[Tensor]:
        """Run steps until the next token of each is to be chosen; the logits for it, each [V].

        Raises:
            SpeContextError: what went wrong in a step; the requests concerned have ended.
        """
        while any(not one.request.held for one in led):
            if any(one.finished for one in led):
                raise RequestError("the output was ended, because something broke in a step that it shared with others")
            self.step()
        return [self._next_logits[one.request.request_id] for one in led]

    def tell(self, led: Generation, token: int) -> None:
        """Say which token was chosen after `next_logits`.

        Raises:
            RequestError: a token that the model cannot read, or one that has no place in the longest context.
        """
        request = led.request
        assert request.held
        if (wrong := self.intake.unknown([token])) is not None:
            raise RequestError(wrong)
        if len(request.token_ids) >= self.parts.max_tokens:
            raise RequestError(f"the context is full: the engine's maximum is {self.parts.max_tokens} tokens (max_model_len)")
        request.token_ids.append(token)
        request.held = False

    def end(self, led: Generation) -> OutputStatistics | None:
        """End a request and free what it holds; its statistics, unless it has ended before or nothing was computed."""
        if self.closed or led.finished:
            return led.stats
        request, made = led.request, len(led.request.token_ids) - led.request.prompt_length
        if led.first_token_at is not None and led.last_token_at is not None and request.seat >= 0:  # counters stand with the seat
            took = led.last_token_at - led.first_token_at
            # Nobody says which token was chosen last, since nothing follows it.
            led.stats = replace(self._statistics(led), completion_tokens=made + 1, tpot_s=took / made if made else None)
        self.abort(led.request.request_id)
        return led.stats

    def _sample(
        self, logits: Tensor, ready: list[tuple[int, Request]], failures: Failures, drawn: Drawn | None
    ) -> list[Generation]:
        """Instead of choosing tokens keep the logits they are to be chosen from, and hold the requests."""
        finite = logits.amax(dim=1).isfinite().tolist()
        if broken := [request.request_id for row, request in ready if not finite[row]]:
            failures.add(LogitsError(broken), *broken)
        now, touched = time.perf_counter(), []
        for row, request in ready:
            if finite[row]:
                led = self._generations[request.request_id]
                led.first_token_at = led.first_token_at or now
                led.last_token_at = now
                self._next_logits[request.request_id] = logits[row].clone()
                request.held = True
                touched.append(led)
        return touched

    def _drop(self, request: Request) -> None:
        super()._drop(request)
        self._next_logits.pop(request.request_id, None)

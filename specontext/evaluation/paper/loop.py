"""Decode steps of our engine as its loop runs them, of requests that are in the middle of a long text."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from specontext.config import SpeContextConfig
from specontext.core import Request
from specontext.engine.llm_engine import LLMEngine
from specontext.engine.long_lived import kept
from specontext.engine.parts import Parts
from specontext.engine.runner import ModelRunner
from specontext.evaluation.paper.replay import Replay, overlapping, with_own_method
from specontext.evaluation.paper.states import fill_seats, middle_config
from specontext.kv.layout import PlacedSelection
from specontext.kv.streams import PREFETCH
from specontext.models.attention import ATTENTION_NAME
from specontext.models.loading import LoadedModel
from specontext.retrieval.selector import AheadSelector, Budget
from specontext.sampling_params import SamplingParams

SELECTIONS = 16  # steps after which a replayed sequence begins again
TOKEN = 7


@dataclass(frozen=True)
class Way:
    """How our engine decodes.

    Attributes:
        name: of the system in tables.
        words: what it is.
        method: of selection; for `speculative` the selection is replayed at the overlap that is asked for.
        slots_over: share of the budget by which the slots exceed it.
        captured: steps are captured and compiled, on a GPU.
        all_away: the KV of all layers is on the host, rather than of as few as memory demands.
        waits: what is loaded has come before anything is computed.
        keeps: rows of the last step are kept; else all selected rows are loaded in every step.
    """

    name: str
    words: str
    method: str = "speculative"
    slots_over: float = 0.25
    captured: bool = True
    all_away: bool = False
    waits: bool = False
    keeps: bool = True

    def config(self, budget: int, away: int) -> SpeContextConfig:
        if self.method == "full":
            return SpeContextConfig(method="full", offload_layers=away)
        slots = budget + int(self.slots_over * budget)
        return SpeContextConfig(method=self.method, budget=budget, slots=slots, offload_layers=away)


OURS = Way("ours", "speculative, captured steps, as few layers on the host as memory demands")
FULL = Way("full", "our engine, every token is read", method="full")
QUEST = Way("quest", "our engine with Quest, which chooses in every layer", method="quest")
SHADOWKV = Way("shadowkv", "our engine with ShadowKV, which chooses in every layer", method="shadowkv")
OURS_EAGER = Way("ours, eager", "as ours, without captured steps", captured=False)
ABLATION = (
    Way(
        "C1",
        "chosen before the model runs; all layers on the host, all selected rows loaded in every step, and waited for",
        slots_over=0,
        captured=False,
        all_away=True,
        waits=True,
        keeps=False,
    ),
    Way("C1+C2", "what the last step did not select is loaded beside the layers", slots_over=0, captured=False, all_away=True),
    Way("C1+C2+C3", "only as many layers on the host as memory demands", slots_over=0, captured=False),
    Way("+ slots", "slots for a quarter more than the budget", captured=False),
    Way("+ graphs", "captured and compiled steps"),
)


class Loop:
    """An engine as `LLM` starts it, but for its requests, which have one length and did not have to be computed.

    Args:
        context: tokens of each request; there is room for `room` more.
        chunk: tokens of prompts that it could compute in a step, for which it keeps memory.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        way: Way,
        *,
        requests: int,
        context: int,
        budget: int,
        away: int,
        overlap: float,
        room: int,
        chunk: int | None = None,
    ) -> None:
        options = {"load_format": "dummy", "enforce_eager": not way.captured, "compile": way.captured}
        options |= {} if chunk is None else {"max_num_batched_tokens": chunk}
        config = middle_config(loaded, way.config(budget, away), requests, context + room, **options)
        self.device, self.engine = loaded.model.device, LLMEngine(config, loaded)
        self._replay(way, context, requests, budget, overlap)
        fill_seats(self.engine.parts, requests, context + room)
        if (memory := self.engine.parts.kv.host.memory) is not None:
            memory.finish()  # steps would wait for the driver that pins
        if way.waits:
            wait_for_loads(self.engine.parts)
        params = SamplingParams(temperature=0.0, max_tokens=room + 1, ignore_eos=True)
        for seat in range(requests):
            self._seat(self.engine.add_request(str(seat), [TOKEN] * context, params).request, seat, context, room)

    def _replay(self, way: Way, context: int, requests: int, budget: int, overlap: float) -> None:
        """Random keys have no neighbourhoods: what is used instead of their selections keeps a share of those before."""
        engine, parts = self.engine, self.engine.parts
        if way.method != "speculative":
            return
        assert isinstance(parts.selector, AheadSelector)
        limits = Budget(budget, parts.method.sink, parts.method.recent)
        drawn = overlapping(limits, context, requests, parts.selector.groups, overlap if way.keeps else 0.0, SELECTIONS)
        engine.runner.close()
        parts = with_own_method(parts, Replay(parts.selector, drawn, self.device))
        assert parts.head is not None
        layers = parts.head.config.feature_layers if parts.head.config.variant == "features" else ()
        runner = ModelRunner(
            engine.loaded, parts, feature_layers=layers, measure_recall=False, graphs=way.captured, compiled=way.captured
        )
        engine.run_on(parts, runner)

    def _seat(self, request: Request, seat: int, context: int, room: int) -> None:
        """As if all but the request's last token had been computed."""
        scheduler = self.engine.scheduler
        scheduler.waiting.remove(request)
        scheduler.running.append(request)
        request.seat, request.room = seat, context + room
        request.computed = request.prefill_length = context - 1

    def sample_as(self, **sampling: Any) -> None:
        """Choose tokens in another way from now on, as `SamplingParams` has it."""
        self.engine.catch_up()
        for request in self.engine.scheduler.running:
            request.params = replace(request.params, **sampling)

    def step(self) -> None:
        """Decode one token of every request."""
        self.engine.step()

    def seconds(self, steps: int) -> float:
        """Seconds of a step, the mean of some: a step may be launched before the one before it has ended."""
        began = now(self.device)
        for _ in range(steps):
            self.step()
        return (now(self.device) - began) / steps

    def close(self) -> None:
        """Let go of all memory, whoever still holds this object."""
        self.engine.close()
        del self.engine


def wait_for_loads(parts: Parts) -> None:
    """Compute waits for all loads as soon as they are started."""
    transfers = parts.kv.transfers
    load = transfers.load

    def loaded_first(reading: PlacedSelection, layer: int | None) -> None:
        load(reading, layer)
        transfers.join(PREFETCH)

    transfers.load = loaded_first  # type: ignore[method-assign]


@contextmanager
def looping(loaded: LoadedModel, way: Way, **options: Any) -> Iterator[Loop]:
    """A loop that gives its memory back afterwards; `options` are those of `Loop`."""
    loaded.model.set_attn_implementation(ATTENTION_NAME)
    loop = None
    try:
        loop = Loop(loaded, way, **options)
        yield loop
    finally:
        if loop is not None:
            loop.close()
        free(loaded.model.device)


def mean_step(loop: Loop, *, warm_up: int, steps: int) -> float:
    """Seconds of a step, behind others that are not counted; Python's collector passes over what is there, as in a server."""
    with kept():
        for _ in range(warm_up):
            loop.step()
        return loop.seconds(steps)


def now(device: torch.device) -> float:
    """Seconds on the host's clock, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def free(device: torch.device) -> None:
    """Give a GPU's memory back that nobody holds any more. A CPU's goes by itself, but for what cycles hold, which is little."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()

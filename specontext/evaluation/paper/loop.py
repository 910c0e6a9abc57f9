"""Decode steps of our engine as its loop runs them, of requests that are in the middle of a long text."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from specontext.config import SpeContextConfig
from specontext.core import Request, SamplingParams
from specontext.engine.build import Parts
from specontext.engine.runner import ModelRunner
from specontext.engine.sampler import sample
from specontext.engine.scheduler import Scheduler
from specontext.evaluation.paper.replay import Replay, overlapping, with_own_method
from specontext.evaluation.paper.states import parts_for
from specontext.kv.layout import PlacedSelection
from specontext.kv.streams import PREFETCH
from specontext.models.attention import ATTENTION_NAME
from specontext.models.loading import LoadedModel
from specontext.retrieval.head import RetrievalHead
from specontext.retrieval.selector import AheadSelector, Budget

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
    """Scheduler, runner and sampler over requests of one length.

    Args:
        context: tokens of each request; there is room for `room` more.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        head: RetrievalHead | None,
        way: Way,
        *,
        requests: int,
        context: int,
        budget: int,
        away: int,
        overlap: float,
        room: int,
    ) -> None:
        device = loaded.model.device
        parts = parts_for(loaded, head, way.config(budget, away), requests, context + room, device)
        if isinstance(parts.selector, AheadSelector) and way.method == "speculative":
            limits = Budget(budget, parts.method.sink, parts.method.recent)
            share = overlap if way.keeps else 0.0
            drawn = overlapping(limits, context, requests, parts.selector.groups, share, SELECTIONS)
            parts = with_own_method(parts, Replay(parts.selector, drawn, device))
        if way.waits:
            wait_for_loads(parts)
        self.device, self.loaded, self.parts = device, loaded, parts
        features = head.config.feature_layers if head is not None and head.config.variant == "features" else ()
        self.runner = ModelRunner(
            loaded, parts, feature_layers=features, measure_recall=False, graphs=way.captured, compiled=way.captured
        )
        self.scheduler = Scheduler(parts, seats=requests)
        params = SamplingParams(temperature=0.0, max_tokens=room + 1, ignore_eos=True)
        for seat in range(requests):
            request = Request(str(seat), [TOKEN] * context, context - 1, params, seed=seat, seat=seat, computed=context - 1)
            request.room = context + room
            self.scheduler.running.append(request)

    def step(self) -> float:
        """Decode one token of every request; seconds."""
        began = now(self.device)
        schedule = self.scheduler.schedule()
        assert schedule is not None
        logits = self.runner.run(schedule.batch)
        ready = [request for _, request in self.scheduler.advance(schedule)]
        self.scheduler.prepare()
        for request, token in zip(ready, sample(logits, ready, end_token_ids=frozenset()).token_ids, strict=True):
            request.token_ids.append(token)
        return now(self.device) - began

    def close(self) -> None:
        self.runner.close()
        if self.parts.kv.host.memory is not None:
            self.parts.kv.host.memory.close()


def wait_for_loads(parts: Parts) -> None:
    """Compute waits for all loads as soon as they are started."""
    transfers = parts.kv.transfers
    load = transfers.load

    def loaded_first(reading: PlacedSelection, layer: int | None) -> None:
        load(reading, layer)
        transfers.join(PREFETCH)

    transfers.load = loaded_first  # type: ignore[method-assign]


@contextmanager
def looping(
    loaded: LoadedModel,
    head: RetrievalHead | None,
    way: Way,
    *,
    requests: int,
    context: int,
    budget: int,
    away: int,
    overlap: float,
    room: int,
) -> Iterator[Loop]:
    """A loop that gives its memory back afterwards."""
    loaded.model.set_attn_implementation(ATTENTION_NAME)
    given = head if way.method == "speculative" else None
    loop = None
    try:
        loop = Loop(loaded, given, way, requests=requests, context=context, budget=budget, away=away, overlap=overlap, room=room)
        yield loop
    finally:
        if loop is not None:
            loop.close()
        del loop
        free(loaded.model.device)


def median_step(loop: Loop, *, warm_up: int, steps: int) -> float:
    """Median seconds of some steps, behind others that are not counted."""
    for _ in range(warm_up):
        loop.step()
    return statistics.median(loop.step() for _ in range(steps))


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

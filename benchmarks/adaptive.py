"""Decode speed against length while one set of requests grows through all thresholds of the memory plan.

Usage: python benchmarks/adaptive.py [--device cpu] [--model qwen3-0.6b] [--json] [--plot adaptive.png]

Three engines of method speculative share the weights and grow together:
  adaptive   layers leave the device one by one, when the memory plan says so
  never      all layers on the device, in a device tier as large as adaptive's; stops where its requests no longer fit
  all        the KV of all layers in host memory

Every timed step is one of the engine: its scheduler (with the residency policy and its moves), its runner (head, scores of all
keys, plan, loads, model, attention, statistics) and its sampler, from token to token. The engines take turns, step by step. A
step ends when the device has nothing left to do, so copies of a move count for the step beside which they run. All layers move
by the engine's own decision and code, in steps that are decoded and timed.

Simulated is what would only take time:
- prompts are not computed: requests begin as if `--start-length` tokens were stored; all stored K, V and keys are random numbers
- between measured lengths the requests jump: pages for the skipped tokens are taken from the engine's pools, and their rows and
  keys are random numbers. No jump comes nearer to a move than the steps that are measured before it
- random keys have no neighbourhoods, so the selection that is used is replayed at a stated overlap (--overlap), drawn anew over
  the whole context after each jump; the head's own selection is computed in every step all the same

A point is the median of at least 5 steps in which nothing moves, at one number of offloaded layers. A crossing compares the
steps just before a move with those just after it; its cost is also given relative to what the steps of `all` changed meanwhile,
which no move touches. Prints tables, then with --json one JSON line.

On a machine that is busy with other things, `--clock cpu` counts the process's own seconds; with one thread (OMP_NUM_THREADS=1)
they are about those of a quiet machine, and a report says which clock it has.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from adaptive_report import Round, crossings_of, points_of, show, summary_of
from measure import clock, fill, machine, versions

from specontext.config import EngineConfig, SpeContextConfig
from specontext.core import Request, Selection
from specontext.distill.new_head import HeadShape, new_head
from specontext.engine import build
from specontext.engine.admission import WATERMARK
from specontext.engine.build import Parts, build_parts
from specontext.engine.failures import Failures
from specontext.engine.long_lived import kept
from specontext.engine.runner import ModelRunner
from specontext.engine.sampler import next_tokens
from specontext.engine.scheduler import Scheduler
from specontext.evaluation.paper.replay import Replay, overlapping, with_own_method
from specontext.evaluation.paper.shapes import DTYPES, random_model
from specontext.memory.kv_cost import KVCost
from specontext.memory.planner import thresholds
from specontext.models.loading import LoadedModel, load_model
from specontext.retrieval.catalog import find_head
from specontext.retrieval.head import RetrievalHead
from specontext.retrieval.selector import Budget, LaneTokens
from specontext.sampling_params import SamplingParams

SETTLING = 3  # steps after a jump until slots hold what the new selections repeat
SELECTIONS = 16  # of a replayed sequence
FILLER = 7  # token id of skipped tokens
PAGE = 16  # tokens; the engine's default
PINNING_SECONDS = 60  # at most
KEY_PAGES = 509  # pages of random keys that repeat


@dataclass(frozen=True)
class Defaults:
    """What a model is measured with unless options say otherwise."""

    requests: int
    budget: int
    end: int
    dtype: str = "bfloat16"


DEFAULTS = {
    "nano": Defaults(4, 256, 12288, "float32"),
    "qwen3-0.6b": Defaults(1, 512, 12288),
    "llama-3.2-1b": Defaults(1, 1024, 32768),
    "llama-3.1-8b": Defaults(4, 2048, 65536),
}


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        start, end: tokens of each request.
        points: lengths that are measured besides those around moves.
        steps: timed steps of a point, and on either side of a crossing.
        device_memory: bytes of the device tier of KV, pages of the head's keys included.
        clock: "wall", or "cpu" for the process's own seconds.
    """

    requests: int
    budget: int
    slots: int
    overlap: float
    start: int
    end: int
    points: int
    steps: int
    device_memory: int
    clock: str = "wall"


class GrowingReplay(Replay):
    """A replayed sequence for requests that grow: sinks and recent tokens are those of the length they have."""

    def __init__(self, parts: Parts, selections: list[Selection], device: torch.device) -> None:
        super().__init__(parts.selector, selections, device)
        assert parts.method.budget is not None
        self.budget = Budget(parts.method.budget, parts.method.sink, parts.method.recent)

    def redraw(self, selections: list[Selection]) -> None:
        """Go on with another sequence, in the same memory."""
        self.tokens.copy_(torch.stack([selection.tokens for selection in selections]))

    def select(self, lane: LaneTokens) -> Selection:
        sequence = super().select(lane).tokens[..., self.budget.sink : self.budget.total - self.budget.recent]
        scored = sequence.index_select(0, lane.seats.clamp(max=len(sequence) - 1))  # the padding's seat is no request's
        return self.budget.compose(torch.where(lane.positions[:, None, None] < 0, -1, scored), lane.lengths)


class Engine:
    """An engine whose requests all have one length, with a way to skip tokens."""

    def __init__(self, name: str, loaded: LoadedModel, parts: Parts, case: Case) -> None:
        self.name, self.loaded, self.case, self.device = name, loaded, case, parts.kv.device
        selections = selections_of(parts, case, case.start)
        self.replay = GrowingReplay(parts, selections, self.device)
        self.parts = parts = with_own_method(parts, self.replay)
        features = parts.head.config.feature_layers if parts.head is not None else ()
        self.runner = ModelRunner(loaded, parts, feature_layers=features, measure_recall=False)
        self.scheduler = Scheduler(parts, seats=case.requests)
        self.last = self._last_length()
        self.requests = [self._request(number) for number in range(case.requests)]
        self._fill_pools()

    def _last_length(self) -> int:
        """The longest that all requests can become together."""
        residency, most = self.parts.residency, self.case.end
        numbers = range(residency.cost.layers + 1) if residency.adaptive else [len(self.parts.kv.offloaded)]
        policy = residency.policy(self.case.requests)
        fits = max(policy.capacity(number, self.case.requests) // self.case.requests for number in numbers)
        return min(fits // PAGE * PAGE, most)

    def _request(self, number: int) -> Request:
        start = self.case.start
        params = SamplingParams(temperature=0, max_tokens=max(self.last - start, 1), ignore_eos=True)
        request = Request(str(number), [FILLER] * (start + 1), start, params, seed=number)
        self.scheduler.add(request)
        return request

    def _fill_pools(self) -> None:
        kv = self.parts.kv
        page = kv.arena.page_rows  # of the page that stays zero
        pools = [kv.arena, kv.host] if kv.adaptive or kv.offloaded else [kv.arena]
        for rows in (pool.rows[page:] for pool in pools):
            if len(rows):
                fill(rows, torch.Generator(rows.device).manual_seed(0))

    @property
    def length(self) -> int:
        """Tokens stored of each request."""
        return self.requests[0].computed

    @property
    def captured(self) -> int:
        """CUDA graphs captured so far."""
        return 0 if self.runner._graphs is None else len(self.runner._graphs._captured)

    def step(self) -> float:
        """Decode one token of every request; seconds."""
        began = self._now()
        schedule = self.scheduler.schedule()
        assert schedule is not None and len(schedule.requests) == len(self.requests), f"{self.name}: a request had to wait"
        logits = self.runner.run(schedule.batch)
        ready = self.scheduler.advance(schedule)
        self.scheduler.prepare()
        for chosen in next_tokens(logits, ready, Failures(), end_token_ids=frozenset()):
            chosen.request.token_ids.append(chosen.token)
        return self._now() - began

    def _now(self) -> float:
        return time.process_time() if self.case.clock == "cpu" else clock(self.device)

    def begin(self) -> None:
        """Give the requests their seats, as if their prompts had been computed; what a move needs is compiled, as when an engine
        starts."""
        self.scheduler.prepare()
        for request in self.requests:
            self._grow(request, self.case.start)
            self._fill_keys(request.seat, 0)
        self.step()
        self.parts.residency.rehearse(self.scheduler.admission.stored)

    def jump(self, length: int, selections: list[Selection]) -> None:
        """Make all requests this long, as if the tokens between had been decoded."""
        for request in self.requests:
            pages = len(self.replay.inner.cache.held[request.seat])  # type: ignore[attr-defined]
            request.token_ids += [FILLER] * (length - request.computed)
            self._grow(request, length)
            self._fill_keys(request.seat, pages)
        self.replay.redraw(selections)
        self._wait_for_pinning()

    def _grow(self, request: Request, length: int) -> None:
        assert self.parts.kv.grow(request.seat, length) is None and self.replay.grow(request.seat, length)
        request.computed = length

    def _wait_for_pinning(self) -> None:
        """A GPU's host memory that would have been pinned beside the skipped steps."""
        until = time.perf_counter() + PINNING_SECONDS
        while not self.parts.residency.pin_ahead(self._lengths_in) and time.perf_counter() < until:
            time.sleep(0.01)

    def _lengths_in(self, steps: int) -> list[int]:
        return [min(request.computed + steps, self.last) for request in self.requests]

    def _fill_keys(self, seat: int, first: int) -> None:
        """Random keys in the pages of a seat from its first-th on."""
        cache = self.replay.inner.cache  # type: ignore[attr-defined]
        pages = torch.tensor(cache.held[seat][first:], dtype=torch.int64, device=self.device)
        some = torch.randn((min(KEY_PAGES, max(1, len(pages))), *cache.keys.shape[1:]), device=self.device).to(cache.keys)
        cache.keys.index_copy_(0, pages, some[torch.arange(len(pages), device=self.device) % len(some)])

    def quiet_until(self, end: int) -> int:
        """The longest length, up to `end`, at which the next step begins no move for the one behind it."""
        residency, now = self.parts.residency, len(self.parts.kv.offloaded)

        def begins(length: int) -> bool:
            stored = {request.seat: length + 1 for request in self.requests}
            return residency.wanted(stored, lambda steps: [min(length + 1 + steps, self.last)] * len(stored)) != now

        low, high = self.length, end
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (low, middle - 1) if begins(middle) else (middle, high)
        return low


def selections_of(parts: Parts, case: Case, length: int) -> list[Selection]:
    """A sequence drawn over contexts of this length."""
    budget = Budget(case.budget, parts.method.sink, parts.method.recent)
    return overlapping(budget, length, case.requests, parts.selector.groups, case.overlap, SELECTIONS)


# Growing --------------------------------------------------------------------------------------------------------------


class Growth:
    """Engines that grow together, from round to round: one step of each."""

    def __init__(self, engines: Sequence[Engine], case: Case, report: Callable[[Round], None] = lambda _: None) -> None:
        self.engines, self.case, self.report = list(engines), case, report
        self.adaptive = self.engines[0]
        self.rounds: list[Round] = []
        self._visit, self._settling, self._quiet = 0, SETTLING, 0
        lead = SETTLING + case.steps
        last = case.end - lead
        self._lead, self._last = lead, last
        ratio = last / case.start
        self._targets = [round(case.start * ratio ** (i / max(1, case.points - 1))) for i in range(case.points)] + [last]

    def run(self) -> list[Round]:
        for engine in self.engines:
            engine.begin()
        with kept():  # as in a server
            while self.adaptive.length < self.case.end - 1:
                if self._quiet >= self.case.steps:
                    if self.adaptive.length >= self._last:
                        break
                    self._jump()
                self._round()
        return self.rounds

    def _jump(self) -> None:
        """To the next length that is to be measured, or to the steps before the next move."""
        length = self.adaptive.length
        target = next((t for t in self._targets if t > length + self._lead), self._last)
        goal = min(target, self.adaptive.quiet_until(self.case.end) - self._lead)
        if goal <= length + SETTLING:
            return
        self._drop_those_that_cannot(goal + self._lead)
        selections = selections_of(self.adaptive.parts, self.case, goal)
        for engine in self.engines:
            engine.jump(goal, selections)
        self._visit, self._settling, self._quiet = self._visit + 1, SETTLING, 0

    def _drop_those_that_cannot(self, length: int) -> None:
        for engine in [engine for engine in self.engines if engine.last < length]:
            engine.runner.close()
            self.engines.remove(engine)

    def _round(self) -> None:
        self._drop_those_that_cannot(self.adaptive.length + 1)
        residency, kv = self.adaptive.parts.residency, self.adaptive.parts.kv
        moves, captured = residency.num_moves, {engine.name: engine.captured for engine in self.engines}
        turn = len(self.rounds) % len(self.engines)
        seconds = {engine.name: engine.step() for engine in [*self.engines[turn:], *self.engines[:turn]]}
        finished = tuple(residency.moves_since(moves))
        moving = kv.move is not None or bool(finished)
        new_graphs = tuple(engine.name for engine in self.engines if engine.captured != captured[engine.name])
        round_ = Round(
            self._visit, self.adaptive.length, len(kv.offloaded), moving, self._settling > 0, new_graphs, seconds, finished
        )
        self.rounds.append(round_)
        self.report(round_)
        self._settling = max(0, self._settling - 1)
        self._quiet = self._quiet + 1 if round_.quiet else 0


# Setting up -----------------------------------------------------------------------------------------------------------


def load(name: str, dtype: str, end: int, device: torch.device) -> tuple[LoadedModel, RetrievalHead]:
    """A model and its retrieval head: nano's own, or random weights in the shape of a public model."""
    if name == "nano":
        loaded = load_model(name, dtype=dtype, device=device)
        head = find_head("auto", model_name=loaded.name, model_path=loaded.path, target=loaded.shape)
    else:
        loaded = random_model(name, DTYPES[dtype], device)
        head = new_head(HeadShape(), loaded.shape, trained_length=end, source="benchmark", seed=0)
    return loaded, head.to(device=device, dtype=loaded.shape.dtype).requires_grad_(False)


def cost_of(loaded: LoadedModel, head: RetrievalHead, slots: int) -> KVCost:
    """Bytes on the device, for choosing how much memory there is to be."""
    shape, c = loaded.shape, head.config
    entry = shape.kv_heads * shape.row_bytes
    keys = c.key_count * c.head_dim * shape.dtype.itemsize
    return KVCost(shape.layers, entry, keys, -(-slots // PAGE) * PAGE * entry, PAGE, spare_layers=1)


def memory_for(cost: KVCost, requests: int, length: int) -> int:
    """Bytes of a device tier in which the last layer leaves at this length."""
    spare = (1 + requests) * PAGE * cost.resident_token  # the page that nobody holds, and keys' pages that are not full
    return cost.device(requests * cost.whole_pages(length), requests, cost.layers - 1) + spare


def first_threshold(cost: KVCost, requests: int, device_memory: int) -> int:
    """The longest length with all layers on the device."""
    return thresholds(cost, device_memory - (1 + requests) * PAGE * cost.resident_token, requests)[0]


def parts_of(loaded: LoadedModel, head: RetrievalHead, case: Case, offload_layers: int | None, device: torch.device) -> Parts:
    method = SpeContextConfig(budget=case.budget, slots=case.slots, offload_layers=offload_layers)
    config = EngineConfig(
        loaded.name,
        method=method,
        max_num_seqs=case.requests,
        max_model_len=case.end,
        page_size=PAGE,
        host_memory=10**15,
        enable_prefix_caching=False,  # prompts are not computed
    )
    # On a GPU --gpu-memory is the limit of everything; here it is the tier's own, on a CPU and on a GPU alike.
    with patch.object(build, "device_memory", lambda *_: case.device_memory):
        return build_parts(config, loaded, head, device)


def engines_of(loaded: LoadedModel, head: RetrievalHead, case: Case, device: torch.device) -> list[Engine]:
    engines = [Engine("adaptive", loaded, parts_of(loaded, head, case, None, device), case)]
    if engines[0].last < case.end:
        raise SystemExit(f"requests of {case.end} tokens do not fit even with all layers offloaded: raise --device-memory")
    never = parts_of(loaded, head, case, 0, device)
    if never.residency.policy(case.requests).fits(0, case.requests * (case.start + 2 * WATERMARK), case.requests):
        engines.append(Engine("never", loaded, never, case))
    engines.append(Engine("all", loaded, parts_of(loaded, head, case, -1, device), case))
    return engines


def case_from(arguments: argparse.Namespace, loaded: LoadedModel, head: RetrievalHead) -> Case:
    """Options with what they leave open filled in."""
    defaults = DEFAULTS[arguments.model]
    requests, budget = arguments.requests or defaults.requests, arguments.budget or defaults.budget
    slots, end = arguments.slots or budget + budget // 4, arguments.end_length or defaults.end
    cost = cost_of(loaded, head, slots)
    memory = arguments.device_memory or memory_for(cost, requests, int(0.92 * end))
    first = first_threshold(cost, requests, memory)
    start = arguments.start_length or max(budget + WATERMARK, min(int(0.75 * first), first - 3 * WATERMARK))
    if not budget + WATERMARK <= start < end:
        raise SystemExit(f"lengths must lie between budget + {WATERMARK} and the end: {start} .. {end} with budget {budget}")
    return Case(
        requests, budget, slots, arguments.overlap, start, end, arguments.points, arguments.steps, memory, arguments.clock
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", choices=list(DEFAULTS), default="qwen3-0.6b")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: float32 for nano, else bfloat16")
    parser.add_argument("--requests", type=int)
    parser.add_argument("--budget", type=int)
    parser.add_argument("--slots", type=int, help="device slots of a KV head; default: the budget and a quarter")
    parser.add_argument("--overlap", type=float, default=0.85)
    parser.add_argument("--start-length", type=int, help="default: three quarters of what fits with all layers on the device")
    parser.add_argument("--end-length", type=int)
    parser.add_argument("--points", type=int, default=12, help="lengths that are measured besides those around moves")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a point")
    parser.add_argument(
        "--device-memory", type=int, help="bytes of KV on the device; default: all layers have left at 0.92 of the end"
    )
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path)
    found = parser.parse_args(arguments)
    if found.steps < 5:
        parser.error("--steps must be at least 5: medians of fewer say little")
    if found.clock == "cpu" and found.device != "cpu":
        parser.error("--clock cpu knows nothing of a GPU's work")
    if found.points < 1:
        parser.error("--points must be at least 1")
    return found


def command_line(argv: Sequence[str]) -> str:
    """What was run, with the number of threads where it was set."""
    threads = os.environ.get("OMP_NUM_THREADS")
    set_before = [f"OMP_NUM_THREADS={threads}"] if threads else []
    return shlex.join([*set_before, "python", "benchmarks/adaptive.py", *argv])


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    device = torch.device(arguments.device)
    dtype = arguments.dtype or DEFAULTS[arguments.model].dtype
    loaded, head = load(arguments.model, dtype, arguments.end_length or DEFAULTS[arguments.model].end, device)
    case = case_from(arguments, loaded, head)
    engines = engines_of(loaded, head, case, device)
    limits = {engine.name: engine.last for engine in engines}
    policy = engines[0].parts.residency.policy(case.requests)
    plan = [policy.capacity(number, case.requests) // case.requests for number in range(loaded.shape.layers + 1)]
    growth = Growth(engines, case)
    rounds = growth.run()
    for engine in growth.engines:
        engine.parts.kv.check_integrity(engine.replay.held_pages)
    points, crossings = points_of(rounds, case.requests), crossings_of(rounds, case.steps, case.requests)
    report: dict[str, Any] = {
        "benchmark": "adaptive",
        "date": date.today().isoformat(),
        "machine": machine(device),
        "versions": versions(),
        "command": command_line(sys.argv[1:] if argv is None else argv),
        "model": arguments.model,
        "dtype": dtype,
        "device": arguments.device,
        "layers": loaded.shape.layers,
        **case.__dict__,
        "chunk_bytes": engines[0].parts.residency.chunk_bytes,
        "last_length": limits,
        "thresholds": plan,
        "selection": f"computed over all keys in every step; the one used is replayed at {case.overlap:.0%} overlap",
        "summary": summary_of(rounds, points, crossings, loaded.shape.layers),
        "points": points,
        "crossings": crossings,
    }
    show(report)
    if arguments.plot is not None:
        from adaptive_plot import plot

        plot(report, arguments.plot)
    if arguments.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()

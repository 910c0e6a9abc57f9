"""One model on one device, and how many requests of a column run: those that should make the most tokens a second."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from specontext.evaluation.paper.columns import Column, Scale
from specontext.evaluation.paper.loop import Way
from specontext.memory.facts import NO_HEAD, ModelFacts
from specontext.memory.model import MemoryModel, RunSettings, measured_model
from specontext.memory.planner import MemoryPlan
from specontext.memory.step_time import MachineSpeed, StepClock
from specontext.models.loading import LoadedModel

CHUNK, SMALL_CHUNK = 8192, 1024  # tokens of a prompt that our engine computes at once; where memory is small
SMALL = 16 << 30


@dataclass(frozen=True)
class Setup:
    """A model and the machine that it runs on.

    Attributes:
        memory: bytes that everything may take on the GPU; on a CPU those of the device tier of KV.
        overlap: share of the selected entries that the step before selected too.
    """

    loaded: LoadedModel
    facts: ModelFacts
    machine: MachineSpeed
    scale: Scale
    memory: int
    host_memory: int
    overlap: float

    @property
    def device(self) -> torch.device:
        return self.loaded.model.device

    @property
    def chunk(self) -> int:
        """Tokens of prompts that our engine computes in a step."""
        return CHUNK if self.device.type == "cpu" or self.memory > SMALL else SMALL_CHUNK

    # How many requests ------------------------------------------------------------------------------------------------

    def plan(self, way: Way, requests: int, longest: int) -> MemoryPlan:
        """The memory of so many requests of a way."""
        full = way.method == "full"
        facts = replace(self.facts, head=NO_HEAD) if full else self.facts
        slots = 0 if full else self.scale.budget + int(way.slots_over * self.scale.budget)
        run = RunSettings(requests, longest, self.scale.budget, slots, max_batched_tokens=self.chunk)
        model = measured_model(facts, run, spare_layers=0)
        if self.device.type == "cpu":  # there the limit is the tier's own
            model = MemoryModel(model.mode, {"weights": 0, "retrieval_head": 0, "runtime": 0}, model.kv)
        return MemoryPlan(facts, model, requests, self.memory, self.host_memory, longest)

    def away(self, way: Way, requests: int, length: int, longest: int) -> int | None:
        """Layers on the host at a length; None where the requests do not fit. Only ours leaves the device."""
        plan = self.plan(way, requests, longest)
        if way.all_away:
            return self.facts.shape.layers if plan.reach[-1] >= length else None
        found = plan.offloaded_at(length)
        return found if found == 0 or way.method == "speculative" else None

    def expected(self, way: Way, column: Column, requests: int) -> float | None:
        """Expected tokens a second of a column; None where its requests do not fit."""
        clock = StepClock(self.facts, self.machine, None if way.method == "full" else self.scale.budget, self.overlap)
        steps = {}
        for length in column.lengths(self.scale.points):
            away = self.away(way, requests, length, column.longest)
            if away is None:
                return None
            steps[length] = clock.decode([length] * requests, away).seconds
        if not column.output:
            return requests / steps[column.prompt]
        prefill = requests * clock.prefill_s(column.prompt, self.chunk)
        return requests * column.output / (prefill + column.decode_seconds(steps))

    def requests_for(self, way: Way, column: Column, most: int | None = None) -> int | None:
        """How many requests of a column make the most tokens a second, as the plan expects; None where not one fits."""
        best: tuple[float, int] | None = None
        for requests in range(1, (most or self.scale.most_requests) + 1):
            rate = self.expected(way, column, requests)
            if rate is None:
                break
            if best is None or rate > best[0]:
                best = rate, requests
        return None if best is None else best[1]

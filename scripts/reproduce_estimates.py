"""What the parts of a reproduction take at least: hours, GPU memory, host memory and disk, from the model's shape.

Nothing is known by heart: times are operations and bytes of the shape (`specontext.memory.speed`) over what this machine was
measured to do, or over what it is told; memory is that of the engine's own plan (`specontext.memory.model`). What a chain of
thought or a task may write at most is taken for what it writes.

`python scripts/reproduce_estimates.py DEVICE DTYPE` measures the machine and prints one JSON object. It is a process of its own,
so that no GPU memory is held while the parts run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from reproduce_parts import AIMES, CALIBRATION_TOKENS, LONGBENCH_LENGTH, Plan
from specontext.memory.speed import Bandwidths, decode_floor, prefill_operations

SEATS = 16  # requests at the same time, as `specontext eval` has
RULER_TASKS, RULER_ANSWER = 13, 128  # tokens of the longest answer
LONGBENCH_TASKS, LONGBENCH_ANSWER = 21, 128
AIME_PROBLEMS, CHAIN, COMPARED = 30, 4096, 128
VALIDATED_TASKS, WINDOWS, PROBLEMS, SYSTEMS = 5, 8, 10, 3
STUDENT_PASSES = 3  # forward, and twice its products backward
ADAM = 16  # bytes of a trained number in float32: itself, its gradient, two moments
DRAFT_VOCABULARY = 32000


@dataclass(frozen=True)
class Machine:
    """What this machine, or the one that is told of, does a second.

    Attributes:
        products: floating-point operations.
    """

    speed: Bandwidths
    products: float
    gpu_memory: int
    host_memory: int


@dataclass(frozen=True)
class Estimate:
    """Of one part; bytes, and seconds that it takes at least.

    Attributes:
        notes: what to know besides.
    """

    seconds: float
    gpu: int
    host: int
    disk: int
    notes: tuple[str, ...] = ()


def seats_of(plan: Plan, length: int) -> int:
    """Requests of this length that the GPU holds at the same time, at least one."""
    fits = (n for n in range(SEATS, 0, -1) if plan.memory(length, n).device(length, n, 0) <= plan.gpu_memory)
    return next(fits, 1)


def estimates(plan: Plan, machine: Machine) -> dict[str, Estimate]:
    """By the names of the parts that were asked for."""
    made = {"head": _head, "validate": _validate, "ruler": _ruler, "longbench": _longbench, "aime": _aime}
    return {part.name: made[part.name](plan, machine) for part in plan.parts()}


def _reading(plan: Plan, machine: Machine, length: int) -> float:
    return prefill_operations(plan.facts, length) / machine.products


def _step(plan: Plan, machine: Machine, length: int, budget: int | None, requests: int, offloaded: int) -> float:
    """Seconds of a decode step; no budget is full attention."""
    kept = length if budget is None else budget
    floor = decode_floor(
        plan.facts, machine.speed, length=length, requests=requests, offloaded=offloaded, budget=kept, overlap=0.85
    )
    return floor.seconds


def _answering(plan: Plan, machine: Machine, length: int, problems: int, tokens: int) -> float:
    """Seconds in which every method and budget answers `problems` prompts, each of which is read once."""
    offloaded = plan.facts.shape.layers if plan.resident_bytes(length) > plan.gpu_memory else 0
    seats = min(seats_of(plan, length), problems)
    sparse = [method for method in plan.asked.methods if method != "full"]
    ways = [None] * ("full" in plan.asked.methods) + [budget for _ in sparse for budget in plan.budgets(length)]
    steps = -(-problems // seats) * tokens
    decoding = sum(_step(plan, machine, length, budget, seats, offloaded) for budget in ways) * steps
    return problems * _reading(plan, machine, length) + decoding


def _memory(plan: Plan, length: int, requests: int | None = None, *, offloaded: bool = False) -> tuple[int, int, tuple[str, ...]]:
    """Bytes on the GPU and on the host for as many requests as fit, and a word where not even one does."""
    seats = requests or seats_of(plan, length)
    model, layers = plan.memory(length, seats), plan.facts.shape.layers
    alone = plan.resident_bytes(length) > plan.gpu_memory
    away = layers if alone else 0
    host = model.host(length, seats, layers if alone or offloaded else 0)
    said = (f"at {length:,} tokens KV goes to host memory: one request does not fit on the device",) if alone else ()
    if model.device(length, seats, away) > plan.gpu_memory:
        said = (f"{length:,} tokens do not fit, even with all KV in host memory",)
    return model.device(length, seats, away), host, said


def _head(plan: Plan, machine: Machine) -> Estimate:
    facts, asked, weights = plan.facts, plan.asked, plan.facts.weight_bytes
    if asked.retrieval_head or not (asked.distill or plan.drafts):
        return Estimate(0, 0, 0, 0)
    if asked.distill:
        length = plan.fitted(asked.distill_length)
        tokens = asked.distill_steps * asked.distill_tokens
        teacher = prefill_operations(facts, length) / length * tokens
        student = STUDENT_PASSES * 2 * facts.head.parameters * tokens
        # Attention of 256 sampled queries of a layer in float32, and the features of the whole sequence.
        rows = 4 * facts.shape.query_heads * 256 * length + (facts.head.feature_width + 4 * facts.shape.hidden_size) * 4 * length
        gpu = weights + ADAM * facts.head.parameters + rows
        return Estimate((teacher + student) / machine.products, gpu, 0, weights + (ADAM + 4) * facts.head.parameters)
    shape = facts.shape
    draft = 2 * (facts.head.parameters + DRAFT_VOCABULARY * shape.hidden_size + 3 * shape.hidden_size * facts.intermediate_size)
    reading = prefill_operations(facts, 4096) / 4096 * CALIBRATION_TOKENS
    return Estimate(reading / machine.products, weights + facts.head_bytes, 0, weights + draft + 4 * facts.head.parameters)


def _validate(plan: Plan, machine: Machine) -> Estimate:
    texts, limit = 1 + len(plan.asked.text), plan.asked.limit
    seconds = 0.0
    for length in plan.validated:
        seconds += texts * _answering(plan, machine, length, limit or WINDOWS, COMPARED)
        seconds += VALIDATED_TASKS * _answering(plan, machine, length, limit or PROBLEMS, RULER_ANSWER)
        seconds += SYSTEMS * _reading(plan, machine, length)
    chain = plan.fitted(2 * CHAIN)
    seconds += SYSTEMS * CHAIN * _step(plan, machine, chain, None, 1, 0)
    gpu, host, notes = _memory(plan, max(plan.validated), offloaded=True)
    return Estimate(seconds, gpu, host, plan.facts.weight_bytes, notes)


def _ruler(plan: Plan, machine: Machine) -> Estimate:
    problems = RULER_TASKS * (plan.asked.limit or 50)
    seconds = sum(_answering(plan, machine, length, problems, RULER_ANSWER) for length in plan.lengths)
    gpu, host, notes = _memory(plan, max(plan.lengths))
    return Estimate(seconds, gpu, host, plan.facts.weight_bytes, notes)


def _longbench(plan: Plan, machine: Machine) -> Estimate:
    length, problems = plan.fitted(LONGBENCH_LENGTH), LONGBENCH_TASKS * (plan.asked.limit or 50)
    seconds = _answering(plan, machine, length // 2, problems, LONGBENCH_ANSWER)
    gpu, host, notes = _memory(plan, length)
    return Estimate(seconds, gpu, host, plan.facts.weight_bytes, (*notes, f"prompts of {length // 2:,} tokens supposed"))


def _aime(plan: Plan, machine: Machine) -> Estimate:
    length, problems = plan.fitted(plan.asked.chain_tokens), plan.asked.limit or AIME_PROBLEMS
    # A chain grows from nothing to its full length: half of it in the mean.
    seconds = len(AIMES) * _answering(plan, machine, length // 2, problems, length)
    gpu, host, notes = _memory(plan, length)
    return Estimate(seconds, gpu, host, plan.facts.weight_bytes, (*notes, f"answers of {length:,} tokens supposed"))


def shown(found: dict[str, Estimate]) -> Iterator[tuple[str, ...]]:
    """Rows of a table: part, time, memory and disk in words."""
    from specontext.evaluation.report.numbers import size

    for name, one in found.items():
        yield name, long_time(one.seconds), size(one.gpu), size(one.host), size(one.disk), "; ".join(one.notes)
    total = sum(one.seconds for one in found.values())
    most = [max((getattr(one, what) for one in found.values()), default=0) for what in ("gpu", "host", "disk")]
    yield "all", long_time(total), *map(size, most), ""


def long_time(seconds: float) -> str:
    """Seconds, minutes or hours, of which there are more than one."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def measure(device: str, dtype: str) -> dict[str, Any]:
    """The machine in words, and what it does a second."""
    import torch

    from specontext.engine.start import pick_device
    from specontext.evaluation.results import environment
    from specontext.evaluation.validation.machine import machine
    from specontext.memory.speed import measure_bandwidths, measure_products

    where = pick_device(device)
    found = machine(where) | environment(where)
    speed = measure_bandwidths(where)
    products = measure_products(where, getattr(torch, dtype))
    return found | {"bandwidth": speed.device, "host_bandwidth": speed.host, "products": products}


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:3])))

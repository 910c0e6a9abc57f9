"""From sizes and the options of `specontext plan` to a plan, and what its `--json` says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from specontext.cli.plan_throughput import Throughput, throughput_of
from specontext.config import DEFAULT_BUDGET, SpeContextConfig
from specontext.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from specontext.memory.facts import ModelFacts
    from specontext.memory.model import RunSettings
    from specontext.memory.planner import MemoryPlan
    from specontext.memory.speed import Bandwidths
    from specontext.memory.step_time import MachineSpeed
    from specontext.memory.throughput import ServiceLimits

ROWS = 8  # lengths that are shown


@dataclass(frozen=True)
class Planned:
    """A plan with what it was made of.

    Attributes:
        runtime_source: where the bytes of run-time buffers come from, in words.
        speed: bandwidths for the floor of a step.
        overlap: share of the selected entries that the step before selected too.
        throughput: tokens a second against requests and length, and the choice.
        ranks: that share the model; everything is of one of them.
    """

    plan: MemoryPlan
    run: RunSettings
    runtime_source: str
    graphs: int
    speed: Bandwidths
    overlap: float
    throughput: Throughput
    ranks: int = 1

    @property
    def facts(self) -> ModelFacts:
        return self.plan.facts


def _name(dtype: torch.dtype | None) -> str:
    """How results call a format of KV."""
    return "auto" if dtype is None else str(dtype).removeprefix("torch.")


def make_plan(
    facts: ModelFacts,
    *,
    mode: str,
    tensor_parallel_size: int = 1,
    gpu_memory: int,
    host_memory: int | None,
    requests: int,
    budget: int | None,
    slots: int | None,
    max_model_len: int | None,
    runtime: int | None,
    graphs: int,
    max_batched_tokens: int | None,
    machine: MachineSpeed,
    limits: ServiceLimits,
    speed: Bandwidths | None = None,
    overlap: float = 0.85,
) -> Planned:
    """The plan for a model, of each rank where several share it; settings that are None are filled in as the engine does.

    Args:
        facts: of the whole model.
        host_memory: of the machine, which ranks share.
        speed: for the floor of a step; those of the machine where None.

    Raises:
        ConfigError: settings that contradict each other or the model.
        MemoryPlanError: the weights alone are too large.
    """
    from specontext.memory.model import RunSettings, estimate_runtime, fitting_step, measured_model, paper_model
    from specontext.memory.planner import MemoryPlan
    from specontext.memory.sharing import Share
    from specontext.memory.speed import Bandwidths

    facts = Share(0, tensor_parallel_size).facts(facts)
    host_memory = None if host_memory is None else host_memory // tensor_parallel_size
    shape = facts.shape
    if max_model_len is not None and max_model_len > shape.reach:
        raise ConfigError(f"max_model_len {max_model_len} exceeds the model's maximum of {shape.longest}")
    length = max_model_len or shape.max_position
    chosen = budget if budget is not None else facts.head.recommended_budget or DEFAULT_BUDGET
    settings = SpeContextConfig(budget=chosen, slots=slots)
    if chosen > length:
        raise ConfigError(
            f"budget {chosen} exceeds the longest context of {length} tokens, so nothing would be left out: lower --budget"
            + (" or raise --max-model-len" if length < shape.max_position else "")
        )
    run = RunSettings(
        requests=requests,
        max_tokens=length,
        budget=chosen,
        slots=slots or chosen,
        sink=settings.sink,
        recent=settings.recent,
        granularity=settings.granularity,
    )
    if max_batched_tokens is not None:
        run = replace(run, max_batched_tokens=max_batched_tokens)
    else:
        run = fitting_step(facts, run, gpu_memory)

    def plan_of(count: int) -> MemoryPlan:
        if mode == "paper":
            model = paper_model(facts, budget=chosen)
        else:
            own = replace(run, requests=count)
            buffers = estimate_runtime(facts, own) if runtime is None else runtime
            model = measured_model(facts, own, runtime=buffers, graphs=graphs)
        return MemoryPlan(facts, model, count, gpu_memory, host_memory, length)

    plan = plan_of(requests)
    plan.check_weights()
    source = "30 % of model and head" if mode == "paper" else "estimate by formula" if runtime is None else "given"
    throughput = throughput_of(
        plan_of,
        facts,
        machine,
        limits,
        lengths=shown_lengths(plan),
        budget=chosen,
        overlap=overlap,
        ranks=tensor_parallel_size,
    )
    speed = speed or Bandwidths(machine.device, machine.host)
    return Planned(plan, run, source, graphs, speed, overlap, throughput, tensor_parallel_size)


def shown_lengths(plan: MemoryPlan) -> list[int]:
    """Lengths to show: powers of two up to the longest context that is asked for, and that context."""
    top = plan.max_model_len
    powers = [1 << bit for bit in range(top.bit_length()) if 1 << bit < top]
    return [*powers[-(ROWS - 1) :], top]


def row_at(planned: Planned, length: int) -> dict[str, Any]:
    """What a context length means: layers, bytes and the expected step; None where it does not fit."""
    plan = planned.plan
    offloaded = plan.offloaded_at(length)
    row: dict[str, Any] = {"length": length, "fits": offloaded is not None}
    keys = ("resident_layers", "offloaded_layers", "device_bytes", "host_bytes", "step_s", "tokens_per_s", "step_limited_by")
    row |= dict.fromkeys(keys)
    if offloaded is None:
        return row
    row |= {"resident_layers": plan.layers - offloaded, "offloaded_layers": offloaded}
    row["device_bytes"] = plan.model.device(length, plan.requests, offloaded)
    row["host_bytes"] = plan.model.host(length, plan.requests, offloaded)
    from specontext.memory.speed import decode_floor

    floor = decode_floor(
        planned.facts,
        planned.speed,
        length=length,
        requests=plan.requests,
        offloaded=offloaded,
        budget=planned.run.budget,
        overlap=planned.overlap,
    )
    row |= {"step_s": floor.seconds, "tokens_per_s": plan.requests / floor.seconds}
    row["step_limited_by"] = "host_bandwidth" if floor.loads_limit else "bandwidth"
    return row


def as_object(planned: Planned) -> dict[str, Any]:
    """What `--json` prints."""
    plan, facts, run = planned.plan, planned.facts, planned.run
    parts = plan.bytes_at(plan.max_len)
    offloaded = plan.offloaded_at(plan.max_len)
    speed = planned.speed
    return {
        "model": facts.name,
        "weights": facts.weights_note,
        "mode": plan.model.mode,
        "thresholds": list(plan.thresholds),
        "bytes": parts,
        "bytes_at": {"length": plan.max_len, "offloaded_layers": plan.layers if offloaded is None else offloaded},
        "device_bytes": sum(parts.values()) - parts["kv_host"],
        "host_bytes": parts["kv_host"],
        "max_len_resident": plan.max_len_resident,
        "max_len_device": plan.max_len_device,
        "max_len_offloaded": plan.max_len_offloaded,
        "max_len": plan.max_len,
        "limited_by": plan.limited_by,
        "lengths": [row_at(planned, length) for length in shown_lengths(plan)],
        **planned.throughput.as_dict(),
        "inputs": {
            "tensor_parallel_size": planned.ranks,
            "gpu_memory": plan.gpu_memory,
            "host_memory": plan.host_memory,
            "requests": plan.requests,
            "budget": run.budget,
            "slots": run.slots,
            "sink": run.sink,
            "recent": run.recent,
            "granularity": run.granularity,
            "page_size": plan.model.kv.page_size,
            "max_model_len": plan.max_model_len,
            "max_num_batched_tokens": run.max_batched_tokens,
            "dtype": str(facts.shape.dtype).removeprefix("torch."),
            "kv_cache_dtype": _name(facts.shape.kv_dtype),
            "host_kv_dtype": _name(facts.shape.host_kv_dtype),
            "runtime": planned.runtime_source,
            "graphs": planned.graphs,
            "bandwidth": speed.device,
            "host_bandwidth": speed.host,
            "bandwidths_of": planned.throughput.machine.name,
            "overlap": planned.overlap,
            "model_parameters": facts.parameters,
            "retrieval_head_parameters": facts.head.parameters,
            "retrieval_head": facts.head.source,
            "layers": len(facts.shape.full),
            "layers_with_window": len(facts.shape.windowed),
            "layers_without_kv_of_their_own": len(facts.shape.readers),
            "layers_without_attention": len(facts.shape.inattentive),
            "state_bytes": facts.shape.state_bytes,
            "query_heads": facts.shape.query_heads,
            "kv_heads": facts.shape.kv_heads,
            "head_dim": facts.shape.head_dim,
            "kv_bytes_per_token": facts.kv_bytes_per_token,
        },
    }

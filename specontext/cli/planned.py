"""From the options of `specontext plan` to a plan, and what its `--json` says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specontext.cli.plan_throughput import Throughput, throughput_of
from specontext.cli.terminal import quiet_libraries
from specontext.config import DEFAULT_BUDGET, SpeContextConfig
from specontext.config_entries import of_layers
from specontext.errors import ConfigError, ModelError
from specontext.gguf.source import weights_note
from specontext.locations import adapter_of, quantization_of_source, read_config, resolve_model_path
from specontext.model_shape import ModelShape

if TYPE_CHECKING:
    import torch

    from specontext.memory.facts import HeadFacts, ModelFacts
    from specontext.memory.model import RunSettings
    from specontext.memory.planner import MemoryPlan
    from specontext.memory.preset import Preset
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


def find_facts(
    name: str,
    dtype: str,
    retrieval_head: str = "auto",
    *,
    quantization: str | None = None,
    max_model_len: int | None = None,
    trust_remote_code: bool = False,
) -> ModelFacts:
    """Sizes of a model and its head: from a preset where the name is one's and no directory's, else from its config.

    Args:
        retrieval_head: a directory, 'none', or 'auto' for the model's own, else one of an EAGLE-3 draft's size.
        quantization: what plain weights are rounded to when they are loaded; quantised ones have the size of their tensors.
        max_model_len: the longest context, for which a preset's checkpoint may need YaRN.
        trust_remote_code: let code that comes with a checkpoint make its config and its decoder.

    Raises:
        ModelError: there is none, or it has no KV heads or attention that the engine does not compute.
        HeadError: the named head is none, or was made for another model.
    """
    from specontext.memory.preset import NUMBER_FORMATS
    from specontext.memory.presets import did_you_mean, find_preset

    preset = find_preset(name) if not Path(name).is_dir() else None
    if preset is not None:
        known = NUMBER_FORMATS["bfloat16" if dtype == "auto" else dtype]
        head = None if retrieval_head == "auto" else _head(retrieval_head, preset.shape(known), retrieval_head)
        facts = _rounded(preset, preset.facts(known, head), quantization)
        if max_model_len is None or not preset.needs_yarn(max_model_len):
            return facts
        yarn = f"beyond {preset.max_position:,} with YaRN: rope_scaling in its config.json"
        return replace(facts, shape=replace(facts.shape, max_position=max_model_len, limited_by=yarn))
    format_ = None if dtype == "auto" else _dtype(dtype)
    try:
        source = resolve_model_path(name)
    except ModelError as error:
        alike = did_you_mean(name) or ", and no such preset (--list-presets)"
        raise ModelError(f"{error}{alike}") from error
    quiet_libraries()
    from specontext.memory.facts import NO_HEAD, check_heads, facts_of_config
    from specontext.models.config_check import check_supported
    from specontext.models.quantized import Asked
    from specontext.models.quantized_size import quantised_bytes
    from specontext.quantization.schemes import scheme_of

    try:
        entry = quantization_of_source(source)
        scheme = None if entry is None else scheme_of(entry, source)
        Asked(source, scheme, quantization, dummy=False, keep=True, options={}).check()
        config = read_config(source, trust_remote_code=trust_remote_code)
    except ModelError as error:
        raise ModelError(f"{str(error).rstrip('.')}{did_you_mean(name)}") from error
    check_supported(config)
    from specontext.retrieval.catalog import bundled_head
    from specontext.retrieval.checkpoint import OWN_HEAD

    head = None
    adapter = adapter_of(name)
    own = (adapter.folder if adapter is not None and adapter.beside(OWN_HEAD) else Path(source)) / OWN_HEAD
    asked = None if retrieval_head == "auto" else retrieval_head
    named = asked or (str(own) if own.is_dir() else None)
    shape = ModelShape.from_config(config, format_)
    if named is None and (bundled := bundled_head(name, Path(source), shape)) is not None and bundled.is_dir():
        named = str(bundled)
    if named is not None:
        check_heads(shape, of_layers(config, "num_key_value_heads", shape.full or range(shape.depth)))
        head = _head(named, shape, "the model's own" if asked is None else named)
    elif shape.only_windows:
        head = replace(NO_HEAD, source="none: nothing is selected where all layers have a window")
    own_code = {"trust_remote_code": trust_remote_code}
    facts = replace(facts_of_config(name, config, dtype=format_, head=head, **own_code), weights_note=weights_note(source))
    if scheme is None and quantization is None:
        return facts
    if adapter is not None:  # it is merged into weights that are written out
        return replace(facts, weights_note=f"dequantised from {scheme.words}" if scheme else f"rounded to {quantization}")
    size = quantised_bytes(source, config, facts.parameters, shape.dtype.itemsize, scheme, quantization, **own_code)
    note = f"rounded to {quantization}" if scheme is None else scheme.words if scheme.form else f"dequantised from {scheme.words}"
    return replace(facts, stored_bytes=size, weights_note=", ".join(filter(None, (facts.weights_note, note))))


def _rounded(preset: Preset, facts: ModelFacts, quantization: str | None) -> ModelFacts:
    """The facts with linear layers of 8 or 4 bits."""
    if quantization is None:
        return facts
    from specontext.quantization.made import FORMS

    form = FORMS[quantization]
    rounded = preset.linear_layers
    plain = facts.parameters - sum(n * k for n, k in rounded)
    size = plain * facts.shape.dtype.itemsize + sum(form.nbytes(n, k) for n, k in rounded)
    return replace(facts, stored_bytes=size, weights_note=f"rounded to {quantization}")


def with_kv_formats(facts: ModelFacts, kv_cache_dtype: str, host_kv_dtype: str) -> ModelFacts:
    """The same model with its KV, or that on the host alone, in another number format."""
    from specontext.memory.preset import KV_FORMATS

    host = host_kv_dtype if host_kv_dtype != kv_cache_dtype else "auto"
    formats: dict[str, Any] = {}  # a plan asks for their sizes only
    for setting, field, name in (("kv_cache_dtype", "kv_dtype", kv_cache_dtype), ("host_kv_dtype", "host_kv_dtype", host)):
        if name != "auto":
            facts.shape.check_kv_format(f"{setting} {name}")
            formats[field] = KV_FORMATS[name]
    return replace(facts, shape=replace(facts.shape, **formats))


def _name(dtype: torch.dtype | None) -> str:
    """How results call a format of KV."""
    return "auto" if dtype is None else str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, name)
    return found


def _head(source: str, shape: ModelShape, described: str) -> HeadFacts:
    """Facts of a head directory, checked against the model; 'none' is no head, as of methods without one."""
    from specontext.memory.facts import NO_HEAD

    if source == "none":
        return replace(NO_HEAD, source="none, as of methods without one")
    from specontext.retrieval import checkpoint
    from specontext.retrieval.head import facts_of_head

    config = checkpoint.read_config(source)
    config.check_target(shape, need_map=False)
    return facts_of_head(config, described)


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
    throughput = throughput_of(plan_of, facts, machine, limits, lengths=shown_lengths(plan), budget=chosen, overlap=overlap)
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

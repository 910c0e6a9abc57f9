"""Assemble an engine's parts from its settings: selector, tiers and statistics that fit one model."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from specontext.config import EngineConfig, SpeContextConfig, StepTokens
from specontext.engine.graphs import graph_bytes, span_buckets
from specontext.engine.methods import Methods
from specontext.engine.only_windows import methods_run, without_what_has_no_meaning
from specontext.engine.prefix import PrefixCache, block_state
from specontext.engine.profile import measure_runtime
from specontext.engine.residency import Residency
from specontext.engine.statistics import Meter
from specontext.errors import ConfigError, MemoryPlanError
from specontext.kernels.quantised_rows import FORMATS
from specontext.kv.cache import KVCache
from specontext.kv.hot_slots import SlotSizes
from specontext.kv.layout import Layout
from specontext.kv.pool import PagePool, make_pools
from specontext.kv.rings import Rings
from specontext.kv.states import SeatStates
from specontext.memory.facts import NO_HEAD, ModelFacts, feed_forward_width
from specontext.memory.learning import LearnedClock
from specontext.memory.model import MemoryModel, RunSettings, fitting_step, measured_model, staged_bytes
from specontext.memory.probe import LEAST_PINNED, machine_speed, why_kv_stays
from specontext.memory.step_time import MachineSpeed, StepClock
from specontext.memory.throughput import ServiceLimits
from specontext.memory.tiers import SHARE_OF_FREE_MEMORY, TierSizes, free_memory, size_tiers
from specontext.model_shape import ModelShape
from specontext.models.loading import LoadedModel
from specontext.models.rope import fix_rope
from specontext.models.sharding import outputs_read
from specontext.retrieval.head import RetrievalHead, facts_of_head
from specontext.retrieval.head_part import head_part
from specontext.retrieval.methods import context_of, make_selectors, selector_class, token_sets
from specontext.retrieval.methods.speculative import KeyCache
from specontext.retrieval.registry import base_of, needs_head, variant_of
from specontext.retrieval.selector import Budget, ForeseeingSelector, LayerSelector, MethodContext, Selector, reads_everything

logger = logging.getLogger("specontext")
SHARE_OF_GPU = 0.9  # that the engine may use where nothing was said
# Between two steps a moving layer copies weights / this bytes at most: a fraction of what a step reads in any case. On a GPU the
# bus is some sixty times slower than its memory, and the copy runs beside the step.
CHUNK_SHARE_OF_WEIGHTS = {"cpu": 4, "cuda": 64}
# Where no request waits for it, it is so many tokens: their pages take the host a millisecond, and the bus of a large GPU, too.
MOVED_TOKENS = 1 << 14


@dataclass(frozen=True)
class Parts:
    """What a runner works with.

    Attributes:
        method: settings of the engine's own method.
        methods: it and those that requests may name.
        prefix: what requests know of each other's prompts.
        plan: bytes of everything.
        clock: how long steps are expected to take, as the engine's own have taken.
        limits: what users set for how many requests run at once.
        max_tokens: longest context of one request.
        step_tokens: of one step.
        head: the retrieval head, for the methods that have one.
    """

    method: SpeContextConfig
    methods: Methods
    kv: KVCache
    prefix: PrefixCache
    meter: Meter
    residency: Residency
    plan: MemoryModel
    sizes: TierSizes
    clock: LearnedClock
    limits: ServiceLimits
    max_tokens: int
    step_tokens: StepTokens
    head: RetrievalHead | None = None

    @property
    def selector(self) -> Selector:
        """The engine's own method."""
        return self.methods.selector


def build_parts(config: EngineConfig, loaded: LoadedModel, head: RetrievalHead | None, device: torch.device) -> Parts:
    """Make selector, tiers and meter, and fix the head's RoPE for the longest context.

    Raises:
        ConfigError: settings that do not fit the model.
        HeadError: RoPE settings that do not fit the head.
        MemoryPlanError: memory that cannot hold them.
    """
    loaded = replace(loaded, shape=with_kv_formats(config, loaded.shape, device))
    whole, ranks = loaded.shape, loaded.ranks
    shape = whole if ranks is None else ranks.share.shape(whole)
    loaded = replace(loaded, shape=shape)
    recommended = head.config.recommended_budget if head is not None else None
    machine = machine_speed(device) if ranks is None else ranks.decide(partial(machine_speed, device))
    asked = without_what_has_no_meaning(config, shape) if shape.only_windows else config.method
    method = with_kv_where_it_can_be(asked.resolve(recommended_budget=recommended, num_layers=shape.layers), machine)
    max_tokens = longest_context(config, shape)
    fix_rope(loaded.model, max_tokens)
    if head is not None:
        factor = config.head_yarn_factor
        head.set_rope(theta=config.head_rope_theta, yarn_factor=head.config.yarn_factor(max_tokens) if factor is None else factor)
        logger.info("%s", describe_head(head, max_tokens))
    check_host_format(config, method, shape.layers)
    names, whole_head = methods_run(config, shape), head
    if ranks is not None and head is not None and method.granularity == "head" and not any(map(reads_all_groups, names)):
        head = head_part(head, whole, ranks.share)
    facts = facts_of_loaded(loaded, head)
    if whole_head is not None:  # ranks have the same layers side by side
        facts = replace(facts, head=replace(facts.head, head_map=whole_head.config.head_map))
    if ranks is not None:  # the last rank may have fewer outputs, and all decide by the same numbers
        facts = replace(
            facts,
            parameters=ranks.most(facts.parameters),
            lookup_parameters=ranks.most(facts.lookup_parameters),
            stored_bytes=ranks.most(facts.weight_bytes),
        )
    check_variants(names, method)
    assert method.budget is not None and method.slots is not None
    selecting = [name for name in names if not reads_everything(selector_class(name))]
    budget = method.budget if selecting else 1  # of what a table of selections has to hold
    slots = method.slots if selecting else 0
    adaptive = method.offload_layers is None
    context = MethodContext(
        whole,
        Budget(method.budget, method.sink, method.recent),
        method.granularity,
        config.max_num_seqs,
        max_tokens,
        device,
        head,
        part=None if ranks is None else shape,
        head_is_part=head is not whole_head,
    )
    kinds = [selector_class(name) for name in names]
    in_layer = [name for name, kind in zip(names, kinds, strict=True) if issubclass(kind, LayerSelector)]
    if ranks is not None and in_layer and ranks.share.size > whole.kv_heads:
        raise ConfigError(
            f"method {in_layer[0]} chooses by all query heads of a KV head, and with tensor_parallel_size {ranks.share.size} "
            f"for {whole.kv_heads} KV heads no rank has them all: lower it to {whole.kv_heads}, or take another method"
        )
    tables = shape.layers if in_layer else 1
    groups = max(token_sets(name, context_of(name, context)) for name in names)
    tokens = config.step_tokens(device.type)
    run = RunSettings(
        config.max_num_seqs,
        max_tokens,
        budget,
        slots,
        sink=method.sink,
        recent=method.recent,
        granularity=method.granularity,
        page_size=config.page_size,
        max_batched_tokens=tokens.alone,
        sets=groups,
        selections=tables,
    )
    runtime, graphs = None, 0
    if device.type == "cuda":
        if config.max_num_batched_tokens is None:
            total = torch.cuda.mem_get_info(device)[1]
            run = fitting_step(facts, run, gpu_limit(config, total if ranks is None else ranks.least(total)))
            tokens = StepTokens(run.max_batched_tokens, min(tokens.mixed, run.max_batched_tokens))
        torch.cuda.empty_cache()  # of engines before this one: what is small would keep all of a block that was theirs
        features = head.config.feature_layers if head is not None and head.config.variant == "features" else ()
        runtime = measure_runtime(loaded, facts, run, feature_layers=features) + staged_bytes(facts, run)
        runtime = runtime if ranks is None else ranks.most(runtime)
        if not config.enforce_eager:
            spans = len(span_buckets(method.budget, max_tokens)) if selector_class(names[0]).by_span else 1
            graphs = graph_bytes(
                config.max_num_seqs,
                spans,
                layers=shape.layers,
                vocab_size=shape.vocab_size,
                itemsize=shape.dtype.itemsize,
            )
    plan = measured_model(
        facts,
        run,
        runtime=runtime,
        graphs=graphs,
        spare_layers=1 if adaptive and slots else 0,
        states=sum(selector_class(name).state_bytes(context_of(name, context)) for name in {base_of(name) for name in names}),
    )
    on_device = device_memory(config, plan, device)
    on_host = pinnable((config.host_memory or host_default(config)) // config.tensor_parallel_size, machine, plan)
    if ranks is not None:  # ranks have the same pages, so that one of them can say for all where KV goes
        on_device, on_host = ranks.least(on_device), ranks.least(on_host)
    sizes = size_tiers(
        plan.kv,
        offloaded=method.offload_layers,
        seats=config.max_num_seqs,
        max_tokens=max_tokens,
        device_memory=on_device,
        host_memory=on_host,
    )
    if config.offload_dir is not None and device.type == "cuda":
        raise ConfigError(
            f"offload_dir {config.offload_dir} works on a CPU only: kernels of a GPU cannot read pages of a file; leave it out"
        )
    if config.offload_dir is not None:
        check_offload_dir(config.offload_dir)
    arena, host = make_pools(
        Layout.of_shape(shape, config.page_size, facts.layer_blocks),
        device_pages=sizes.device_pages,
        host_pages=sizes.host_pages,
        device=device,
        directory=config.offload_dir,
        on_host=Layout.of_shape(shape.on_host, config.page_size, facts.layer_blocks),
    )
    if ranks is not None and host.memory is not None:
        host.memory.reach(host.memory.num_bytes)  # how far a thread has pinned it would differ
    rings = None
    if shape.windowed:
        rings = Rings(shape, seats=config.max_num_seqs, page_size=config.page_size, max_tokens=max_tokens, device=device)
    states = SeatStates(shape.states, seats=config.max_num_seqs, device=device) if shape.states else None
    methods = make_methods(names, config.all_methods, context, loaded, arena)
    kv = KVCache(
        arena,
        host,
        resident=[layer < shape.layers - (method.offload_layers or 0) for layer in range(shape.layers)],
        reader=methods.reader(None),
        slots=SlotSizes(slots, method.sink, method.recent, tables, groups) if slots else None,
        seats=config.max_num_seqs,
        max_tokens=max_tokens,
        adaptive=adaptive,
        verify_loads=config.verify_loads,
        write_through=config.measure_recall
        or any(issubclass(kind, ForeseeingSelector) for kind in kinds)  # all keys are looked at before the step
        or (device.type == "cpu" and any(map(reads_everything, kinds))),  # it reads them in place
        state=block_state(methods, config.page_size),
        rings=rings,
        states=states,
    )
    meter = Meter(
        shape,
        methods.reader(None).head_map,
        tables=tables,
        groups=groups,
        budget=budget,
        sink=method.sink,
        seats=config.max_num_seqs,
        device=device,
    )
    share = CHUNK_SHARE_OF_WEIGHTS[device.type]
    # A page holds the keys of a whole number of tokens, and may have a rest.
    keys = -(-arena.page_bytes // methods.shared.page_tokens) * methods.num_headed if methods.shared is not None else 0
    most = max(1, facts.weight_bytes // share)
    # More than a step of prompts brings, or a move would never arrive.
    chunk = min(most, max(MOVED_TOKENS, 2 * tokens.alone) * plan.kv.resident_token)
    residency = Residency(kv, replace(plan.kv, common_token=keys), adaptive=adaptive, chunk_bytes=chunk, most_bytes=most)
    prefix = PrefixCache(kv, methods, enabled=config.enable_prefix_caching)
    limits = ServiceLimits(config.max_num_seqs, config.min_num_seqs, config.max_tpot_ms, config.max_wait_s)
    expected = StepClock(facts, machine, None if reads_everything(methods.selector) else method.budget)
    clock = LearnedClock(expected, learns=ranks is None, learns_bus=device.type == "cuda")
    return Parts(method, methods, kv, prefix, meter, residency, plan, sizes, clock, limits, max_tokens, tokens, head)


def with_kv_where_it_can_be(method: SpeContextConfig, machine: MachineSpeed) -> SpeContextConfig:
    """The same settings, with all KV on the device where a machine's host tier is of no use to layers and nothing else was asked
    for. A warning says so."""
    why = why_kv_stays(machine)
    if why is None or method.offload_layers == 0:
        return method
    if method.offload_layers is not None:
        logger.warning("%s: layers on the host, as offload_layers asks for, will be slow or fail", why)
        return method
    logger.warning("%s: the KV of all layers stays on the device, and requests wait where it is full", why)
    return replace(method, offload_layers=0)


def pinnable(host_memory: int, machine: MachineSpeed, plan: MemoryModel) -> int:
    """Bytes of the host tier: where little can be pinned no more than that, and one page at least."""
    if machine.pinned is None or machine.pinned >= LEAST_PINNED:
        return host_memory
    return min(host_memory, max(machine.pinned, plan.kv.host_page))


def with_kv_formats(config: EngineConfig, shape: ModelShape, device: torch.device) -> ModelShape:
    """The shape with the number formats of KV in both tiers.

    Raises:
        ConfigError: the model's heads, or the GPU, cannot have them.
    """
    host = config.host_kv_dtype if config.host_in_8_bits else "auto"
    for setting, name in (("kv_cache_dtype", config.kv_cache_dtype), ("host_kv_dtype", host)):
        if name == "auto":
            continue
        shape.check_kv_format(f"{setting} {name}")
        if name == "fp8" and device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < (8, 9):
            raise ConfigError(
                f"{setting} fp8 needs a GPU of compute capability 8.9, and this one has {found[0]}.{found[1]}: set it to int8"
            )
    return replace(shape, kv_dtype=FORMATS.get(config.kv_cache_dtype), host_kv_dtype=FORMATS.get(host))


def check_host_format(config: EngineConfig, method: SpeContextConfig, layers: int) -> None:
    """Raises ConfigError where known prompts would come back to layers on the device in the host's 8 bits."""
    if config.host_in_8_bits and config.enable_prefix_caching and method.offload_layers != layers:
        raise ConfigError(
            f"host_kv_dtype {config.host_kv_dtype} would give the {layers - (method.offload_layers or 0)} layers on the device "
            "known prompts in 8 bits: set offload_layers to -1, or enable_prefix_caching to False"
        )


def check_offload_dir(directory: Path) -> None:
    """Raises ConfigError, which names the directory, where no file can be made in it."""
    if not directory.is_dir():
        raise ConfigError(f"offload_dir {directory} is not a directory: make it, or name another")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(f"offload_dir {directory} cannot be written to: change its permissions, or name another")


def host_default(config: EngineConfig) -> int:
    """Bytes of the host tier where none were named: a share of what is free in memory, or on the disk of `offload_dir`."""
    if config.offload_dir is None:
        return int(SHARE_OF_FREE_MEMORY * free_memory(torch.device("cpu")))
    check_offload_dir(config.offload_dir)
    return int(SHARE_OF_FREE_MEMORY * shutil.disk_usage(config.offload_dir).free)


def gpu_limit(config: EngineConfig, total: int) -> int:
    """Bytes that the engine may use of a GPU that has `total`."""
    return config.gpu_memory or int((config.gpu_memory_utilization or SHARE_OF_GPU) * total)


def device_memory(config: EngineConfig, plan: MemoryModel, device: torch.device) -> int:
    """Bytes of the device tier of KV: on a GPU what the engine's limit leaves beside weights, buffers and tables.

    On a CPU, where these are ordinary memory, the limit is the tier's own.
    """
    if device.type == "cpu":
        if config.gpu_memory_utilization is not None:
            raise ConfigError("gpu_memory_utilization needs a GPU: on a CPU give gpu_memory, the bytes of the device tier of KV")
        if (tables := plan.fixed["tables"]) > (free := free_memory(device)):
            raise MemoryPlanError(
                f"tables for {config.max_num_seqs} requests of the longest context need {tables} bytes of memory, and {free} are "
                "free: set max_model_len or max_num_seqs lower"
            )
        return config.gpu_memory or int(SHARE_OF_FREE_MEMORY * free_memory(device))
    free, total = torch.cuda.mem_get_info(device)
    # Weights are there already. What PyTorch keeps beside what is in use will be used; what others use of it is theirs.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free += kept + plan.fixed["weights"] + plan.fixed["retrieval_head"]
    limit = gpu_limit(config, total)
    others, parts = plan.fixed_bytes, ", ".join(f"{name} {size}" for name, size in plan.fixed.items())
    if limit < others:
        raise MemoryPlanError(
            f"--gpu-memory allows {limit} bytes and {others} are needed beside KV ({parts}): raise it by more than "
            f"{others - limit}"
        )
    if free < limit:  # raising the limit would change nothing
        logger.warning("the engine may use %d bytes of the GPU and %d of them are free: end what else uses it", limit, free)
        if free < others:
            raise MemoryPlanError(
                f"the GPU has {free} bytes free and {others} are needed beside KV ({parts}): end what else uses it"
            )
    return min(limit, free) - others


def facts_of_loaded(loaded: LoadedModel, head: RetrievalHead | None) -> ModelFacts:
    """Sizes of a loaded model and its head, 0 for a method without one."""
    model = loaded.model
    table = model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    output = model.get_output_embeddings()
    tied = output is not None and output.weight is table
    lookup = table.numel() - (outputs_read(output) if tied else 0)
    intermediate = feed_forward_width(model.config, loaded.shape)
    if loaded.ranks is not None:
        intermediate //= loaded.ranks.share.size
    sizes = NO_HEAD if head is None else facts_of_head(head.config)
    return ModelFacts(loaded.name, loaded.shape, loaded.parameters, lookup, intermediate, sizes, stored_bytes=loaded.weight_bytes)


def reads_all_groups(name: str) -> bool:
    """Whether a variant of a method with a retrieval head needs more groups than a rank's KV heads read."""
    return needs_head(name) and variant_of(name) is not None


def check_variants(names: Sequence[str], method: SpeContextConfig) -> None:
    """Raises ConfigError for a variant that requests may name and that cannot work in this engine."""
    for name in names:
        if base_of(name) not in names:
            raise ConfigError(f"method '{name}' needs '{base_of(name)}' beside it: name both in methods (--methods)")
        variant = variant_of(name)
        if variant is not None and variant.keeps_generated and method.offload_layers != 0:
            raise ConfigError(f"method '{name}' reads all generated tokens, for which no slots suffice: set offload_layers to 0")


def describe_head(head: RetrievalHead, max_tokens: int) -> str:
    """What kind of head is in use and how far its RoPE reaches, in a line."""
    scaling = head.config.rope_scaling
    reach = f"YaRN factor {head.yarn_factor:.4g}" if scaling is None else f"scaling {scaling['rope_type']}"
    trained = f"trained on {head.config.trained_length} tokens, contexts of up to {max_tokens}"
    return f"retrieval head ({head.config.variant}): RoPE base {head.rope_theta:g}, {reach}; {trained}"


def longest_context(config: EngineConfig, shape: ModelShape) -> int:
    """The engine's longest context in tokens; raises ConfigError for one beyond the model's."""
    if config.max_model_len is not None and config.max_model_len > shape.reach:
        raise ConfigError(f"max_model_len {config.max_model_len} exceeds the model's maximum of {shape.longest}")
    if config.max_model_len is None and shape.limited_by:
        logger.warning("contexts of up to %s", shape.longest)
    return config.max_model_len or shape.max_position


def make_methods(
    names: Sequence[str], asked: Sequence[str], context: MethodContext, loaded: LoadedModel, arena: PagePool
) -> Methods:
    """The selectors of all methods, the keys of a retrieval head in pages of the arena.

    Args:
        names: methods that are made.
        asked: those that requests may name: the same, or others that all mean the only one that is made.
    """
    if context.head is not None:
        keys = arena.as_keys(context.head.config.key_count, context.head.config.head_dim)
        cache = partial(KeyCache, keys, arena.pages, seats=context.seats, max_tokens=context.max_tokens)
        context = replace(context, embedding=loaded.model.get_input_embeddings(), key_cache=cache)
    heads = slice(None) if loaded.ranks is None else loaded.ranks.share.kv_heads(context.shape)
    selectors = make_selectors(names, context)
    selectors |= {name: selectors[names[0]] for name in asked if name not in selectors}
    return Methods(asked[0], context.budget, selectors, layout=arena.layout, device=context.device, heads=heads)

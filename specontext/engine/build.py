"""Assemble an engine's parts from its settings: selector, tiers and statistics that fit one model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from specontext.config import EngineConfig, SpeContextConfig, StepTokens
from specontext.engine.chunk_graphs import in_pieces, piece_bytes
from specontext.engine.graphs import graph_bytes, span_buckets
from specontext.engine.methods import Methods
from specontext.engine.only_windows import methods_run, without_what_has_no_meaning
from specontext.engine.prefix import PrefixCache, block_state
from specontext.engine.profile import measure_runtime
from specontext.engine.residency import Residency
from specontext.engine.statistics import Meter
from specontext.engine.tier_memory import (
    beside_known,
    check_host_format,
    check_offload_dir,
    device_memory,
    gpu_limit,
    host_default,
    pinnable,
    with_kv_formats,
    with_kv_where_it_can_be,
)
from specontext.errors import ConfigError
from specontext.kv.cache import KVCache
from specontext.kv.hot_slots import SlotSizes
from specontext.kv.layout import Layout
from specontext.kv.pool import PagePool, make_pools
from specontext.kv.rings import Rings
from specontext.kv.states import SeatStates
from specontext.memory.facts import NO_HEAD, ModelFacts, feed_forward_width, other_tables
from specontext.memory.learning import LearnedClock
from specontext.memory.model import MemoryModel, RunSettings, fitting_step, measured_model, staged_bytes
from specontext.memory.probe import machine_speed
from specontext.memory.step_time import StepClock
from specontext.memory.throughput import ServiceLimits
from specontext.memory.tiers import TierSizes, size_tiers
from specontext.model_shape import ModelShape
from specontext.models.loading import LoadedModel
from specontext.models.rank_layers import outputs_read
from specontext.models.rope import fix_rope
from specontext.retrieval.head import RetrievalHead, facts_of_head
from specontext.retrieval.head_part import head_part
from specontext.retrieval.methods import context_of, make_selectors, selector_class, token_sets
from specontext.retrieval.methods.speculative import KeyCache
from specontext.retrieval.registry import base_of, needs_head, variant_of
from specontext.retrieval.selector import Budget, ForeseeingSelector, LayerSelector, MethodContext, Selector, reads_everything

logger = logging.getLogger("specontext")
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
                layers=shape.depth,
                vocab_size=shape.vocab_size,
                itemsize=shape.dtype.itemsize,
            )
            if in_pieces(shape) and ranks is None:
                longest = min(tokens.alone, max_tokens)
                graphs += piece_bytes(longest, layers=shape.depth, runtime=runtime, step_tokens=tokens.alone)
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
        beside_known=beside_known(shape, plan, head) if config.enable_prefix_caching else None,
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
        read_order=shape.read_order or None,
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


def facts_of_loaded(loaded: LoadedModel, head: RetrievalHead | None) -> ModelFacts:
    """Sizes of a loaded model and its head, 0 for a method without one."""
    model = loaded.model
    table = model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    output = model.get_output_embeddings()
    tied = output is not None and output.weight is table
    lookup = table.numel() - (outputs_read(output) if tied else 0) + other_tables(model)
    intermediate = feed_forward_width(model.config, loaded.shape)
    if loaded.ranks is not None:
        intermediate //= loaded.ranks.share.size
    sizes = NO_HEAD if head is None else facts_of_head(head.config)
    numbers = loaded.parameters, lookup, intermediate
    return ModelFacts(loaded.name, loaded.shape, *numbers, sizes, stored_bytes=loaded.weight_bytes, tied=tied)


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

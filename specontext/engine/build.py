"""Assemble an engine's parts from settled settings: selectors, tiers and statistics that fit one model."""

from __future__ import annotations

from dataclasses import astuple, replace
from functools import partial

import torch
from torch import Tensor

from specontext.config import EngineConfig, StepTokens
from specontext.engine.chunk_graphs import in_pieces, piece_bytes, without_dear_pieces
from specontext.engine.graphs import graph_bytes, span_buckets
from specontext.engine.methods import Methods
from specontext.engine.parts import Parts
from specontext.engine.prefix import PrefixCache, block_state
from specontext.engine.profile import measure_runtime
from specontext.engine.residency import Residency
from specontext.engine.settled import Settled, settle
from specontext.engine.statistics import Meter
from specontext.engine.tier_memory import (
    beside_known,
    check_offload_dir,
    device_memory,
    gpu_limit,
    host_default,
    pinnable,
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
from specontext.memory.step_time import StepClock
from specontext.memory.throughput import ServiceLimits
from specontext.memory.tiers import TierSizes, size_tiers
from specontext.models.loading import LoadedModel
from specontext.models.rank_layers import outputs_read
from specontext.retrieval.head import RetrievalHead, facts_of_head
from specontext.retrieval.methods import context_of, make_selectors, selector_class
from specontext.retrieval.methods.speculative import KeyCache
from specontext.retrieval.registry import base_of
from specontext.retrieval.selector import ForeseeingSelector, reads_everything

# Between two steps a moving layer copies weights / this bytes at most: a fraction of what a step reads in any case. On a GPU the
# bus is some sixty times slower than its memory, and the copy runs beside the step.
CHUNK_SHARE_OF_WEIGHTS = {"cpu": 4, "cuda": 64}
# Where no request waits for it, it is so many tokens: their pages take the host a millisecond, and the bus of a large GPU, too.
MOVED_TOKENS = 1 << 14


def build_parts(config: EngineConfig, loaded: LoadedModel, head: RetrievalHead | None, device: torch.device) -> Parts:
    """Make selector, tiers and meter, and fix the head's RoPE for the longest context.

    Raises:
        ConfigError: settings that do not fit the model.
        HeadError: RoPE settings that do not fit the head.
        MemoryPlanError: memory that cannot hold them.
    """
    settled = settle(config, loaded, head, device)
    facts = _facts(settled)
    run, tokens = _run_settings(settled, facts)
    plan, captures_chunks = _plan(settled, facts, run, tokens)
    sizes = _sizes(settled, plan)
    arena, host = _pools(settled, facts, sizes)
    methods = _methods(settled, arena)
    kv = _cache(settled, run, methods, arena, host)
    meter = Meter(
        settled.shape,
        methods.reader(None).head_map,
        tables=run.selections,
        groups=settled.token_sets,
        budget=run.budget,
        sink=run.sink,
        seats=run.requests,
        device=device,
    )
    residency = _residency(settled, facts, plan, methods, kv, tokens)
    prefix = PrefixCache(kv, methods, enabled=config.enable_prefix_caching)
    limits = ServiceLimits(config.max_num_seqs, config.min_num_seqs, config.max_tpot_ms, config.max_wait_s)
    budget = None if reads_everything(methods.selector) else settled.method.budget
    expected = StepClock(facts, settled.machine, budget, ranks=config.tensor_parallel_size)
    clock = LearnedClock(expected, learns=settled.ranks is None, learns_bus=device.type == "cuda")
    return Parts(
        settled.method,
        methods,
        kv,
        prefix,
        meter,
        residency,
        plan,
        sizes,
        clock,
        limits,
        settled.max_tokens,
        tokens,
        captures_chunks,
        settled.head,
    )


def _facts(settled: Settled) -> ModelFacts:
    """Sizes of the model and its head, by which all ranks decide alike."""
    facts, ranks = facts_of_loaded(settled.loaded, settled.head), settled.ranks
    if settled.whole_head is not None:  # ranks have the same layers side by side
        facts = replace(facts, head=replace(facts.head, head_map=settled.whole_head.config.head_map))
    if ranks is None:
        return facts
    return replace(  # the last rank may have fewer outputs
        facts,
        parameters=ranks.most(facts.parameters),
        lookup_parameters=ranks.most(facts.lookup_parameters),
        stored_bytes=ranks.most(facts.weight_bytes),
    )


def _run_settings(settled: Settled, facts: ModelFacts) -> tuple[RunSettings, StepTokens]:
    """What decides about memory, and the tokens of a step: on a GPU fewer where they would leave little for KV."""
    config, method, ranks = settled.config, settled.method, settled.ranks
    assert method.budget is not None and method.slots is not None
    tokens = config.step_tokens(settled.device.type)
    run = RunSettings(
        config.max_num_seqs,
        settled.max_tokens,
        method.budget if settled.selects else 1,  # of what a table of selections has to hold
        method.slots if settled.selects else 0,
        sink=method.sink,
        recent=method.recent,
        granularity=method.granularity,
        page_size=config.page_size,
        max_batched_tokens=tokens.alone,
        sets=settled.token_sets,
        selections=1 if settled.selects_in_layer is None else settled.shape.layers,
    )
    if settled.device.type == "cuda" and config.max_num_batched_tokens is None:
        limit = gpu_limit(config, settled.device)
        run = fitting_step(facts, run, limit if ranks is None else ranks.least(limit))
        tokens = StepTokens(*(min(one, run.max_batched_tokens) for one in astuple(tokens)))
    return run, tokens


def _plan(settled: Settled, facts: ModelFacts, run: RunSettings, tokens: StepTokens) -> tuple[MemoryModel, bool]:
    """Bytes of everything, and whether chunks of prompts are captured; on a GPU a first pass measures buffers."""
    runtime, graphs, pieces = None, 0, 0
    if settled.device.type == "cuda":
        torch.cuda.empty_cache()  # of engines before this one: what is small would keep all of a block that was theirs
        runtime = _runtime(settled, facts, run)
        if not settled.config.enforce_eager:
            graphs, pieces = _graphs(settled), _pieces(settled, tokens, runtime)
    bases = {base_of(name) for name in settled.names}
    plan = measured_model(
        facts,
        run,
        runtime=runtime,
        graphs=graphs + pieces,
        spare_layers=1 if settled.adaptive and run.slots else 0,
        states=sum(selector_class(name).state_bytes(context_of(name, settled.context)) for name in bases),
    )
    if not pieces:
        return plan, False
    return without_dear_pieces(plan, pieces, gpu_limit(settled.config, settled.device))


def _runtime(settled: Settled, facts: ModelFacts, run: RunSettings) -> int:
    """Bytes of buffers of a step."""
    head = settled.head
    features = head.config.feature_layers if head is not None and head.config.variant == "features" else ()
    runtime = measure_runtime(settled.loaded, facts, run, feature_layers=features) + staged_bytes(facts, run)
    return runtime if settled.ranks is None else settled.ranks.most(runtime)


def _graphs(settled: Settled) -> int:
    """Bytes of captured decode steps."""
    shape, budget = settled.shape, settled.context.budget.total
    spans = len(span_buckets(budget, settled.max_tokens)) if settled.kinds[0].by_span else 1
    sizes = {"layers": shape.depth, "vocab_size": shape.vocab_size, "itemsize": shape.dtype.itemsize}
    return graph_bytes(settled.config.max_num_seqs, spans, **sizes)


def _pieces(settled: Settled, tokens: StepTokens, runtime: int) -> int:
    """Bytes of captured chunks of prompts; 0 where they are not captured."""
    if not in_pieces(settled.shape) or settled.ranks is not None:
        return 0
    longest = min(tokens.alone, settled.max_tokens)
    return piece_bytes(longest, layers=settled.shape.depth, runtime=runtime, step_tokens=tokens.alone)


def _sizes(settled: Settled, plan: MemoryModel) -> TierSizes:
    """Pages of both tiers."""
    config, ranks = settled.config, settled.ranks
    on_device = device_memory(config, plan, settled.device)
    on_host = pinnable((config.host_memory or host_default(config)) // config.tensor_parallel_size, settled.machine, plan)
    if ranks is not None:  # ranks have the same pages, so that one of them can say for all where KV goes
        on_device, on_host = ranks.least(on_device), ranks.least(on_host)
    return size_tiers(
        plan.kv,
        offloaded=settled.method.offload_layers,
        seats=config.max_num_seqs,
        max_tokens=settled.max_tokens,
        device_memory=on_device,
        host_memory=on_host,
        beside_known=beside_known(settled.shape, plan, settled.head) if config.enable_prefix_caching else None,
    )


def _pools(settled: Settled, facts: ModelFacts, sizes: TierSizes) -> tuple[PagePool, PagePool]:
    """The memory of both tiers.

    Raises:
        ConfigError: a directory that cannot have pages of the host.
    """
    shape, directory, page_size = settled.shape, settled.config.offload_dir, settled.config.page_size
    if directory is not None and settled.device.type == "cuda":
        raise ConfigError(
            f"offload_dir {directory} works on a CPU only: kernels of a GPU cannot read pages of a file; leave it out"
        )
    if directory is not None:
        check_offload_dir(directory)
    arena, host = make_pools(
        Layout.of_shape(shape, page_size, facts.layer_blocks),
        device_pages=sizes.device_pages,
        host_pages=sizes.host_pages,
        device=settled.device,
        directory=directory,
        on_host=Layout.of_shape(shape.on_host, page_size, facts.layer_blocks),
    )
    if settled.ranks is not None and host.memory is not None:
        host.memory.reach(host.memory.num_bytes)  # how far a thread has pinned it would differ
    return arena, host


def _methods(settled: Settled, arena: PagePool) -> Methods:
    """The selectors of all methods, the keys of a retrieval head in pages of the arena; where nothing is selected, all that
    requests may name are the only one that is made."""
    context, loaded, asked = settled.context, settled.loaded, settled.config.all_methods
    if context.head is not None:
        keys = arena.as_keys(context.head.config.key_count, context.head.config.head_dim)
        cache = partial(KeyCache, keys, arena.pages, seats=context.seats, max_tokens=context.max_tokens)
        context = replace(context, embedding=loaded.model.get_input_embeddings(), key_cache=cache)
    heads = slice(None) if loaded.ranks is None else loaded.ranks.share.kv_heads(context.shape)
    selectors = make_selectors(settled.names, context)
    selectors |= {name: selectors[settled.names[0]] for name in asked if name not in selectors}
    return Methods(asked[0], context.budget, selectors, layout=arena.layout, device=context.device, heads=heads)


def _cache(settled: Settled, run: RunSettings, methods: Methods, arena: PagePool, host: PagePool) -> KVCache:
    """The owner of KV, with what layers keep that have no pages."""
    config, shape, device = settled.config, settled.shape, settled.device
    seats, max_tokens = run.requests, run.max_tokens
    rings = states = None
    if shape.windowed:
        rings = Rings(shape, seats=seats, page_size=config.page_size, max_tokens=max_tokens, device=device)
    if shape.states:
        states = SeatStates(shape.states, seats=seats, device=device)
    kept = shape.layers - (settled.method.offload_layers or 0)
    all_looked_at = config.measure_recall or any(issubclass(kind, ForeseeingSelector) for kind in settled.kinds)
    read_in_place = device.type == "cpu" and any(map(reads_everything, settled.kinds))
    return KVCache(
        arena,
        host,
        resident=[layer < kept for layer in range(shape.layers)],
        reader=methods.reader(None),
        slots=SlotSizes(run.slots, run.sink, run.recent, run.selections, settled.token_sets) if run.slots else None,
        seats=seats,
        max_tokens=max_tokens,
        adaptive=settled.adaptive,
        verify_loads=config.verify_loads,
        write_through=all_looked_at or read_in_place,
        state=block_state(methods, config.page_size),
        rings=rings,
        states=states,
        read_order=shape.read_order or None,
    )


def _residency(
    settled: Settled, facts: ModelFacts, plan: MemoryModel, methods: Methods, kv: KVCache, tokens: StepTokens
) -> Residency:
    """Who moves layers, and how many bytes between two steps."""
    # A page holds the keys of a whole number of tokens, and may have a rest.
    keys = -(-kv.arena.page_bytes // methods.shared.page_tokens) * methods.num_headed if methods.shared is not None else 0
    most = max(1, facts.weight_bytes // CHUNK_SHARE_OF_WEIGHTS[settled.device.type])
    # More than a step of prompts brings, or a move would never arrive.
    chunk = min(most, max(MOVED_TOKENS, 2 * tokens.alone) * plan.kv.resident_token)
    return Residency(kv, replace(plan.kv, common_token=keys), adaptive=settled.adaptive, chunk_bytes=chunk, most_bytes=most)


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

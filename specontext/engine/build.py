"""Assemble an engine's parts from its settings: selector, tiers and statistics that fit one model."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from specontext.config import ConfigError, EngineConfig, SpeContextConfig
from specontext.core import ModelShape
from specontext.engine.statistics import Meter
from specontext.kv.tiered import TieredKV
from specontext.memory.tiers import TierSizes, size_tiers
from specontext.models.loading import LoadedModel
from specontext.retrieval.head import RetrievalHead
from specontext.retrieval.key_cache import KeyCache
from specontext.retrieval.methods import FullSelector, OracleSelector, RandomSelector, SpeculativeSelector, StreamingSelector
from specontext.retrieval.selector import Budget, Selector

logger = logging.getLogger("specontext")


@dataclass(frozen=True)
class Parts:
    """What a runner works with.

    Attributes:
        max_tokens: longest context of one request.
        head: the retrieval head, for the methods that have one.
    """

    method: SpeContextConfig
    selector: Selector
    kv: TieredKV
    meter: Meter
    sizes: TierSizes
    max_tokens: int
    head: RetrievalHead | None = None


def build_parts(config: EngineConfig, loaded: LoadedModel, head: RetrievalHead | None, device: torch.device) -> Parts:
    """Make selector, tiers and meter, and fix the head's RoPE for the longest context.

    Raises:
        ConfigError: settings that do not fit the model.
        HeadError: RoPE settings that do not fit the head.
        MemoryPlanError: memory that cannot hold them.
    """
    shape = loaded.shape
    recommended = head.config.recommended_budget if head is not None else None
    method = config.method.resolve(recommended_budget=recommended, num_layers=shape.layers)
    max_tokens = longest_context(config, shape)
    if head is not None:
        factor = config.head_yarn_factor
        head.set_rope(theta=config.head_rope_theta, yarn_factor=head.config.yarn_factor(max_tokens) if factor is None else factor)
        logger.info("%s", describe_head(head, max_tokens))
    resident = tuple(layer < shape.layers - method.offload_layers for layer in range(shape.layers))
    streams = method.method == "full"
    key_bytes = 0
    if method.method == "speculative":
        assert head is not None
        key_bytes = head.config.kv_heads * head.config.head_dim * shape.dtype.itemsize
    assert method.slots is not None
    slots = 0 if streams else method.slots
    sizes = size_tiers(
        shape,
        resident_layers=sum(resident),
        slots=slots,
        key_bytes_per_token=key_bytes,
        seats=config.max_num_seqs,
        max_tokens=max_tokens,
        page_size=config.page_size,
        device=device,
        gpu_memory=config.gpu_memory,
        host_memory=config.host_memory,
    )
    selector = _selector(config, method, loaded, head, sizes, max_tokens, device)
    tables = shape.layers if selector.in_layer else 1
    kv = TieredKV(
        shape,
        resident=resident,
        head_map=selector.head_map,
        tables=tables,
        groups=selector.groups,
        slots=slots,
        sink=method.sink,
        recent=method.recent,
        seats=config.max_num_seqs,
        max_tokens=max_tokens,
        page_size=config.page_size,
        device_pages=sizes.device_pages,
        host_pages=sizes.host_pages,
        device=device,
        verify_loads=config.verify_loads,
    )
    meter = Meter(
        shape,
        selector.head_map,
        resident,
        tables=tables,
        groups=selector.groups,
        seats=config.max_num_seqs,
        max_tokens=max_tokens,
        device=device,
    )
    return Parts(method, selector, kv, meter, sizes, max_tokens, head)


def describe_head(head: RetrievalHead, max_tokens: int) -> str:
    """What kind of head is in use and how far its RoPE reaches, in a line."""
    scaling = head.config.rope_scaling
    reach = f"YaRN factor {head.yarn_factor:.4g}" if scaling is None else f"scaling {scaling['rope_type']}"
    trained = f"trained on {head.config.trained_length} tokens, contexts of up to {max_tokens}"
    return f"retrieval head ({head.config.variant}): RoPE base {head.rope_theta:g}, {reach}; {trained}"


def longest_context(config: EngineConfig, shape: ModelShape) -> int:
    """The engine's longest context in tokens; raises ConfigError for one beyond the model's."""
    if config.max_model_len is not None and config.max_model_len > shape.max_position:
        raise ConfigError(f"max_model_len {config.max_model_len} exceeds the model's maximum of {shape.max_position} tokens")
    return config.max_model_len or shape.max_position


def _selector(
    config: EngineConfig,
    method: SpeContextConfig,
    loaded: LoadedModel,
    head: RetrievalHead | None,
    sizes: TierSizes,
    max_tokens: int,
    device: torch.device,
) -> Selector:
    shape = loaded.shape
    assert method.budget is not None
    budget = Budget(method.budget, method.sink, method.recent)
    if method.method == "full":
        return FullSelector(shape)
    if method.method == "streaming":
        return StreamingSelector(shape, budget)
    if method.method == "random":
        return RandomSelector(shape, budget, granularity=method.granularity)
    if method.method == "oracle":
        return OracleSelector(shape, budget, granularity=method.granularity)
    assert head is not None
    cache = KeyCache(
        seats=config.max_num_seqs,
        max_tokens=max_tokens,
        num_pages=sizes.key_pages,
        page_size=config.page_size,
        groups=head.config.kv_heads,
        head_dim=head.config.head_dim,
        dtype=shape.dtype,
        device=device,
    )
    embedding = loaded.model.get_input_embeddings()
    return SpeculativeSelector(shape, budget, head, embedding, cache, granularity=method.granularity)

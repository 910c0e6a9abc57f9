"""What an engine's settings come to for a loaded model on this machine, before any memory is taken."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch

from specontext.config import EngineConfig, SpeContextConfig
from specontext.engine.only_windows import methods_run, without_what_has_no_meaning
from specontext.engine.tier_memory import check_host_format, with_kv_formats, with_kv_where_it_can_be
from specontext.errors import ConfigError
from specontext.memory.probe import machine_speed
from specontext.memory.step_time import MachineSpeed
from specontext.model_shape import ModelShape
from specontext.models.loading import LoadedModel
from specontext.models.ranks import Ranks
from specontext.models.rope import fix_rope
from specontext.retrieval.head import RetrievalHead
from specontext.retrieval.head_part import head_part
from specontext.retrieval.methods import context_of, selector_class, token_sets
from specontext.retrieval.registry import base_of, needs_head, variant_of
from specontext.retrieval.selector import Budget, LayerSelector, MethodContext, Selector, reads_everything

logger = logging.getLogger("specontext")


@dataclass(frozen=True)
class Settled:
    """Settings of an engine that leave nothing open.

    Attributes:
        loaded: the model with the number formats of its KV, of which a rank has its part.
        method: settings of the engine's own method.
        names: methods that are made, the engine's own first.
        context: what they are made of.
        whole_head: the retrieval head, of which the methods of a rank may have a part; None without one.
    """

    config: EngineConfig
    loaded: LoadedModel
    method: SpeContextConfig
    names: tuple[str, ...]
    context: MethodContext
    whole_head: RetrievalHead | None
    machine: MachineSpeed

    @property
    def shape(self) -> ModelShape:
        """Of the model, or of a rank's part."""
        return self.loaded.shape

    @property
    def ranks(self) -> Ranks | None:
        return self.loaded.ranks

    @property
    def head(self) -> RetrievalHead | None:
        """The retrieval head as methods have it."""
        return self.context.head

    @property
    def device(self) -> torch.device:
        return self.context.device

    @property
    def max_tokens(self) -> int:
        """Longest context of one request."""
        return self.context.max_tokens

    @property
    def adaptive(self) -> bool:
        """Whether layers may move."""
        return self.method.offload_layers is None

    @property
    def kinds(self) -> list[type[Selector]]:
        return [selector_class(name) for name in self.names]

    @property
    def selects(self) -> bool:
        """Whether some method does not read everything."""
        return not all(map(reads_everything, self.kinds))

    @property
    def selects_in_layer(self) -> str | None:
        """The first method that chooses in each layer for itself; None where none does."""
        return next((name for name in self.names if issubclass(selector_class(name), LayerSelector)), None)

    @cached_property
    def token_sets(self) -> int:
        """Of the method that has most; raises ConfigError for one that cannot work."""
        return max(token_sets(name, context_of(name, self.context)) for name in self.names)


def settle(config: EngineConfig, loaded: LoadedModel, head: RetrievalHead | None, device: torch.device) -> Settled:
    """Settle what is open, and fix the RoPE of the model and of its head for the longest context.

    Raises:
        ConfigError: settings that do not fit the model.
        HeadError: RoPE settings that do not fit the head.
    """
    loaded = replace(loaded, shape=with_kv_formats(config, loaded.shape, device))
    whole, ranks = loaded.shape, loaded.ranks
    shape = whole if ranks is None else ranks.share.shape(whole)
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
    names, own = methods_run(config, shape), head
    if ranks is not None and head is not None and method.granularity == "head" and not any(map(reads_all_groups, names)):
        own = head_part(head, whole, ranks.share)
    check_variants(names, method)
    assert method.budget is not None
    context = MethodContext(
        whole,
        Budget(method.budget, method.sink, method.recent),
        method.granularity,
        config.max_num_seqs,
        max_tokens,
        device,
        own,
        part=None if ranks is None else shape,
        head_is_part=own is not head,
    )
    settled = Settled(config, replace(loaded, shape=shape), method, names, context, head, machine)
    if ranks is not None and settled.selects_in_layer is not None and ranks.share.size > whole.kv_heads:
        raise ConfigError(
            f"method {settled.selects_in_layer} chooses by all query heads of a KV head, and with tensor_parallel_size "
            f"{ranks.share.size} for {whole.kv_heads} KV heads no rank has them all: lower it to {whole.kv_heads}, or take "
            "another method"
        )
    return settled


def longest_context(config: EngineConfig, shape: ModelShape) -> int:
    """The engine's longest context in tokens; raises ConfigError for one beyond the model's."""
    if config.max_model_len is not None and config.max_model_len > shape.reach:
        raise ConfigError(f"max_model_len {config.max_model_len} exceeds the model's maximum of {shape.longest}")
    if config.max_model_len is None and shape.limited_by:
        logger.warning("contexts of up to %s", shape.longest)
    return config.max_model_len or shape.max_position


def describe_head(head: RetrievalHead, max_tokens: int) -> str:
    """What kind of head is in use and how far its RoPE reaches, in a line."""
    scaling = head.config.rope_scaling
    reach = f"YaRN factor {head.yarn_factor:.4g}" if scaling is None else f"scaling {scaling['rope_type']}"
    trained = f"trained on {head.config.trained_length} tokens, contexts of up to {max_tokens}"
    return f"retrieval head ({head.config.variant}): RoPE base {head.rope_theta:g}, {reach}; {trained}"


def check_variants(names: Sequence[str], method: SpeContextConfig) -> None:
    """Raises ConfigError for a variant that requests may name and that cannot work in this engine."""
    for name in names:
        if base_of(name) not in names:
            raise ConfigError(f"method '{name}' needs '{base_of(name)}' beside it: name both in methods (--methods)")
        variant = variant_of(name)
        if variant is not None and variant.keeps_generated and method.offload_layers != 0:
            raise ConfigError(f"method '{name}' reads all generated tokens, for which no slots suffice: set offload_layers to 0")


def reads_all_groups(name: str) -> bool:
    """Whether a variant of a method with a retrieval head needs more groups than a rank's KV heads read."""
    return needs_head(name) and variant_of(name) is not None

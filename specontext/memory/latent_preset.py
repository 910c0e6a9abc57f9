"""Presets of models with multi-head latent attention, whose layers are mixtures of experts but for the first ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from specontext.layer_sizes import LatentSizes
from specontext.memory.facts import HeadFacts, ModelFacts
from specontext.memory.preset import NumberFormat, Preset
from specontext.model_shape import ModelShape

if TYPE_CHECKING:  # takes seconds to import, and only annotations here need them
    import torch
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Experts:
    """A layer's experts.

    Attributes:
        count, chosen: of them, and how many a token goes to.
        shared: those that every token goes to.
        width: intermediate size of one.
        dense_layers: layers before the first one with experts.
        groups, chosen_groups: into which they are divided, and from which a token's are chosen.
    """

    count: int
    chosen: int
    shared: int
    width: int
    dense_layers: int
    groups: int = 1
    chosen_groups: int = 1


@dataclass(frozen=True, kw_only=True)
class LatentPreset(Preset):
    """A decoder of DeepSeek's kind.

    Attributes:
        rope: entries of RoPE beside its base.
        latent: what is stored.
        query_rank: numbers from which queries are made; 0 where they are made of the hidden state.
    """

    rope: Mapping[str, Any]
    latent: LatentSizes
    query_rank: int
    experts: Experts

    def matrices_of(self, layer: int) -> tuple[tuple[int, int], ...]:
        """See `Preset.matrices_of`: what makes keys and values of latents is not quantised here."""
        width, heads, rank = self.hidden_size, self.query_heads, self.query_rank
        queries = ((rank, width), (heads * self.latent.key, rank)) if rank else ((heads * self.latent.key, width),)
        dense, own = layer < self.experts.dense_layers, self.experts.width
        wide = self.intermediate_size if dense else self.experts.shared * own
        routed = () if dense else ((2 * own, width), (width, own)) * self.experts.count
        return (
            *queries,
            (self.latent.row, width),
            (width, heads * self.latent.value),
            *((wide, width), (wide, width), (width, wide)),
            *routed,
        )

    @property
    def parameters(self) -> int:
        """See `Preset.parameters`."""
        width, experts, sizes = self.hidden_size, self.experts, self.latent
        linear = sum(n * k for layer in range(self.layers) for n, k in self.matrices_of(layer))
        made = sizes.rank * self.query_heads * (sizes.key - sizes.rotated + sizes.value)
        norms = 2 * width + sizes.rank + self.query_rank
        routers = (self.layers - experts.dense_layers) * experts.count * width
        layers = linear + self.layers * (made + norms) + routers
        return layers + self.vocab_size * width * (1 if self.tied else 2) + width

    def shape(self, dtype: torch.dtype | NumberFormat | None = None) -> ModelShape:
        """See `Preset.shape`."""
        return replace(super().shape(dtype), latent=self.latent)

    def facts(self, dtype: torch.dtype | NumberFormat | None = None, head: HeadFacts | None = None) -> ModelFacts:
        """See `Preset.facts`."""
        making = self.layers * self.hidden_size * (self.latent.row + self.query_rank)
        return replace(super().facts(dtype, head), whole_parameters=making)

    def config(self, **changes: Any) -> PreTrainedConfig:
        """See `Preset.config`."""
        from transformers import DeepseekV2Config, DeepseekV3Config, Glm4MoeLiteConfig

        kinds: dict[str, type] = {"deepseek_v2": DeepseekV2Config, "deepseek_v3": DeepseekV3Config}
        kinds["glm4_moe_lite"] = Glm4MoeLiteConfig
        experts, sizes = self.experts, self.latent
        values: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.query_heads,
            "max_position_embeddings": self.max_position,
            "tie_word_embeddings": self.tied,
            "kv_lora_rank": sizes.rank,
            "q_lora_rank": self.query_rank or None,
            "qk_rope_head_dim": sizes.rotated,
            "qk_nope_head_dim": sizes.key - sizes.rotated,
            "v_head_dim": sizes.value,
            "n_routed_experts": experts.count,
            "num_experts_per_tok": experts.chosen,
            "n_shared_experts": experts.shared,
            "moe_intermediate_size": experts.width,
            "n_group": experts.groups,
            "topk_group": experts.chosen_groups,
            "rope_parameters": {"rope_theta": self.rope_theta, **self.rope},
            "dtype": "bfloat16",
        }
        if self.family != "glm4_moe_lite":  # whose first layer is always the dense one
            values["first_k_dense_replace"] = experts.dense_layers
        values |= {name: value for name, value in changes.items() if name not in ("num_key_value_heads", "head_dim")}
        values["num_key_value_heads"] = values["num_attention_heads"]  # of what is made of latents
        config: PreTrainedConfig = kinds[self.family](**values)
        return config

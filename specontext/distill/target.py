"""The target model as a teacher: one dense pass shows its features, its last hidden states and its attention.

Attention is shown layer by layer, for sampled query positions only, and is never kept: what a listener does not add up is
gone. So a long sequence costs the memory of one layer's sampled rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from specontext.models.attention import RUNNING, attention_of, listening, refuse_foreign
from specontext.models.features import FeatureTaps
from specontext.retrieval.head import RetrievalHead

IMPLEMENTATION = "specontext_teaching"
LayerListener = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Observation:
    """What one pass of the target shows.

    Attributes:
        ids: int64 [N, S], the tokens.
        embeddings: [N, S, H], of the tokens.
        features: [N, S, F * H], each token's own.
        hidden: [N, S, H], after the last norm: what the output matrix reads.
    """

    ids: Tensor
    embeddings: Tensor
    features: Tensor
    hidden: Tensor

    def embedded(self, head: RetrievalHead) -> Tensor:
        """Embeddings [N, S, H] of the tokens as a head sees them."""
        return head.embedded(self.ids, lambda _: self.embeddings)


@dataclass(frozen=True, eq=False)
class _Shown:
    """Query positions int64 [N, Q] whose attention is shown, and to whom."""

    rows: Tensor | None
    listeners: tuple[LayerListener, ...]


class Target:
    """A Hugging Face decoder that a retrieval head learns from; it is never trained itself.

    Attributes:
        layers, groups, query_heads: L, Hkv and Hq of its attention.
    """

    def __init__(self, model: PreTrainedModel, feature_layers: tuple[int, ...]) -> None:
        AttentionInterface.register(IMPLEMENTATION, teaching_attention)
        self.model, self.feature_layers = model.eval().requires_grad_(False), feature_layers
        config = model.config
        self.layers: int = config.num_hidden_layers
        self.query_heads: int = config.num_attention_heads
        self.groups: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def output_matrix(self) -> Tensor:
        """[V, H], which turns `Observation.hidden` into logits."""
        return self.model.get_output_embeddings().weight

    @torch.no_grad()
    def observe(self, ids: Tensor, rows: Tensor | None = None, *listeners: LayerListener) -> Observation:
        """Run sequences through the target.

        Args:
            ids: int64 [N, S], padded at the end only.
            rows: int64 [N, Q], query positions whose attention is shown.
            listeners: called for every layer with its index and the probabilities float32 [N, Hq, Q, S] of these rows.

        Raises:
            ModelError: the model's attention is not plain causal softmax attention.
        """
        taps = FeatureTaps(self.model, self.feature_layers) if self.feature_layers else None
        try:
            with attention_of(self.model, IMPLEMENTATION), listening(self.model, _Shown(rows, listeners)):
                out = self.model.get_decoder()(input_ids=ids, use_cache=False)
            hidden = out.last_hidden_state
            features = hidden.new_zeros((*ids.shape, 0)) if taps is None else taps.take()
        finally:
            if taps is not None:
                taps.remove()
        return Observation(ids, self.model.get_input_embeddings()(ids), features, hidden)


def teaching_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention in Hugging Face's calling convention that shows the probabilities of some rows.

    Args:
        query: [N, Hq, S, D] after RoPE; key and value [N, G, S, D].

    Raises:
        ModelError: a feature that plain causal attention lacks.
    """
    running = getattr(module, RUNNING)
    refuse_foreign(attention_mask, options, running.longest)
    shown: _Shown = running.step
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    if shown.rows is not None and shown.listeners:
        index = shown.rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
        logits = grouped_scores(query.gather(2, index), key).float() * scale
        future = torch.arange(key.shape[2], device=key.device) > shown.rows[..., None]  # [N, Q, S]
        weights = logits.masked_fill_(future[:, None], -math.inf).softmax(-1)
        for listener in shown.listeners:
            listener(module.layer_idx, weights)  # type: ignore[arg-type]
    return out.transpose(1, 2), None


def grouped_scores(query: Tensor, key: Tensor) -> Tensor:
    """Dot products [N, Hq, Q, S] of queries [N, Hq, Q, D] with the keys [N, G, S, D] of their group."""
    scores = query.unflatten(1, (key.shape[1], -1)) @ key[:, :, None].transpose(-1, -2)
    return scores.flatten(1, 2)

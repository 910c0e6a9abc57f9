"""The retrieval head (C1): the query and key projections of an EAGLE-3 draft layer, and nothing else of it.

At position t the head sees the embedding of token x_t and, in the `features` variant, the target's fused hidden features
g_{t-1} of the token before; both exist before the target runs on x_t, and give the query of position t. The key under which
later queries find x_t reads the same pair (key_inputs 'before'), or also the token's own g_t ('around'), and is then known once
the target has run on x_t: in time, since the tokens closest to a query are read in any case. Position 0 has nothing before it
and sees zeros there; it is always kept as a sink.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specontext.errors import HeadError
from specontext.memory.facts import HeadFacts
from specontext.model_shape import ModelShape
from specontext.retrieval.head_config import HeadConfig, is_positive
from specontext.retrieval.rope import rope_frequencies

if TYPE_CHECKING:  # takes seconds to import, and only annotations here need it
    from transformers import PreTrainedConfig

CALLED = ("queries", "fuse", "keys")  # what the engine calls of a head, before and after the target has run


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class RetrievalHead(nn.Module):
    """Queries and keys for retrieval from token embeddings and fused features.

    Embeddings are passed in as vectors, from the target's table or from the head's own (`embedded`): mostly the head holds
    projections and norms only.

    Attributes:
        embed_tokens: [V, H], the head's own embedding table, which is never trained; None for the target's.
        rope_theta, yarn_factor: RoPE in use; the config's theta and no extension until `set_rope` says otherwise.
        inverse_frequencies: float32 [D / 2], whatever the number format of the weights.
        attention_scaling: factor of cos and sin.
    """

    inverse_frequencies: Tensor
    embed_tokens: Tensor | None

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.register_buffer("embed_tokens", torch.zeros(c.vocab_size, c.hidden_size) if c.own_embedding else None)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        width = c.hidden_size
        if c.variant == "features":
            self.fc = nn.Linear(c.target_hidden_size * len(c.feature_layers), c.hidden_size, bias=False)
            self.hidden_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
            if c.feature_norm == "joint":
                self.feature_norm = RMSNorm(c.target_hidden_size * len(c.feature_layers), c.rms_norm_eps)
            elif c.feature_norm == "each":
                self.feature_norms = nn.ModuleList(RMSNorm(c.target_hidden_size, c.rms_norm_eps) for _ in c.feature_layers)
            width = 2 * c.hidden_size
        if c.query_rank is None:
            self.q_proj = nn.Linear(width, c.heads * c.head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(width, c.query_rank, bias=False)
            self.q_b_proj = nn.Linear(c.query_rank, c.heads * c.head_dim, bias=False)
        key_width = width + c.hidden_size * (c.key_inputs == "around")
        self.k_proj = nn.Linear(key_width, c.key_count * c.head_dim, bias=False)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.rope_theta, self.yarn_factor = float(c.rope_theta), 1.0
        frequencies, self.attention_scaling = rope_frequencies(c, theta=self.rope_theta, yarn_factor=1.0)
        self.register_buffer("inverse_frequencies", frequencies.to(self.k_proj.weight.device), persistent=False)

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, *, target: ModelShape | PreTrainedConfig | str | Path) -> RetrievalHead:
        """Read a retrieval head, or prune it from an EAGLE-3 draft while the draft is read.

        Args:
            path_or_hub_id: a head directory, the directory of a whole draft (EAGLE, SpecForge, AngelSlim, speculators), or
                a Hub id of either.
            target: the model it serves: a shape, a transformers config, or a name ('nano', a checkpoint directory, a Hub id).

        Returns:
            The head in float32 on the CPU.

        Raises:
            HeadError: none there, broken, or made for another model.
            ModelError: there is no such target.
        """
        from specontext.retrieval.checkpoint import load_head

        return load_head(path_or_hub_id, target=target)

    def set_rope(self, *, theta: float | None = None, yarn_factor: float = 1.0) -> None:
        """Recompute the frequencies, in place and on their device; keys that are stored already become invalid.

        The config, and so what `save_head` writes, stays as it is.

        Args:
            theta: RoPE base; None takes the config's.
            yarn_factor: how many times the trained length contexts may be; 1 is no extension.

        Raises:
            HeadError: values out of range, or an extension of a head that has its own rope_scaling; nothing is changed then.
        """
        if theta is not None and not is_positive(theta):
            raise HeadError(f"rope_theta of a retrieval head must be a number above 0, got {theta!r}")
        if not is_positive(yarn_factor) or yarn_factor < 1:
            raise HeadError(f"the YaRN factor of a retrieval head must be a number of at least 1, got {yarn_factor!r}")
        if yarn_factor > 1 and self.config.rope_scaling is not None:
            raise HeadError(
                f"this retrieval head has its own rope_scaling ({self.config.rope_scaling['rope_type']}) and cannot be extended "
                "by YaRN: leave head_yarn_factor out or set it to 1"
            )
        base = float(self.config.rope_theta if theta is None else theta)
        frequencies, self.attention_scaling = rope_frequencies(self.config, theta=base, yarn_factor=yarn_factor)
        self.rope_theta, self.yarn_factor = base, float(yarn_factor)
        self.inverse_frequencies.copy_(frequencies)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RetrievalHead:
        """Move or convert the weights; the frequencies move along and stay in float32, where far positions need them."""
        super()._apply(fn, recurse)
        frequencies, _ = rope_frequencies(self.config, theta=self.rope_theta, yarn_factor=self.yarn_factor)
        self.inverse_frequencies = frequencies.to(self.k_proj.weight.device)
        return self

    def embedding_variant(self) -> RetrievalHead:
        """The same head without features: the embedding's part of the projections, columns 0 .. hidden_size - 1."""
        width = self.config.hidden_size
        config = replace(
            self.config,
            variant="embedding",
            feature_layers=(),
            feature_norm="none",
            key_inputs="before",
            recommended_budget=None,
        )
        head = RetrievalHead(config).to(self.k_proj.weight)
        own = self.state_dict()
        reading = [name for name in own if name in ("q_proj.weight", "q_a_proj.weight", "k_proj.weight")]
        own |= {name: own[name][:, :width] for name in reading}
        head.load_state_dict({name: own[name] for name in head.state_dict()})
        head.set_rope(theta=self.rope_theta, yarn_factor=self.yarn_factor)
        return head.train(self.training).requires_grad_(self.k_proj.weight.requires_grad)

    def embedded(self, token_ids: Tensor, embedding: Callable[[Tensor], Tensor]) -> Tensor:
        """Embeddings [..., H] of tokens [...], from the head's own table or, where it has none, from the target's `embedding`."""
        return embedding(token_ids) if self.embed_tokens is None else F.embedding(token_ids, self.embed_tokens)

    @property
    def size(self) -> int:
        """Numbers that the head holds, its own embedding table among them."""
        return sum(parameter.numel() for parameter in self.parameters()) + self.config.table_parameters

    def forward(
        self, embeddings: Tensor, features: Tensor | None, positions: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys of whole sequences.

        Args:
            embeddings: [..., S, H].
            features: [..., S, F * target hidden], each token's own; None for the embedding variant.
            positions: integer [S] or [..., S].
            rows: int64 [..., Q], the places in the sequences that queries are wanted of; None for all.

        Returns:
            queries [..., S or Q, heads, D] and keys [..., S, key heads, D].
        """
        fused = before = None
        if self.config.variant == "features":
            assert features is not None
            fused = self.fuse(features)
            before = F.pad(fused[..., :-1, :], (0, 0, 1, 0))
        keys = self.keys(embeddings, fused, before, positions)
        if rows is not None:
            positions = positions.expand(embeddings.shape[:-1]).gather(-1, rows)
            index = rows[..., None].expand(*rows.shape, embeddings.shape[-1])
            embeddings, before = embeddings.gather(-2, index), None if before is None else before.gather(-2, index)
        return self.queries(embeddings, before, positions), keys

    def fuse(self, features: Tensor) -> Tensor:
        """What the head sees of the target's features [..., F * target hidden]: fused and normalised, [..., H].

        Zeros stand for a token that is not there.
        """
        fused: Tensor = self.hidden_norm(self.project_features(features))
        return fused

    def project_features(self, features: Tensor) -> Tensor:
        """Fused features before the norm, which are the hidden state of a draft: [..., H]."""
        features = features.to(self.fc.weight.dtype)
        if self.config.feature_norm == "joint":
            features = self.feature_norm(features)
        elif self.config.feature_norm == "each":
            parts = features.chunk(len(self.feature_norms), dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.feature_norms, parts, strict=True)], dim=-1)
        projected: Tensor = self.fc(features)
        return projected

    def queries(self, embeddings: Tensor, before: Tensor | None, positions: Tensor) -> Tensor:
        """Rotated queries [..., heads, D] of tokens at integer `positions` [...].

        Args:
            embeddings: [..., H].
            before: [..., H], what `fuse` gave of the tokens one before; None for the embedding variant.
        """
        return self.project_queries(self.layer_input(embeddings, before), positions)

    def keys(self, embeddings: Tensor, own: Tensor | None, before: Tensor | None, positions: Tensor) -> Tensor:
        """Rotated keys [..., key heads, D] of tokens at integer `positions` [...].

        Args:
            embeddings: [..., H].
            own, before: [..., H], what `fuse` gave of these tokens and of those one before; None for the embedding variant.
        """
        seen = (own, before) if self.config.key_inputs == "around" else (before,)
        return self.project_keys(self.layer_input(embeddings, *seen), positions)

    def layer_input(self, embeddings: Tensor, *fused: Tensor | None) -> Tensor:
        """What a projection reads: [..., H] for the embedding, and as much for everything that is seen beside it."""
        return torch.cat((self.input_layernorm(embeddings), *(part for part in fused if part is not None)), dim=-1)

    def project_queries(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotated queries [..., heads, D] of layer inputs."""
        c = self.config
        flat = self.q_proj(x) if c.query_rank is None else self.q_b_proj(self.q_a_proj(x))
        queries = flat.unflatten(-1, (c.heads, c.head_dim))
        return self._rotated(self.q_norm(queries) if c.qk_norm else queries, positions)

    def project_keys(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotated keys [..., key heads, D] of layer inputs."""
        c = self.config
        keys = self.k_proj(x).unflatten(-1, (-1, c.head_dim))
        return self._rotated(self.k_norm(keys) if c.qk_norm else keys, positions)

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = positions[..., None].float() * self.inverse_frequencies
        cos = angles.cos()[..., None, :] * self.attention_scaling
        sin = angles.sin()[..., None, :] * self.attention_scaling
        return rotate(x, cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the half-split layout of Hugging Face (x [..., heads, D], cos and sin [..., 1, D/2])."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def head_parameters(config: HeadConfig) -> int:
    """`size` of a head of this config, without allocating it."""
    with torch.device("meta"):
        return RetrievalHead(config).size


def facts_of_head(config: HeadConfig, source: str = "") -> HeadFacts:
    """What a memory plan must know of a head of this config."""
    return HeadFacts(
        parameters=head_parameters(config),
        heads=config.heads,
        kv_heads=config.kv_heads,
        key_heads=config.key_count,
        head_dim=config.head_dim,
        feature_width=config.target_hidden_size * len(config.feature_layers),
        state_width=config.hidden_size if config.variant == "features" else 0,
        recommended_budget=config.recommended_budget,
        source=source,
        lookup_parameters=config.table_parameters,
        head_map=config.head_map,
    )

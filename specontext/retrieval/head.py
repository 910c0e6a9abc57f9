"""The retrieval head (C1): the query and key projections of an EAGLE-3 draft layer, and nothing else of it.

At position t the head sees the embedding of token x_t and, in the `features` variant, the target's fused hidden features
g_{t-1} of the token before; both exist before the target runs on x_t. The pair gives the query of position t and the key
under which later queries find it. Position 0 has no feature and hence no key: it is always kept as a sink.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from specontext.core import ModelShape, SpeContextError

VARIANTS = ("features", "embedding")
FEATURE_NORMS = ("none", "joint", "each")


class HeadError(SpeContextError, ValueError):
    """A retrieval head that is missing, broken or made for another model."""


@dataclass(frozen=True)
class HeadConfig:
    """Shape and origin of a retrieval head; the content of its `config.json`.

    Attributes:
        variant: 'features' reads the embedding and the fused features of the token before, 'embedding' the embedding only.
        hidden_size: width of the embedding and of the fused feature.
        target_hidden_size: width of one feature layer of the target.
        vocab_size: vocabulary of the target, whose embedding table the head uses.
        heads, kv_heads, head_dim: query heads, retrieval groups, width of one head.
        feature_norm: RMSNorm before the features are fused: 'none', 'joint' over all of them, or 'each' layer's own.
        feature_layers: indices l of the target's `hidden_states[l]` (the input of decoder layer l), concatenated in order.
        head_map: for every target layer the retrieval group that each KV head reads; None maps head h to group h.
        rope_theta: RoPE base of the head; it need not be the target's.
        rope_scaling: further RoPE parameters in Hugging Face's form, None for none.
        trained_length: longest context the head was trained on, in tokens.
        recommended_budget: budget that the head's author measured to be enough, None if unknown.
        qk_norm: whether queries and keys of each head are RMS-normalised before RoPE (Qwen3 drafts).
        source: where the weights come from.
    """

    variant: str
    hidden_size: int
    target_hidden_size: int
    vocab_size: int
    heads: int
    kv_heads: int
    head_dim: int
    feature_layers: tuple[int, ...] = ()
    feature_norm: str = "none"
    head_map: tuple[tuple[int, ...], ...] | None = None
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    trained_length: int = 2048
    recommended_budget: int | None = None
    qk_norm: bool = False
    rms_norm_eps: float = 1e-6
    source: str = ""

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise HeadError(f"unknown retrieval head variant '{self.variant}': expected one of {', '.join(VARIANTS)}")
        if self.feature_norm not in FEATURE_NORMS:
            raise HeadError(f"unknown feature_norm '{self.feature_norm}': expected one of {', '.join(FEATURE_NORMS)}")
        for name in ("hidden_size", "target_hidden_size", "vocab_size", "heads", "kv_heads", "head_dim", "trained_length"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise HeadError(f"{name} of a retrieval head must be a positive integer, got {value!r}")
        if self.head_dim % 2:
            raise HeadError(f"head_dim {self.head_dim} of a retrieval head must be even: RoPE turns pairs")
        if self.heads % self.kv_heads:
            raise HeadError(f"{self.heads} query heads do not divide into {self.kv_heads} retrieval groups")
        if self.variant == "features":
            if not self.feature_layers:
                raise HeadError("a features head must name its feature_layers")
            if len(set(self.feature_layers)) != len(self.feature_layers):
                raise HeadError(f"feature_layers {list(self.feature_layers)} are not distinct: name different layers")
        if self.rope_scaling is not None:
            raise HeadError(
                f"rope_scaling {self.rope_scaling} is not supported for retrieval heads: remove it from the head's config"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HeadConfig:
        """Read the content of a head's `config.json`.

        Raises:
            HeadError: unknown or missing entries.
        """
        known = {f.name for f in fields(cls)}
        extra = set(values) - known - {"model_type", "format_version"}
        if extra:
            raise HeadError(f"unknown entries in the head's config.json: {', '.join(sorted(extra))}")
        values = {k: v for k, v in values.items() if k in known}
        if values.get("head_map") is not None:
            values["head_map"] = tuple(tuple(row) for row in values["head_map"])
        try:
            values["feature_layers"] = tuple(values.get("feature_layers") or ())
            return cls(**values)
        except TypeError as error:
            raise HeadError(f"the head's config.json is incomplete or wrong: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": "specontext_retrieval_head", "format_version": 1} | asdict(self)

    def check_target(self, target: ModelShape) -> None:
        """Raises HeadError, naming everything that does not fit, unless this head was made for a model of this shape."""
        wrong = []
        pairs = [
            ("hidden size", self.target_hidden_size, target.hidden_size),
            ("embedding width", self.hidden_size, target.hidden_size),
            ("vocabulary", self.vocab_size, target.vocab_size),
        ]
        if self.head_map is None:
            pairs.append(("KV heads", self.kv_heads, target.kv_heads))
        wrong += [f"{name} {mine} (the model has {theirs})" for name, mine, theirs in pairs if mine != theirs]
        if self.feature_layers and not all(0 <= layer <= target.layers for layer in self.feature_layers):
            wrong.append(f"feature layers {list(self.feature_layers)} (the model has {target.layers} layers)")
        if self.head_map is not None:
            shape_fits = len(self.head_map) == target.layers and all(len(row) == target.kv_heads for row in self.head_map)
            if not shape_fits or not all(0 <= group < self.kv_heads for row in self.head_map for group in row):
                wrong.append(f"head map (needs {target.layers} rows of {target.kv_heads} groups below {self.kv_heads})")
        if wrong:
            raise HeadError("this retrieval head was made for another model: it has " + "; ".join(wrong))


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

    The embedding table is the target's own and is passed in as vectors, so the head holds projections and norms only.
    """

    inverse_frequencies: Tensor

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        c = config
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
        self.q_proj = nn.Linear(width, c.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(width, c.kv_heads * c.head_dim, bias=False)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        inverse = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
        self.register_buffer("inverse_frequencies", inverse.float(), persistent=False)

    def forward(self, embeddings: Tensor, features: Tensor | None, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys.

        Args:
            embeddings: [..., H], of the tokens at `positions`.
            features: [..., F * target hidden], of the tokens one before; None for the embedding variant.
            positions: integer [...].

        Returns:
            queries [..., heads, D] and keys [..., kv_heads, D].
        """
        c = self.config
        x = self.input_layernorm(embeddings)
        if c.variant == "features":
            assert features is not None
            x = torch.cat((x, self.hidden_norm(self.fc(self._normed(features.to(x.dtype))))), dim=-1)
        queries = self.q_proj(x).unflatten(-1, (c.heads, c.head_dim))
        keys = self.k_proj(x).unflatten(-1, (c.kv_heads, c.head_dim))
        if c.qk_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        angles = positions[..., None].float() * self.inverse_frequencies
        cos, sin = angles.cos()[..., None, :], angles.sin()[..., None, :]
        return rotate(queries, cos, sin), rotate(keys, cos, sin)

    def _normed(self, features: Tensor) -> Tensor:
        if self.config.feature_norm == "joint":
            return self.feature_norm(features)
        if self.config.feature_norm == "each":
            parts = features.chunk(len(self.feature_norms), dim=-1)
            return torch.cat([norm(part) for norm, part in zip(self.feature_norms, parts, strict=True)], dim=-1)
        return features


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the half-split layout of Hugging Face (x [..., heads, D], cos and sin [..., 1, D/2])."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

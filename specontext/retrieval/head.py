"""The retrieval head (C1): the query and key projections of an EAGLE-3 draft layer, and nothing else of it.

At position t the head sees the embedding of token x_t and, in the `features` variant, the target's fused hidden features
g_{t-1} of the token before; both exist before the target runs on x_t. The pair gives the query of position t and the key
under which later queries find it. Position 0 has no feature and hence no key: it is always kept as a sink.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from specontext.core import ModelShape, SpeContextError

if TYPE_CHECKING:  # takes seconds to import, and only annotations here need it
    from transformers import PreTrainedConfig

VARIANTS = ("features", "embedding")
FEATURE_NORMS = ("none", "joint", "each")
SCALED_ROPE = ("linear", "llama3", "yarn")  # frequencies that do not change while a request grows


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
        rope_scaling: further RoPE parameters in Hugging Face's form: linear, llama3 or yarn; None for none.
        trained_length: longest context the head was trained on, in tokens.
        recommended_budget: budget that the head's author measured to be enough, None if unknown.
        qk_norm: whether queries and keys of each head are RMS-normalised before RoPE (Qwen3 drafts).
        source: where the weights come from.
        yarn: whether contexts beyond `trained_length` are served by YaRN; without effect on a head with `rope_scaling`.
        draft_parameters: size of the draft that the head was pruned from, without embedding table; None if there was none.
        draft_embedding_parameters: size of the embedding table that the draft works with, the target's if it has none.
        source_hash: sha256 of the draft's weight files, one after the other.
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
    yarn: bool = True
    draft_parameters: int | None = None
    draft_embedding_parameters: int | None = None
    source_hash: str = ""

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise HeadError(f"unknown retrieval head variant '{self.variant}': expected one of {', '.join(VARIANTS)}")
        if self.feature_norm not in FEATURE_NORMS:
            raise HeadError(f"unknown feature_norm '{self.feature_norm}': expected one of {', '.join(FEATURE_NORMS)}")
        for name in ("hidden_size", "target_hidden_size", "vocab_size", "heads", "kv_heads", "head_dim", "trained_length"):
            _require(name, getattr(self, name), "a positive integer", _is_whole(getattr(self, name)))
        for name in ("recommended_budget", "draft_parameters", "draft_embedding_parameters"):
            value = getattr(self, name)
            _require(name, value, "a positive integer or null", value is None or _is_whole(value))
        for name in ("rope_theta", "rms_norm_eps"):
            _require(name, getattr(self, name), "a number above 0", _is_positive(getattr(self, name)))
        for name in ("yarn", "qk_norm"):
            _require(name, getattr(self, name), "true or false", isinstance(getattr(self, name), bool))
        layers = self.feature_layers
        _require("feature_layers", list(layers), "a list of integers", all(_is_whole(layer, least=-math.inf) for layer in layers))
        if self.head_map is not None:
            groups = [group for row in self.head_map for group in row]
            _require("head_map", groups, "rows of group numbers", all(_is_whole(group, least=-math.inf) for group in groups))
        if self.head_dim % 2:
            raise HeadError(f"head_dim {self.head_dim} of a retrieval head must be even: RoPE turns pairs")
        if self.heads % self.kv_heads:
            raise HeadError(f"{self.heads} query heads do not divide into {self.kv_heads} retrieval groups")
        if self.variant == "features":
            if not layers:
                raise HeadError("a features head must name its feature_layers")
            if len(set(layers)) != len(layers):
                raise HeadError(f"feature_layers {list(layers)} are not distinct: name different layers")
        if self.rope_scaling is not None:
            object.__setattr__(self, "rope_scaling", checked_scaling(self.rope_scaling))

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
        try:
            if values.get("head_map") is not None:
                values["head_map"] = tuple(tuple(row) for row in values["head_map"])
            values["feature_layers"] = tuple(values.get("feature_layers") or ())
            return cls(**values)
        except TypeError as error:
            raise HeadError(f"the head's config.json is incomplete or wrong: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": "specontext_retrieval_head", "format_version": 1} | asdict(self)

    def check_target(self, target: ModelShape, *, need_map: bool = True) -> None:
        """Raises HeadError, naming everything that does not fit, unless this head was made for a model of this shape.

        Args:
            need_map: refuse a head that has another number of groups than the model has KV heads, and no head map.
        """
        pairs = (
            ("hidden size", self.target_hidden_size, target.hidden_size),
            ("embedding width", self.hidden_size, target.hidden_size),
            ("vocabulary", self.vocab_size, target.vocab_size),
        )
        wrong = [f"{name} {mine} (the model has {theirs})" for name, mine, theirs in pairs if mine != theirs]
        if self.feature_layers and not all(0 <= layer <= target.layers for layer in self.feature_layers):
            wrong.append(f"feature layers {list(self.feature_layers)} (the model has {target.layers} layers)")
        if self.head_map is not None:
            shape_fits = len(self.head_map) == target.layers and all(len(row) == target.kv_heads for row in self.head_map)
            if not shape_fits or not all(group in range(self.kv_heads) for row in self.head_map for group in row):
                wrong.append(f"head map (needs {target.layers} rows of {target.kv_heads} groups below {self.kv_heads})")
        if wrong:
            raise HeadError("this retrieval head was made for another model: it has " + "; ".join(wrong))
        if need_map and self.head_map is None and self.kv_heads != target.kv_heads:
            raise HeadError(
                f"this retrieval head has {self.kv_heads} groups and the model {target.kv_heads} KV heads, so it needs a "
                "head map: make one with `specontext head calibrate`"
            )

    def yarn_factor(self, max_tokens: int) -> float:
        """YaRN's factor for contexts of up to `max_tokens` tokens; 1 is no extension."""
        if not self.yarn or self.rope_scaling is not None:
            return 1.0
        return max(1.0, max_tokens / self.trained_length)

    def pruned_share(self, parameters: int, *, with_embeddings: bool = False) -> float | None:
        """Share of the draft that was left out in a head of `parameters` numbers; None if it was not pruned from a draft.

        Args:
            with_embeddings: count the embedding table as part of the draft.
        """
        if self.draft_parameters is None or (with_embeddings and self.draft_embedding_parameters is None):
            return None
        whole = self.draft_parameters + (self.draft_embedding_parameters or 0) * with_embeddings
        return 1 - parameters / whole


def _is_whole(value: object, least: float = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _require(name: str, value: object, kind: str, fits: bool) -> None:
    if not fits:
        raise HeadError(f"{name} of a retrieval head must be {kind}, got {value!r}")


def checked_scaling(scaling: Any) -> dict[str, Any] | None:
    """RoPE parameters in the form that transformers calculates with; None for plain RoPE.

    Raises:
        HeadError: a kind that a retrieval head does not follow.
    """
    _require("rope_scaling", scaling, "an object", isinstance(scaling, dict))
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return None
    if kind not in SCALED_ROPE:
        raise HeadError(
            f"RoPE of type {kind} is not supported for retrieval heads, which follow default, {', '.join(SCALED_ROPE)}: "
            "remove rope_scaling from the config and set rope_theta"
        )
    if scaling.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise HeadError("partial_rotary_factor is not supported for retrieval heads: RoPE turns the whole head")
    start = scaling.get("original_max_position_embeddings")
    if kind != "linear":
        _require(f"original_max_position_embeddings in the {kind} scaling", start, "a positive integer", _is_whole(start))
    return {"rope_type": kind} | {name: value for name, value in scaling.items() if name not in ("type", "rope_theta")}


def rope_frequencies(config: HeadConfig, *, theta: float, yarn_factor: float) -> tuple[Tensor, float]:
    """Inverse frequencies, float32 [D / 2] on the CPU, and the factor of cos and sin.

    Scaled kinds are transformers' own; YaRN extends from the trained length.

    Raises:
        HeadError: RoPE parameters that are incomplete or wrong.
    """
    scaling = config.rope_scaling
    if yarn_factor > 1:
        scaling = {"rope_type": "yarn", "factor": yarn_factor, "original_max_position_embeddings": config.trained_length}
    with torch.device("cpu"):
        if scaling is None:
            return (theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)).float(), 1.0
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        try:
            form = LlamaConfig(
                hidden_size=config.heads * config.head_dim,
                num_attention_heads=config.heads,
                head_dim=config.head_dim,
                max_position_embeddings=scaling.get("original_max_position_embeddings") or config.trained_length,
                rope_parameters=scaling | {"rope_theta": theta, "factor": float(scaling["factor"])},
            )
            frequencies, attention_scaling = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](form, torch.device("cpu"))
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise HeadError(f"rope_scaling {scaling} of the retrieval head is incomplete or wrong: {error}") from error
        if not torch.isfinite(frequencies).all():
            raise HeadError(f"rope_scaling {scaling} of the retrieval head gives frequencies that are not finite numbers")
        return frequencies, float(attention_scaling)


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

    Attributes:
        rope_theta, yarn_factor: RoPE in use; the config's theta and no extension until `set_rope` says otherwise.
        inverse_frequencies: float32 [D / 2], whatever the number format of the weights.
        attention_scaling: factor of cos and sin.
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
        self.rope_theta, self.yarn_factor = float(c.rope_theta), 1.0
        frequencies, self.attention_scaling = rope_frequencies(c, theta=self.rope_theta, yarn_factor=1.0)
        self.register_buffer("inverse_frequencies", frequencies.to(self.q_proj.weight.device), persistent=False)

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
        if theta is not None and not _is_positive(theta):
            raise HeadError(f"rope_theta of a retrieval head must be a number above 0, got {theta!r}")
        if not _is_positive(yarn_factor) or yarn_factor < 1:
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
        self.inverse_frequencies = frequencies.to(self.q_proj.weight.device)
        return self

    def embedding_variant(self) -> RetrievalHead:
        """The same head without features: the embedding's half of the projections, columns 0 .. hidden_size - 1."""
        width = self.config.hidden_size
        config = replace(self.config, variant="embedding", feature_layers=(), feature_norm="none", recommended_budget=None)
        head = RetrievalHead(config).to(self.q_proj.weight)
        own = self.state_dict()
        own |= {name: own[name][:, :width] for name in ("q_proj.weight", "k_proj.weight")}
        head.load_state_dict({name: own[name] for name in head.state_dict()})
        head.set_rope(theta=self.rope_theta, yarn_factor=self.yarn_factor)
        return head.train(self.training).requires_grad_(self.q_proj.weight.requires_grad)

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
        cos = angles.cos()[..., None, :] * self.attention_scaling
        sin = angles.sin()[..., None, :] * self.attention_scaling
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


def head_parameters(config: HeadConfig) -> int:
    """Number of parameters of a head, without allocating them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in RetrievalHead(config).parameters())

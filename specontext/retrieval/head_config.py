"""Shape and origin of a retrieval head: what its `config.json` says, and whether it fits a model."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from specontext.errors import HeadError, shown
from specontext.model_shape import ModelShape

VARIANTS = ("features", "embedding")
FEATURE_NORMS = ("none", "joint", "each")
KEY_INPUTS = ("before", "around")
SCALED_ROPE = ("linear", "llama3", "yarn")  # frequencies that do not change while a request grows
# What is understood of RoPE parameters, by their type; sections of images' positions are equal for text.
OF_YARN = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
ROPE_ENTRIES = {
    "default": {"mrope_section", "mrope_interleaved"},
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", *OF_YARN},
}
ROPE_ORIGIN = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
POSITIVE = {"factor", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow"}
FORMAT = {"model_type": "specontext_retrieval_head", "format_version": 1}
WIDEST, MOST = 1 << 20, 1 << 40  # width of anything in a head, and any other number: beyond are broken files
WIDEST_KEY = 1 << 16


@dataclass(frozen=True)
class HeadConfig:
    """Shape and origin of a retrieval head; the content of its `config.json`.

    Attributes:
        variant: 'features' reads the embedding and the fused features of the token before, 'embedding' the embedding only.
        hidden_size: width of the embedding and of the fused feature.
        own_embedding: whether the head has an embedding table of its own, for a draft of another width than its target; else it
            uses the target's.
        target_hidden_size: width of one feature layer of the target.
        vocab_size: vocabulary of the target.
        heads, kv_heads, head_dim: query heads, retrieval groups, width of one head. Where a KV head has several groups, one for
            each band of layers, those of KV head 0 come first.
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
        key_heads: keys stored of each token, which divide the groups: group g reads key g * key_heads // kv_heads. None stores
            one for each group.
        key_inputs: what the key of a token reads beside its embedding: 'before' (EAGLE's) the features of the token before, or
            'around' its own and those of the token before.
        query_rank: width between two factors of the query projection; None for one matrix.
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
    own_embedding: bool = False
    key_heads: int | None = None
    key_inputs: str = "before"
    query_rank: int | None = None

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise HeadError(f"unknown retrieval head variant '{self.variant}': expected one of {', '.join(VARIANTS)}")
        if self.feature_norm not in FEATURE_NORMS:
            raise HeadError(f"unknown feature_norm '{self.feature_norm}': expected one of {', '.join(FEATURE_NORMS)}")
        if self.key_inputs not in KEY_INPUTS:
            raise HeadError(f"unknown key_inputs '{self.key_inputs}': expected one of {', '.join(KEY_INPUTS)}")
        if self.key_inputs == "around" and self.variant != "features":
            raise HeadError(
                f"key_inputs 'around' reads features, which a head of variant '{self.variant}' does not: use 'before'"
            )
        most = {"head_dim": WIDEST_KEY, "trained_length": MOST, "vocab_size": MOST}
        for name in ("hidden_size", "target_hidden_size", "vocab_size", "heads", "kv_heads", "head_dim", "trained_length"):
            _require(name, getattr(self, name), "a positive integer", _is_whole(getattr(self, name), most=most.get(name, WIDEST)))
        most = {"key_heads": WIDEST, "query_rank": WIDEST}
        for name in ("recommended_budget", "draft_parameters", "draft_embedding_parameters", "key_heads", "query_rank"):
            value = getattr(self, name)
            fits = value is None or _is_whole(value, most=most.get(name, MOST))
            _require(name, value, "a positive integer or null", fits)
        for name in ("source", "source_hash"):
            _require(name, getattr(self, name), "a text", isinstance(getattr(self, name), str))
        for name in ("rope_theta", "rms_norm_eps"):
            _require(name, getattr(self, name), "a number above 0", is_positive(getattr(self, name)))
        for name in ("yarn", "qk_norm", "own_embedding"):
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
        if self.kv_heads % self.key_count:
            raise HeadError(f"{self.kv_heads} retrieval groups do not divide into {self.key_heads} key heads")
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
            HeadError: unknown or missing entries, or a format that this version does not know.
        """
        for name, own in FORMAT.items():
            if values.get(name, own) != own:
                raise HeadError(
                    f"the head's config.json has {name} {shown(values[name])}, and this version of specontext reads {own} only: "
                    "take the version that wrote it"
                )
        known = {f.name for f in fields(cls)}
        extra = set(values) - known - FORMAT.keys()
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
        return FORMAT | asdict(self)

    def check_target(self, target: ModelShape, *, need_map: bool = True) -> None:
        """Raises HeadError, naming everything that does not fit, unless this head was made for a model of this shape.

        Args:
            need_map: refuse a head that has another number of groups than the model has KV heads, and no head map.
        """
        pairs = (
            ("hidden size", self.target_hidden_size, target.hidden_size),
            ("embedding width", self.hidden_size, self.hidden_size if self.own_embedding else target.hidden_size),
            ("vocabulary", self.vocab_size, target.vocab_size),
        )
        wrong = [f"{name} {mine} (the model has {theirs})" for name, mine, theirs in pairs if mine != theirs]
        if self.feature_layers and not all(0 <= layer <= target.depth for layer in self.feature_layers):
            wrong.append(f"feature layers {list(self.feature_layers)} (the model has {target.depth} layers)")
        if self.head_map is not None:
            shape_fits = len(self.head_map) == target.layers and all(len(row) == target.kv_heads for row in self.head_map)
            if not shape_fits or not all(group in range(self.kv_heads) for row in self.head_map for group in row):
                wrong.append(f"head map (needs {target.layers} rows of {target.kv_heads} groups below {self.kv_heads})")
        if wrong:
            raise HeadError("this retrieval head was made for another model: it has " + "; ".join(wrong))
        if need_map and self.head_map is None and self.kv_heads != target.kv_heads:
            raise HeadError(
                f"this retrieval head has {self.kv_heads} groups and the model {target.kv_heads} KV heads, so it needs a "
                "head map: make one with `specontext head calibrate`, or have all groups choose one set with granularity 'batch'"
            )

    def yarn_factor(self, max_tokens: int) -> float:
        """YaRN's factor for contexts of up to `max_tokens` tokens; 1 is no extension."""
        if not self.yarn or self.rope_scaling is not None:
            return 1.0
        return max(1.0, max_tokens / self.trained_length)

    @property
    def key_count(self) -> int:
        """Keys stored of each token."""
        return self.key_heads or self.kv_heads

    @property
    def table_parameters(self) -> int:
        """Numbers of the head's own embedding table, 0 if it uses the target's."""
        return self.vocab_size * self.hidden_size if self.own_embedding else 0

    def pruned_share(self, parameters: int, *, with_embeddings: bool = False) -> float | None:
        """Share of the draft that was left out in a head of `parameters` numbers; None if it was not pruned from a draft.

        Args:
            with_embeddings: count the embedding table as part of the draft, and of a head that has its own.
        """
        if self.draft_parameters is None or (with_embeddings and self.draft_embedding_parameters is None):
            return None
        whole = self.draft_parameters + (self.draft_embedding_parameters or 0) * with_embeddings
        return 1 - (parameters - (0 if with_embeddings else self.table_parameters)) / whole


def _is_whole(value: object, least: float = 1, most: int = MOST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _require(name: str, value: object, kind: str, fits: bool) -> None:
    if not fits:
        raise HeadError(f"{name} of a retrieval head must be {kind}, got {shown(value)}")


def checked_scaling(scaling: Any) -> dict[str, Any] | None:
    """RoPE parameters in the form that transformers calculates with; None for plain RoPE.

    Raises:
        HeadError: a kind that a retrieval head does not follow.
    """
    _require("rope_scaling", scaling, "an object", isinstance(scaling, dict))
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", *SCALED_ROPE):
        raise HeadError(
            f"RoPE of type {kind} is not supported for retrieval heads, which follow default, {', '.join(SCALED_ROPE)}: "
            "remove rope_scaling from the config and set rope_theta"
        )
    check_share(scaling)
    if odd := [name for name in scaling.keys() - ROPE_ENTRIES[kind] - ROPE_ORIGIN if scaling[name] not in (None, False)]:
        raise HeadError(
            f"RoPE of type {kind} with {odd[0]} {shown(scaling[odd[0]])} is not supported for retrieval heads: remove that entry "
            "if the head was trained without it"
        )
    if kind == "default":
        return None
    for name in sorted(POSITIVE & scaling.keys()):
        if scaling[name] is not None:
            _require(f"{name} in the {kind} scaling", scaling[name], "a number above 0", is_positive(scaling[name]))
    start = scaling.get("original_max_position_embeddings")
    if kind != "linear":
        _require(f"original_max_position_embeddings in the {kind} scaling", start, "a positive integer", _is_whole(start))
    return {"rope_type": kind} | {name: value for name, value in scaling.items() if name not in ("type", "rope_theta")}


def check_share(values: Mapping[str, Any]) -> None:
    """Raises HeadError where RoPE turns only a share of each head."""
    if values.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise HeadError("partial_rotary_factor is not supported for retrieval heads: RoPE turns the whole head")

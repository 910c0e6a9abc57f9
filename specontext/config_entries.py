"""What a Hugging Face config says of a decoder's layers, heads and lengths, whatever it calls them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from specontext.layer_sizes import LatentSizes, Window

if TYPE_CHECKING:  # torch takes seconds to import, and only annotations here need it
    from transformers import PreTrainedConfig


# Entries of configs that name the longest context in tokens, besides max_position_embeddings.
LENGTHS = (
    *("n_ctx", "n_positions", "seq_len", "seq_length", "sequence_length", "max_seq_len", "max_seq_length", "max_sequence_length"),
    *(
        "model_max_length",
        "tokenizer_model_max_length",
        "max_model_len",
        "context_length",
        "max_context_length",
        "max_target_positions",
    ),
)
FAR = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}  # of layers without a window
WINDOWS = {"sliding_window": "sliding_attention", "attention_chunk_size": "chunked_attention"}  # entries, and layers with them


def longest_context(config: PreTrainedConfig) -> tuple[int, str, int]:
    """`max_position`, `limited_by` and `longer` of a decoder.

    Linear and YaRN scaling serve the original length times their factor, also where max_position_embeddings is still the original
    length. A window that the config's class does not know serves contexts of its own size, in which it leaves nothing out.
    RoPE of type longrope serves its original length, in which the library has one set of angles for all contexts, and dynamic
    RoPE max_position_embeddings; where more is asked for, all requests have the angles of that length.
    """
    stated = _tokens(config, "max_position_embeddings")
    named = {name: tokens for name in LENGTHS if (tokens := _tokens(config, name)) is not None}
    if stated is None and not named:
        raise AttributeError("its config does not name its longest context (max_position_embeddings)")
    base = stated or min(named.values())
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    ropes = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    said = _tokens(config, "original_max_position_embeddings")  # beside RoPE's own entries it has precedence in the library
    original = said or rope.get("original_max_position_embeddings") or base
    longest, factor = base, rope.get("factor")
    if (rope.get("rope_type") or rope.get("type")) in ("linear", "yarn") and isinstance(factor, int | float):
        longest = max(base, int(original * factor))
    if config.model_type.startswith("cohere"):  # the length that Command R's model card promises
        longest = max(longest, named.get("model_max_length", 0))
    limits = {f"{name} {tokens} in its config": tokens for name, tokens in named.items() if tokens not in (base, original)}
    turning, longer = {}, longest
    for part in ropes:
        if part.get("rope_type") == "longrope":
            tokens = said or part.get("original_max_position_embeddings") or base
            turning[f"original_max_position_embeddings {tokens}, beyond which RoPE of type longrope has other angles"] = tokens
        if part.get("rope_type") == "dynamic" and isinstance(part.get("factor"), int | float):
            longer = max(longer, int(base * part["factor"]))
    for entry, kind in WINDOWS.items():
        tokens, kinds = _tokens(config, entry), layer_kinds(config)
        used = getattr(config, "use_sliding_window", True) is not False or kind != "sliding_attention"
        if tokens is not None and used and not kinds and not (_declares(config, entry) and kind == "sliding_attention"):
            limits[f"{entry} {tokens} in its config, which its class does not compute"] = tokens
    dual = getattr(config, "dual_chunk_attention_config", None)
    if isinstance(dual, dict) and isinstance(dual.get("chunk_size"), int):
        tokens = dual["chunk_size"] - (dual.get("local_size") or 0)
        limits[f"dual_chunk_attention_config in its config, which has no effect on up to {tokens} tokens"] = tokens
    longer = min(longer, *limits.values()) if limits else longer
    limits |= turning
    least = min(limits, key=lambda words: limits[words], default="")
    found, why = (limits[least], least) if least and limits[least] < longest else (longest, "")
    return found, why, longer if longer > found else 0


def layer_kinds(config: PreTrainedConfig) -> list[str] | None:
    """What kind of attention each layer has, where the config's class knows of such kinds."""
    own = _declares(config, "layer_types") or "layer_types" in config.attribute_map or hasattr(type(config), "layer_types")
    kinds = getattr(config, "layer_types", None) if own else None  # else the class ignores them
    return None if kinds is None else [FORMER_NAMES.get(kind, kind) for kind in kinds]


def _declares(config: PreTrainedConfig, entry: str) -> bool:
    """Whether a config's class knows an entry; others are stored and ignored."""
    return not is_dataclass(config) or entry in {known.name for known in fields(config)}


def declared(config: PreTrainedConfig) -> set[str]:
    """Names of the entries that a config's class knows: fields, arguments, what it sets itself, and other names of these."""
    kind: Any = type(config)  # which can be hashed, where its instances cannot
    return {*_declared_by(kind), *config.attribute_map, *config.attribute_map.values()}


@cache
def _declared_by(kind: Any) -> set[str]:
    names = set(getattr(kind, "__dataclass_fields__", {})) | set(inspect.signature(kind.__init__).parameters)
    try:
        names |= set(vars(kind()))
    except Exception:  # a class that cannot be made without arguments; what it declares is known all the same
        return names
    return names


FORMER_NAMES = {"attention": "full_attention", "mamba": "linear_attention"}
# Kinds of layers without attention: what keeps a state, and what has a feed-forward alone. A "hybrid" has a state and attention.
STATEFUL = ("linear_attention", "conv")
INATTENTIVE = (*STATEFUL, "moe", "mlp")


def inattentive_layers(config: PreTrainedConfig) -> tuple[int, ...]:
    """Numbers of the layers of a decoder that have no attention."""
    kinds = layer_kinds(config) or []
    return tuple(layer for layer, kind in enumerate(kinds[: config.num_hidden_layers]) if kind in INATTENTIVE)


def readers_of(config: PreTrainedConfig) -> tuple[tuple[int, int], ...]:
    """Layers of a decoder that keep no KV, and the layer before them whose KV each reads.

    These are the last ones (num_kv_shared_layers, of Gemma 3n and 4), and the other is the last of its kind that keeps KV.

    Raises:
        AttributeError: no layer of its kind does.
    """
    count = getattr(config, "num_kv_shared_layers", None) or 0
    if not count or not _declares(config, "num_kv_shared_layers"):
        return ()
    first = config.num_hidden_layers - count
    kinds = layer_kinds(config) or ["full_attention"] * config.num_hidden_layers
    owners = {kind: layer for layer, kind in enumerate(kinds[: max(first, 0)])}  # the last of each kind
    found = []
    for layer in range(max(first, 0), config.num_hidden_layers):
        if kinds[layer] in INATTENTIVE:
            continue
        if kinds[layer] not in owners:
            raise AttributeError(
                f"layer {layer} uses the keys and values of a {kinds[layer]} layer before layer {first}, and there is none "
                f"(num_kv_shared_layers {count})"
            )
        found.append((layer, owners[kinds[layer]]))
    return tuple(found)


def windows_of(config: PreTrainedConfig, longest: int) -> tuple[Window | None, ...]:
    """Windows of all layers of a decoder that keep KV; those as long as the context are none."""
    kinds = layer_kinds(config)
    if not kinds:
        windowed = _declares(config, "sliding_window") and getattr(config, "use_sliding_window", True) is not False
        kinds = ["sliding_attention"] * config.num_hidden_layers if windowed else []
    sizes = {kind: _tokens(config, entry) for entry, kind in WINDOWS.items()}
    found: list[Window | None] = []
    readers = dict(readers_of(config))
    for layer, kind in enumerate(kinds[: config.num_hidden_layers]):
        if kind in INATTENTIVE or layer in readers:
            continue
        size = sizes.get(kind)
        found.append(Window(size, kind == "chunked_attention") if size is not None and size < longest else None)
    return tuple(found) if any(found) else ()


def heads_of(config: PreTrainedConfig, layers: Sequence[int]) -> tuple[int, int]:
    """KV heads of some layers, and the width of all their heads; raises AttributeError where these layers differ."""
    queries = of_layers(config, "num_attention_heads", range(config.num_hidden_layers))
    kv_heads = of_layers(config, "num_key_value_heads", layers) or queries
    return kv_heads, of_layers(config, "head_dim", layers) or config.hidden_size // queries


def of_layers(config: PreTrainedConfig, entry: str, layers: Sequence[int]) -> Any:
    """An entry's value where it is the same in these layers; None where there is none."""
    if entry not in (getattr(config, "per_layer_attributes", None) or ()):
        kinds = layer_kinds(config) or []
        if layers and {kind for layer, kind in enumerate(kinds) if layer in layers} == {"full_attention"}:
            other = getattr(config, FAR.get(entry, entry), None)  # of Gemma 4 in older versions of the library
            if other and (entry == "head_dim" or getattr(config, "attention_k_eq_v", False)):
                return other
        return getattr(config, entry) if entry == "num_attention_heads" else getattr(config, entry, None)
    found = sorted({getattr(config.per_layer_config[layer], entry) for layer in layers})
    if len(found) > 1:
        raise AttributeError(f"its layers differ in {entry} ({', '.join(map(str, found))}), and KV here has rows of one width")
    return found[0]


def latent_sizes(config: PreTrainedConfig) -> LatentSizes | None:
    """Sizes of multi-head latent attention; None for any other."""
    rank = getattr(config, "kv_lora_rank", None)
    if not rank:
        return None
    rotated = config.qk_rope_head_dim
    return LatentSizes(rank, rotated, config.qk_nope_head_dim + rotated, config.v_head_dim)


def _tokens(config: PreTrainedConfig, name: str) -> int | None:
    """A number of tokens above 0 that an entry of a config names."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

"""What a config asks of attention, positions and length that is not computed here: refused by the entry's name, before loading.

Entries that a class of configs declares are what its modelling code computes, and modelling code runs unchanged; of these only
what lies in the engine's part is judged. Entries that the class does not know were put there by a vendor: the library stores
them and computes something else, so those that speak of attention, positions or length are refused. Lengths and windows are
no obstacle up to their own size: see `ModelShape.from_config`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers import __version__ as transformers_version
from transformers.activations import ACT2FN

from specontext.config_entries import INATTENTIVE, LENGTHS, WINDOWS, declared, layer_kinds
from specontext.errors import ModelError, shown
from specontext.locations import beside, one_sentence, parts_of
from specontext.model_shape import ModelShape
from specontext.models.class_code import mentioned
from specontext.models.latents import EXPAND
from specontext.models.routing_check import routing_obstacles

LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
MIXED = {"hybrid", *INATTENTIVE}  # besides, where the config's class knows of kinds of layers
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
# What types of RoPE are computed: "dynamic" and "longrope" are served up to their original length, where they are constant.
ROPES = {"default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional"}
SCALING_KEYS = {
    *("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "finetuned"),
    *("low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
}
ROPE_NUMBERS = {  # the least, and what a value should be
    "rope_theta": (0, "a number above 0"),
    "factor": (1, "a number of at least 1"),
    "original_max_position_embeddings": (1, "a number of tokens"),
    **dict.fromkeys(
        ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"), (0, "a number above 0")
    ),
}
ROPE_LISTS = ("short_factor", "long_factor")
ONES = {"factor", "attn_factor", "extrapolation_factor", "attention_factor"}  # nothing as long as they are 1

# Vendor entries by name. What speaks of attention, positions or length ...
LENGTH = re.compile(r"window|(^|_)(seq|sequence|context|ctx)(_|$)|^max_\w+_(length|len)$")
SPEAKS = re.compile(
    LENGTH.pattern + r"|att(n|ention)|rope|rotary|position|alibi|ntk|logn|yarn|sinks?(_|$)|causal|bidirection|softcap|soft_cap"
    r"|query_pre|clip_qkv|qk_|_qk|cache_(bits|quant|scheme)|(^|_)(block_?)?sparse(_|$)|cross_layer|kv_shar|(^|_)(mla|moba|nsa|cla)$"
    r"|(^|_)(mla|moba|nsa)_|softmax|(^|_)(pos|pe)(_|$)|xpos|is_neox|neox_style|(share|tie)\w*_kv|k_eq_v|kv_compress|compress_(ratio|rate)"
    r"|(^|_)([qkv]|key|query|value)_(norm|residual)(_|$)|(^|_)(local|global)_(layers?|every|size|tokens?)(_|$)|^chunk_size$"
    r"|(^|_)(meta|memory|register|prefix)_tokens$|(linear|recurrent)_layers|hybrid_\w*pattern|token_mixer|mixer_types?$|block_types?$"
    r"|(^|_)(nope|no_pe)(_|$)|temperature_tuning|(^|_)index(er)?_(topk|n_heads|num_heads|head_dim|block)"
    r"|llama_4_scaling"
)
# ... or changes what is computed between them, by a number or by a switch,
SCALES = re.compile(
    r"multiplier|logits?_scal|scale_(emb|depth)|embed\w*_scale|dim_model_base|(^|_)mup(_|$)|(residual|output)_scale|(^|_)mscale"
    r"|parallel_(residual|attn|block)|normali[sz]e_embed|sandwich_norm|post_?norm|sub_?norm|(^|_)emb_scale|(logits?|final)_cap$|deepnorm"
    r"|(norm|normali[sz]e)_head$|(^|_)(width|output)_mult$|(^|_)(swi)?glu_(limit|alpha)|clamp|residual_alpha"
    r"|(^|_)(ut|recurrent|recurrence)_(steps|depth)|num_(loops|recurrences|recurrent_steps)$"
)
# ... and yet says how it is computed or trained, or is told by the shapes of the weights.
HARMLESS = re.compile(
    r"drop|flash|sdpa|implementation|backend|kernel|fuse|(sequence|tensor|context)_parallel|(attention|attn|qkv|proj)_(\w+_)?bias$"
    r"|_in_fp32|seq_aux|upcast|initiali[sz]|_token(_ids?|_index)?$|_ids?$|loss|train|(?<!qk_)layer_?norm|(num|n)_\w*heads?|head_(dim|size|type)"
    r"|(ffn|mlp|intermediate|hidden|lr)_\w*multiplier|_dtype|max_window_layers|original_max_position|(^|_)new_"
)
# Numbers that change nothing as long as they are 1.
NEUTRAL = re.compile(r"(scal\w*|factor|multiplier|mult|mod|ratios?|rate|step|every|interval)$")
# In names of entries beside a text's config that speak of images and sounds.
MODALITIES = re.compile(
    r"mm_|multi_?modal|image|img|vision|visual|video|audio|speech|projector|pixel|patch|resampl|perceiver|crop|tile"
)
ON = {
    "rotary",
    "is_neox_style",
    "use_neox_style",
    "use_pos",
    "use_pos_enc",
    "use_rotary",
    "use_rope",
    "use_rotary_pos_emb",
    "use_rotary_embeddings",
    "scale_attn_weights",
    "is_causal",
    "causal",
}
ORDINARY = {
    "full",
    "full_attention",
    "default",
    "rope",
    "rotary",
    "causal",
    "gqa",
    "mha",
    "mqa",
    "multihead",
    "multi_head",
    "self",
}
# Judged elsewhere, for every class.
JUDGED = {
    *("max_position_embeddings", "sliding_window", "use_sliding_window", "attention_chunk_size", "dual_chunk_attention_config"),
    *("layer_types", "kv_lora_rank", "attn_logit_softcapping", "alibi", "is_causal", "causal", "use_bidirectional_attention"),
    *LENGTHS,
}


def check_supported(config: PreTrainedConfig) -> None:
    """Raises ModelError, naming the entry, for a config that asks for what this engine does not compute."""
    with one_sentence("cannot read the config of the model"):  # entries of another kind than they should be
        names = config.architectures
        name = names[0] if isinstance(names, list) and names else config.model_type
        for why in _obstacles(config):
            raise ModelError(f"{name} is not supported: {why}")


def _obstacles(config: PreTrainedConfig) -> Iterator[str]:
    """Reasons, the plainest first; what is asked later may rely on what was asked before."""
    if getattr(config, "is_encoder_decoder", False):
        yield "it is an encoder-decoder"
    if parts := parts_of(config):
        yield f"it {parts}"
    act = getattr(config, "hidden_act", None)
    if isinstance(act, str) and act not in ACT2FN:
        yield f"its activation function is not known (hidden_act {act})"
    known = layer_kinds(config)
    kinds = set(known or getattr(config, "layer_types", None) or ()) - LAYERS - (MIXED if known else set())
    if kinds:
        yield f"it uses layers of type {', '.join(sorted(map(str, kinds)))} (layer_types)"
    attentive = set(known or ()) - set(INATTENTIVE)
    if known and not attentive:
        yield "none of its layers has attention (layer_types), so there is nothing to select from"
    elif attentive < set(known or ()) and attentive <= set(WINDOWS.values()):
        yield "all of its layers with attention have a window, beside layers with a state (layer_types)"
    if getattr(config, "num_attention_heads", None) is None:
        yield "it has no attention heads (num_attention_heads)"
    if getattr(config, "kv_lora_rank", None):
        yield from _latent_obstacles(config)
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap and not mentioned(config, "attn_logit_softcapping"):
        yield f"its config has a soft cap on attention logits (attn_logit_softcapping {cap}), which its class does not compute"
    if getattr(config, "alibi", False) or _value(getattr(config, "attn_config", None), "alibi"):
        yield "it uses biases instead of positions (alibi)"
    if getattr(config, "add_cross_attention", False):
        yield "it attends to another model (add_cross_attention)"
    for entry, causal in (("use_bidirectional_attention", False), ("is_causal", True), ("causal", True)):
        value = getattr(config, entry, None)
        if value == "vision":  # among the parts of an image, of which there are none here
            continue
        if value is not None and bool(value) != causal:
            yield f"its attention is not causal ({entry} {value})"
    window = getattr(config, "sliding_window", None)
    if window is not None and (not isinstance(window, int) or window < 0):
        yield f"its sliding_window is {window!r}, and it should be a number of tokens or null"
    dual = getattr(config, "dual_chunk_attention_config", None)
    if dual and not isinstance(_value(dual, "chunk_size"), int):
        yield f"its dual_chunk_attention_config {shown(dual)} does not name its chunk_size"
    yield from _rope_obstacles(config)
    try:
        shape = ModelShape.from_config(config)
    except (AttributeError, TypeError, ZeroDivisionError) as error:
        yield f"{error}"
    else:
        yield from _vendor_obstacles(config, shape.max_position)
        yield from _outer_obstacles(config, shape.max_position)
        yield from routing_obstacles(config)


def _latent_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    """Of a config with multi-head latent attention."""
    what = f"it uses multi-head latent attention (kv_lora_rank {config.kv_lora_rank})"
    if not mentioned(config, "kv_lora_rank"):
        yield f"{what}, which its class does not compute"
        return
    if getattr(config, "index_topk", None):
        yield f"it chooses tokens by an indexer of its own (index_topk {config.index_topk})"
    if config.v_head_dim > config.qk_nope_head_dim + config.qk_rope_head_dim:
        yield f"its values are wider than its keys (v_head_dim {config.v_head_dim})"
    if set(getattr(config, "layer_types", None) or ()) & {"sliding_attention", "chunked_attention"}:
        yield f"{what} in layers with a window (layer_types)"
    if not mentioned(config, EXPAND):
        yield f"{what}, whose latents its class in transformers {transformers_version} does not hand out: install 5.17 or newer"


def _value(part: Any, name: str) -> Any:
    return part.get(name) if isinstance(part, Mapping) else getattr(part, name, None)


def _rope_obstacles(config: PreTrainedConfig) -> Iterator[str]:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parts = {entry: part for entry, part in rope.items() if isinstance(part, dict)} or {"": rope}
    ignored = set(getattr(config, "ignore_keys_at_rope_validation", None) or ())
    for label, part in parts.items():
        where = "rope_parameters" + (f" of {label}" if label else "")
        if label and not mentioned(config, re.escape(label)):
            yield f"its rope_parameters speak of {label}, which its class does not know"
        yield from _odd_rope_numbers(config, part, where)
        kind = part.get("rope_type") or part.get("type") or "default"
        if kind not in ROPES:
            yield f"it uses RoPE of type {kind} ({where})"
            continue
        if (other := part.get("type")) not in (None, kind, "default") and not mentioned(config, str(other)):
            yield f"its {where} say both rope_type {kind} and type {other}"
        known = ROPE_KEYS | ignored | (SCALING_KEYS if kind != "default" else set())
        for key, value in part.items():
            if value in (None, False) or key in known or (key in ONES and value == 1):
                continue
            if key in SCALING_KEYS or not mentioned(config, key):
                yield f"it uses RoPE of type {kind} with {key} {shown(value)} ({where}), which the library does not compute"
        share = part.get("partial_rotary_factor")
        if share not in (None, 1) and kind == "default" and not mentioned(config, "partial_rotary_factor"):
            yield f"it turns a share of each head (partial_rotary_factor {share}), which its class does not compute"


def _odd_rope_numbers(config: PreTrainedConfig, part: Mapping[str, Any], where: str) -> Iterator[str]:
    """Numbers with which angles cannot be computed, or would be other than anybody trained."""
    for key, value in part.items():
        wanted = ROPE_NUMBERS.get(key)
        if key in ROPE_LISTS and value is not None:
            size = (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) // 2
            turned = int(size * (part.get("partial_rotary_factor") or 1))
            if not (isinstance(value, list) and len(value) == turned and all(_is_number(each) and each > 0 for each in value)):
                yield f"its {key} is {shown(value)} and should be {turned} numbers above 0 ({where})"
        elif wanted is None or (value is None and key != "rope_theta"):
            continue
        elif not (_is_number(value) and wanted[0] <= value < math.inf and value != 0):
            yield f"its {key} is {shown(value)} and should be {wanted[1]} ({where})"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _vendor_obstacles(config: PreTrainedConfig, longest: int) -> Iterator[str]:
    """Entries that the config's class does not know; windows and lengths of at least `longest` tokens leave nothing out."""
    known = declared(config)
    rope = getattr(config, "rope_parameters", None) or {}
    equal = {  # spellings of what other entries say
        **dict.fromkeys(("rotary_pct", "rope_pct", "rope_percent", "rotary_percent"), rope.get("partial_rotary_factor") or 1),
        "dim_model_base": config.hidden_size,  # by whose share outputs are divided
        "sliding_window_size": getattr(config, "sliding_window", None),
        "initial_context_length": rope.get("original_max_position_embeddings"),
        "position_embedding_type": "rope_gptj" if config.model_type.startswith("cohere") else None,  # as its class turns heads
        "attn_output_gate": mentioned(config, r"sigmoid\(gate"),  # as Qwen's classes always have it
        "swiglu_limit": 7.0 if mentioned(config, r"limit = 7\.0") else None,  # as gpt-oss' class has it before it reads the entry
        "use_parallel_block": config.model_type.startswith("cohere"),  # as its class always has it
        **dict.fromkeys(("rotary_emb_base", "rotary_base", "rope_base", "rope_theta"), rope.get("rope_theta")),
    }
    for name, value in vars(config).items():
        if name.startswith("_") or name in known or name in JUDGED or hasattr(type(config), name):
            continue
        if (name in equal and value == equal[name]) or not (changed := _changes(name, value, config, longest)):
            continue
        if "qk" in name and mentioned(config, r"(q|k|query|key)_(layer)?norm"):
            continue
        if not mentioned(config, re.escape(name)):
            yield f"its config has {name} {shown(value)}, which changes {changed} and is not computed here"


def _outer_obstacles(config: PreTrainedConfig, longest: int) -> Iterator[str]:
    """Entries for the decoder that stand beside its config, where the library does not look for them."""
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    for name, value in beside(config).items():
        if value in [getattr(config, name, None), *(part.get(name) for part in ropes)] or MODALITIES.search(name.lower()):
            continue
        if name == "rope_parameters" and isinstance(value, dict):  # which the library makes of rope_theta and rope_scaling, too
            said = {key: part for key, part in value.items() if key != "type"}
            if any(said.items() <= part.items() for part in ropes):
                continue
        changed = _changes(name, value, config, longest)
        if changed and not (name == "sliding_window" and not beside(config).get("use_sliding_window", True)):
            yield (
                f"its config has {name} {shown(value)} outside of text_config, which changes {changed} and is not followed "
                "there: put it into text_config, or remove it"
            )


def _changes(name: str, value: Any, config: PreTrainedConfig, longest: int) -> str:
    """What an entry that no code follows would change, by its name; '' where that is nothing, or the value is neutral."""
    wanted, scales = name in ON, SCALES.search(name.lower())
    if _is_one(value, config) and (scales or NEUTRAL.search(name.lower())):
        return ""
    speaks = wanted or scales or name in JUDGED or SPEAKS.search(name.lower())
    if not speaks or (HARMLESS.search(name.lower()) and not wanted):
        return ""
    off = value is None or (not wanted and (value is False or value == 0 or value in ("", [], {})))
    if off or (wanted and value is True) or _is_ordinary(value, config):
        return ""
    length = name in LENGTHS or LENGTH.search(name.lower()) or name == "max_position_embeddings"
    if length and _is_number(value) and value >= longest:
        return ""
    return "what its layers add up" if scales else "attention, positions or length"


def _is_one(value: Any, config: PreTrainedConfig) -> bool:
    """Whether a value is the number 1, for all layers or for each."""
    each = value if isinstance(value, list) and len(value) == config.num_hidden_layers else [value]
    return all(_is_number(part) and part == 1 for part in each)


def _is_ordinary(value: Any, config: PreTrainedConfig) -> bool:
    """Whether a value names attention as it is everywhere, or is a list of nothing else, be it a 1 for each layer."""
    if isinstance(value, str):
        return value.lower().replace("-", "_") in ORDINARY
    if not isinstance(value, list) or not value:
        return False
    each = len(value) == config.num_hidden_layers
    return all((each and part == 1) or _is_ordinary(part, config) for part in value)

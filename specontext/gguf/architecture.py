"""What a GGUF file's metadata say of the model, as the Hugging Face config of the same model.

llama.cpp's own names on the left, those of transformers on the right. A setting that is not known here is refused: it may change
what the model computes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specontext.errors import GGUFError
from specontext.gguf.families import FAMILIES, TENSORS, Family
from specontext.gguf.reading import GGUFFile

ROPE_FACTORS = "rope_freqs.weight"
SIZES = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
}
KNOWN = {
    *SIZES,
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.causal",
    "expert_count",
    "expert_used_count",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "rope.scaling.attn_factor",
    "tensor_data_layout",
    "vocab_size",
}
# Llama 3.1 and its kin: their factors come as a tensor, from which the settings that made it are found again.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SPECIAL_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
PATTERN = "attention.sliding_window_pattern"


def config_of(file: GGUFFile) -> dict[str, Any]:
    """The values of a Hugging Face `config.json` that describes this model.

    Raises:
        GGUFError: an architecture or a setting that is not supported.
    """
    family = family_of(file)
    _check(file, family)
    heads, width = int(file.need("attention.head_count")), int(file.need("embedding_length"))
    head_dim = int(file.own("attention.key_length") or width // heads)
    names = {tensor.name: tensor for tensor in file.tensors}
    if "token_embd.weight" not in names:
        raise GGUFError(f"{file.path} is incomplete: it has no token_embd.weight")
    ids = {key: file.metadata.get(f"tokenizer.ggml.{said}_token_id") for key, said in SPECIAL_IDS.items()}
    config = {
        "architectures": [family.name],
        "model_type": family.model_type,
        **{theirs: int(file.need(ours)) for ours, theirs in {**SIZES, **family.sizes}.items()},
        "num_key_value_heads": int(file.own("attention.head_count_kv") or heads),
        "head_dim": head_dim,
        "rms_norm_eps": _number(file.need("attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope(file, head_dim),
        "vocab_size": names["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in names,
        **family.config,
        **{key: int(value) for key, value in ids.items() if value is not None},
    }
    for ours, (theirs, usual) in family.caps.items():
        value = file.own(ours, usual)
        config[theirs] = _number(value) if value else None
    if family.by_share is not None:
        config["query_pre_attn_scalar"] = width // heads if config["num_hidden_layers"] in family.by_share else head_dim
    if family.windows is not None:
        config |= _windows(file, family, config)
    if ends := _ends(file, family, config.get("eos_token_id")):
        config["eos_token_id"] = ends
    if family.biased:
        config["attention_bias"] = "blk.0.attn_q.bias" in names
    return config


def family_of(file: GGUFFile) -> Family:
    """What is particular to the architecture of a file; raises GGUFError for one that is not known."""
    if file.architecture not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise GGUFError(
            f"{file.path} holds a model of the architecture '{file.architecture}': of GGUF files, {known} can be loaded; "
            "take the model's safetensors checkpoint"
        )
    return FAMILIES[file.architecture]


def _number(value: Any) -> float:
    """A number that a file holds in 32 bits, as its makers wrote it."""
    return float(str(np.float32(value)))


def _windows(file: GGUFFile, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers have a window, and the RoPE of each kind of layers."""
    usual, depth = family.windows, int(config["num_hidden_layers"])
    assert usual is not None
    size, pattern = file.own("attention.sliding_window", usual.size), file.own(PATTERN, usual.every)
    if isinstance(pattern, list):
        near = [bool(value) for value in pattern]
    else:
        near = [bool((layer + 1) % int(pattern)) if pattern else False for layer in range(depth)]
    if len(near) != depth:
        raise GGUFError(f"{file.path} is broken: its {PATTERN} speaks of {len(near)} layers, and it has {depth}")
    near = [bool(flag and size) for flag in near]
    kinds = ["sliding_attention" if flag else "full_attention" for flag in near]
    values: dict[str, Any] = {"layer_types": kinds, "sliding_window": int(size) if size else None}
    theta = file.own("rope.freq_base_swa", usual.theta)
    if usual.theta is not None:
        near_rope = {"rope_theta": float(theta), "rope_type": "default"}
        values["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": near_rope}
    elif theta is not None and float(theta) != config["rope_parameters"]["rope_theta"]:
        raise GGUFError(f"{file.path} is not supported: it has two bases of RoPE (rope.freq_base_swa {theta})")
    return values


def _ends(file: GGUFFile, family: Family, eos: int | None) -> list[int] | None:
    """Tokens that end an output, where that is not only the file's end token."""
    found = [] if eos is None else [eos]
    if (turn := file.metadata.get("tokenizer.ggml.eot_token_id")) is not None:
        found.append(int(turn))
    tokens = file.metadata.get("tokenizer.ggml.tokens") or []
    found += [tokens.index(end) for end in family.ends if end in tokens]
    return sorted(set(found)) if set(found) - {eos} else None


def _check(file: GGUFFile, family: Family) -> None:
    """Raises GGUFError for settings that the config cannot say."""
    section = f"{file.architecture}."
    own = {key.removeprefix(section): value for key, value in file.metadata.items() if key.startswith(section)}
    refused = None
    if unknown := sorted(set(own) - KNOWN - family.settings):
        refused = f"the setting {section}{unknown[0]}"
    elif listed := sorted(key for key, value in own.items() if isinstance(value, list) and key != PATTERN):
        refused = f"{section}{listed[0]} that differs from layer to layer"
    elif own.get("expert_count") and "expert_count" not in family.sizes:
        refused = "a mixture of experts"
    elif own.get("attention.sliding_window") and family.windows is None:
        refused = f"a sliding window of {own['attention.sliding_window']} tokens"
    elif own.get("attention.causal") is False:
        refused = "attention in both directions"
    elif own.get("attention.value_length") != own.get("attention.key_length"):
        refused = "values of another width than keys"
    if refused:
        raise GGUFError(f"{file.path} is not supported: it has {refused}; take the model's safetensors checkpoint")


def _rope(file: GGUFFile, head_dim: int) -> dict[str, Any]:
    if (turned := int(file.own("rope.dimension_count") or head_dim)) != head_dim:
        raise GGUFError(f"{file.path} is not supported: RoPE turns {turned} of {head_dim} dimensions")
    theta = float(file.own("rope.freq_base") or 10000.0)
    factors = next((tensor for tensor in file.tensors if tensor.name == ROPE_FACTORS), None)
    if factors is not None:
        return {"rope_theta": theta, **_llama3(file, factors.values().ravel(), theta, head_dim)}
    factor = float(file.own("rope.scaling.factor") or file.own("rope.scale_linear") or 1.0)
    kind = file.own("rope.scaling.type") or ("linear" if factor != 1 else "none")
    if kind == "none" or (kind == "linear" and factor == 1):
        return {"rope_theta": theta, "rope_type": "default"}
    if kind == "linear":
        return {"rope_theta": theta, "rope_type": "linear", "factor": factor}
    if kind == "yarn" and float(file.own("rope.scaling.attn_factor") or 1.0) == 1:
        before = int(file.need("rope.scaling.original_context_length"))
        return {"rope_theta": theta, "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": before}
    raise GGUFError(f"{file.path} is not supported: it uses RoPE scaled by '{kind}'")


def _llama3(file: GGUFFile, factors: NDArray[np.float32], theta: float, head_dim: int) -> dict[str, Any]:
    """The settings of `llama3` RoPE whose divisors of frequencies are `factors` [head_dim / 2]."""
    if np.allclose(factors, 1):
        return {"rope_type": "default"}
    rope: dict[str, Any] = {"rope_type": "llama3", "factor": float(str(factors.max())), **LLAMA3}
    low, high, before = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"], LLAMA3["original_max_position_embeddings"]
    turns = before * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)  # in the length it was trained on
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    made = 1 / ((1 - smooth) / rope["factor"] + smooth)
    if factors.shape != made.shape or not np.allclose(factors, made, rtol=1e-3):
        raise GGUFError(f"{file.path} is not supported: its {ROPE_FACTORS} is not the RoPE of Llama 3")
    return rope


def parameter_name(family: Family, tensor: str) -> str | None:
    """The name in transformers of a GGUF tensor; None for one that is no parameter there. Gates of experts and what they gate are
    one parameter.

    Raises:
        KeyError: a tensor that no model of the family has.
    """
    if tensor == ROPE_FACTORS:
        return None
    stem, kind = tensor.rsplit(".", 1)
    if layer := re.fullmatch(r"blk\.(\d+)\.(.+)", stem):
        name = f"model.layers.{layer[1]}.{family.layer[layer[2]]}"
        return name if layer[2].endswith("_exps") else f"{name}.{kind}"
    return f"{TENSORS[stem]}.{kind}"


def as_transformers_has_it(file: GGUFFile, tensor: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The numbers of a tensor, its rows in the order and its norms with the origin that they have in transformers."""
    family = family_of(file)
    if family.norm_offset and tensor.endswith("norm.weight"):
        return values - np.float32(family.norm_offset)
    part = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(?:weight|bias)", tensor)
    if not family.interleaved or part is None:
        return values
    heads = int(file.need("attention.head_count"))
    if part[1] == "k":
        heads = int(file.own("attention.head_count_kv") or heads)
    halves = values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(halves).reshape(values.shape)

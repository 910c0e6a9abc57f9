"""Whole EAGLE-3 drafts, pruned to a retrieval head while they are read.

Drafts come in dialects. EAGLE, SpecForge and AngelSlim name the layer `midlayer` and count feature layers by their *outputs*;
speculators names it `layers.0`, nests the layer's config and counts by *inputs* (Hugging Face's `hidden_states` index, ours).
Only the tensors that queries and keys need are read.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from specontext.core import ModelShape
from specontext.retrieval.head import HeadConfig, HeadError

LAYER = "midlayer."
NEEDED = (
    "fc.weight",
    "input_norm.weight",
    "midlayer.hidden_norm.weight",
    "midlayer.input_layernorm.weight",
    "midlayer.self_attn.q_proj.weight",
    "midlayer.self_attn.k_proj.weight",
    "midlayer.self_attn.q_norm.weight",
    "midlayer.self_attn.k_norm.weight",
)
REFUSED = ("midlayer.self_attn.q_proj.bias", "midlayer.self_attn.k_proj.bias", "fc.bias")


def read_draft(folder: Path, values: dict[str, Any], target: ModelShape) -> tuple[HeadConfig, dict[str, Tensor]]:
    """Config and tensors, under EAGLE's names, of the head inside a draft.

    Args:
        values: content of the draft's config.json.
        target: the model that the draft was distilled from; gives what EAGLE's config leaves out.

    Raises:
        HeadError: not an EAGLE-3 draft, a broken file, or an option that a retrieval head cannot follow.
    """
    tensors = _read_tensors(folder)
    missing = [name for name in NEEDED if name not in tensors and "norm" not in name.split(".")[-2] and "input_norm" not in name]
    if missing:
        raise HeadError(f"{folder} is not an EAGLE-3 draft: it lacks {', '.join(missing)}")
    if refused := [name for name in REFUSED if name in tensors]:
        raise HeadError(f"the draft in {folder} has {', '.join(refused)}, which a retrieval head does not have")
    nested = "transformer_layer_config" in values
    layer = values["transformer_layer_config"] if nested else values
    try:
        heads, kv_heads = layer["num_attention_heads"], layer.get("num_key_value_heads") or layer["num_attention_heads"]
        hidden = layer["hidden_size"]
        vocabulary = layer["vocab_size"]
    except KeyError as error:
        raise HeadError(f"the config.json of the draft in {folder} lacks {error}") from error
    each = sorted(name for name in tensors if name.startswith("fc_norm."))
    config = HeadConfig(
        variant="features",
        hidden_size=hidden,
        target_hidden_size=values.get("target_hidden_size") or layer.get("target_hidden_size") or hidden,
        vocab_size=vocabulary,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=layer.get("head_dim") or tensors["midlayer.self_attn.q_proj.weight"].shape[0] // heads,
        feature_layers=_feature_layers(values, nested, target),
        feature_norm="each" if each else "joint" if "input_norm.weight" in tensors else "none",
        rope_theta=_rope_theta(values, layer, nested),
        trained_length=2048,
        qk_norm="midlayer.self_attn.q_norm.weight" in tensors,
        rms_norm_eps=layer.get("rms_norm_eps", 1e-6),
        source=f"EAGLE-3 draft {folder.name}",
    )
    return config, tensors


def _feature_layers(values: dict[str, Any], nested: bool, target: ModelShape) -> tuple[int, ...]:
    """Indices into `hidden_states`; without a setting, EAGLE's standard 2, L//2, L-3."""
    ids = (values.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids") or values.get(
        "eagle_aux_hidden_state_layer_ids"
    )
    if ids:
        return tuple(i if nested else i + 1 for i in ids)
    return (2, target.layers // 2, target.layers - 3)


def _rope_theta(values: dict[str, Any], layer: dict[str, Any], nested: bool) -> float:
    """RoPE base the draft was trained with: the training code of EAGLE and AngelSlim ignores the config and uses 10000."""
    rope = layer.get("rope_parameters") or layer.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    follows_config = nested or values.get("architectures") == ["LlamaForCausalLMEagle3"]
    if not follows_config:
        return 10000.0
    if kind != "default":
        raise HeadError(f"the draft uses RoPE of type {kind}, which retrieval heads do not follow")
    return float(rope.get("rope_theta") or layer.get("rope_theta") or 10000.0)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """The needed tensors of a draft by EAGLE's names."""
    files = sorted(folder.glob("*.safetensors"))
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118  not a dict
                    if _wanted(common_name(name)):
                        found[common_name(name)] = stored.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise HeadError(f"{file} is broken or truncated: {error}") from error
    if files:
        return found
    file = folder / "pytorch_model.bin"
    if not file.is_file():
        raise HeadError(f"no weights in {folder}: expected *.safetensors or pytorch_model.bin")
    try:
        stored_dict = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise HeadError(f"{file} is broken, or holds more than tensors: {str(error).splitlines()[0]}") from error
    return {common_name(name): tensor for name, tensor in stored_dict.items() if _wanted(common_name(name))}


def _wanted(name: str) -> bool:
    return name in NEEDED or name in REFUSED or name.startswith("fc_norm.")


def common_name(name: str) -> str:
    """A tensor's name in EAGLE's dialect."""
    name = name.removeprefix("model.")
    return LAYER + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name


def config_values(folder: Path) -> dict[str, Any]:
    """The content of a config.json.

    Raises:
        HeadError: there is none, or it is not a JSON object.
    """
    try:
        values = json.loads((folder / "config.json").read_text())
    except FileNotFoundError as error:
        raise HeadError(f"no retrieval head in {folder}: it has no config.json") from error
    except (OSError, ValueError) as error:
        raise HeadError(f"cannot read {folder / 'config.json'}: {error}") from error
    if not isinstance(values, dict):
        raise HeadError(f"{folder / 'config.json'} is not a JSON object")
    return values

"""Writes small GGUF files from Hugging Face checkpoints, as llama.cpp's converter would: its names, rows and metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Format
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedModel

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, architecture: str = "llama") -> str:
    stem, kind = name.rsplit(".", 1)
    names = NAMES | (GEMMA if architecture in ("gemma2", "gemma3") else {})
    if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem):
        return f"blk.{layer[1]}.{names[layer[2]]}.{kind}"
    return f"{names[stem]}.{kind}"


def gguf_tensors(model: PreTrainedModel, architecture: str) -> Iterator[tuple[str, NDArray[Any]]]:
    """The tensors of a model as llama.cpp's converter names and changes them."""
    config = model.config
    for name, parameter in model.named_parameters():
        numbers = parameter.detach().float().numpy()
        if experts := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj", name):
            parts = ("gate", "up") if experts[2] == "gate_up" else ("down",)
            for part, rows in zip(reversed(parts), reversed(np.split(numbers, len(parts), axis=1)), strict=True):
                yield f"blk.{experts[1]}.ffn_{part}_exps.weight", rows
            continue
        own = gguf_name(name, architecture)
        if architecture == "llama" and re.search(r"attn_[qk]\.", own):
            numbers = interleaved(numbers, config.num_attention_heads if "attn_q" in own else config.num_key_value_heads)
        if architecture.startswith("gemma") and own.endswith("norm.weight"):
            numbers = numbers + np.float32(1)
        yield own, numbers[0] if own.endswith("inp_shexp.weight") else numbers


def interleaved(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """Query or key rows in llama.cpp's order."""
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def write_gguf(
    path: Path,
    checkpoint: Path | PreTrainedModel,
    tokenizer: dict[str, Any],
    *,
    architecture: str,
    format: Format = Format.F32,
    formats: dict[str, Format] | None = None,
    settings: dict[str, Any] | None = None,
    tensors: dict[str, NDArray[Any]] | None = None,
    without: str = "-",
    parts: int = 1,
) -> Path:
    """Write a model.

    Args:
        tokenizer: metadata below `tokenizer.`.
        format: of the matrices; vectors stay float32.
        formats: of those with this in their names.
        settings: further metadata below the architecture, or other values; None leaves a key out.
        tensors: further tensors.
        without: leave out tensors with this in their names.
        parts: into how many files the model is said to be split.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    model = checkpoint if isinstance(checkpoint, PreTrainedModel) else AutoModelForCausalLM.from_pretrained(checkpoint)
    config = model.config
    kv_heads, head_dim = config.num_key_value_heads, model.model.layers[0].self_attn.head_dim
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": head_dim,
    } | (settings or {})
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        if value is not None:
            _add(writer, f"{architecture}.{key}", value)
    writer.add_uint16("split.count", parts)
    for key, value in tokenizer.items():
        _add(writer, f"tokenizer.{key}", value)
    for own, numbers in gguf_tensors(model, architecture):
        if without in own:
            continue
        kind = next((other for part, other in (formats or {}).items() if part in own), format) if numbers.ndim > 1 else Format.F32
        stored = np.ascontiguousarray(numbers) if kind == Format.F32 else gguf.quantize(np.ascontiguousarray(numbers), kind)
        writer.add_tensor(own, stored, raw_dtype=kind)
    for name, numbers in (tensors or {}).items():
        writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def byte_level(tokenizer: Any, pre: str, **more: Any) -> dict[str, Any]:
    """The metadata of a byte-level BPE tokenizer of Hugging Face."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))]
    added = tokenizer.added_tokens_decoder
    kinds = [(3 if added[i].special else 4) if i in added else 1 for i in range(len(tokens))]
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "padding_token_id": tokenizer.pad_token_id,
    }
    said = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": merges, **ids} | more
    return {f"ggml.{key}": value for key, value in said.items() if value is not None}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())

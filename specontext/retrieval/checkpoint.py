"""Retrieval heads on disk: a directory of `config.json` and `model.safetensors` with EAGLE-3's tensor names.

A whole EAGLE-3 draft, from a directory or the Hub, is pruned while it is read.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specontext.core import ModelShape
from specontext.retrieval.draft import config_values, read_draft
from specontext.retrieval.head import HeadConfig, HeadError, RetrievalHead

WEIGHTS = "model.safetensors"
# EAGLE-3's tensor names, by the head's own; norms that a variant lacks are absent.
NAMES = {
    "fc.weight": "fc.weight",
    "hidden_norm.weight": "midlayer.hidden_norm.weight",
    "input_layernorm.weight": "midlayer.input_layernorm.weight",
    "q_proj.weight": "midlayer.self_attn.q_proj.weight",
    "k_proj.weight": "midlayer.self_attn.k_proj.weight",
    "q_norm.weight": "midlayer.self_attn.q_norm.weight",
    "k_norm.weight": "midlayer.self_attn.k_norm.weight",
    "feature_norm.weight": "input_norm.weight",
}


def tensor_name(name: str) -> str:
    """EAGLE-3's name of a parameter of the head."""
    return name.replace("feature_norms.", "fc_norm.") if name.startswith("feature_norms.") else NAMES[name]


def save_head(head: RetrievalHead, folder: str | Path) -> None:
    """Write `head` to `folder`; the weights first, so that a directory with a config is complete."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {tensor_name(name): tensor.detach().contiguous().cpu() for name, tensor in head.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(head.config.to_dict(), indent=2) + "\n")


def load_head(source: str | Path, *, target: ModelShape, dtype: torch.dtype = torch.float32) -> RetrievalHead:
    """Read a retrieval head for a model of shape `target`.

    Args:
        source: a head directory, the directory of an EAGLE-3 draft, or a Hub id of either.

    Raises:
        HeadError: no head there, a broken or incomplete file, wrong shapes, NaNs, or a head of another model.
    """
    folder = _folder(source)
    values = config_values(folder)
    if "variant" in values:
        config, stored = HeadConfig.from_dict(values), _read_head(folder)
    else:
        config, stored = read_draft(folder, values, target)
    config.check_target(target)
    head = RetrievalHead(config)
    tensors = {}
    for name, parameter in head.state_dict().items():
        stored_name = tensor_name(name)
        tensor = stored.get(stored_name)
        if tensor is None:
            raise HeadError(f"the retrieval head in {folder} lacks the tensor {stored_name}")
        if tensor.shape != parameter.shape:
            raise HeadError(f"{stored_name} has shape {list(tensor.shape)}, the head's config asks for {list(parameter.shape)}")
        if not torch.isfinite(tensor).all():
            raise HeadError(f"{stored_name} holds values that are not finite numbers")
        tensors[name] = tensor
    head.load_state_dict(tensors)
    return head.to(dtype).eval().requires_grad_(False)


def _folder(source: str | Path) -> Path:
    folder = Path(source)
    if folder.exists() or isinstance(source, Path) or source.count("/") != 1 or source.startswith((".", "/")):
        return folder
    try:
        return Path(snapshot_download(source, allow_patterns=["config.json", "*.safetensors", "pytorch_model.bin"]))
    except (OSError, ValueError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HeadError(f"no directory {source}, and it cannot be had from the Hub: {first_line}") from error


def _read_head(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise HeadError(f"the retrieval head in {folder} has no {WEIGHTS}") from error
    except (OSError, SafetensorError) as error:
        raise HeadError(f"{folder / WEIGHTS} is broken or truncated: {error}") from error

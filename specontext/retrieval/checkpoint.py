"""Retrieval heads on disk: a directory of `config.json` and `model.safetensors` with EAGLE-3's tensor names."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from specontext.core import ModelShape
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
}


def save_head(head: RetrievalHead, folder: str | Path) -> None:
    """Write `head` to `folder`; the weights first, so that a directory with a config is complete."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {NAMES[name]: tensor.detach().contiguous().cpu() for name, tensor in head.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(head.config.to_dict(), indent=2) + "\n")


def load_head(folder: str | Path, *, target: ModelShape | None = None, dtype: torch.dtype | None = None) -> RetrievalHead:
    """Read a head directory.

    Args:
        target: shape of the model it will serve; checked when given.

    Raises:
        HeadError: no head there, a broken or incomplete file, wrong shapes, NaNs, or a head of another model.
    """
    folder = Path(folder)
    try:
        values = json.loads((folder / "config.json").read_text())
    except FileNotFoundError as error:
        raise HeadError(f"no retrieval head in {folder}: it has no config.json") from error
    except (OSError, ValueError) as error:
        raise HeadError(f"cannot read {folder / 'config.json'}: {error}") from error
    if not isinstance(values, dict) or "variant" not in values:
        raise HeadError(f"{folder / 'config.json'} is not the config of a retrieval head")
    config = HeadConfig.from_dict(values)
    if target is not None:
        config.check_target(target)
    try:
        stored = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise HeadError(f"the retrieval head in {folder} has no {WEIGHTS}") from error
    except (OSError, SafetensorError) as error:
        raise HeadError(f"{folder / WEIGHTS} is broken or truncated: {error}") from error
    head = RetrievalHead(config)
    tensors = {}
    for name, parameter in head.state_dict().items():
        tensor = stored.get(NAMES[name])
        if tensor is None:
            raise HeadError(f"{folder / WEIGHTS} lacks the tensor {NAMES[name]}")
        if tensor.shape != parameter.shape:
            raise HeadError(f"{NAMES[name]} has shape {list(tensor.shape)}, the head's config asks for {list(parameter.shape)}")
        if not torch.isfinite(tensor).all():
            raise HeadError(f"{NAMES[name]} holds values that are not finite numbers")
        tensors[name] = tensor
    head.load_state_dict(tensors)
    return head.to(dtype or torch.float32).eval().requires_grad_(False)

"""Whole drafts on disk, in the EAGLE-3 dialect of SpecForge and SGLang.

That dialect (architecture `LlamaForCausalLMEagle3`) honours `rope_theta` and `head_dim` of the config, names feature layers by
their outputs (Hugging Face's `hidden_states` index, ours, less one) and takes the embedding table from the target. A draft
written here is served by SGLang as it is, and `specontext.retrieval.checkpoint.load_head` prunes it to its retrieval head.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from specontext.distill.draft import Draft
from specontext.errors import HeadError
from specontext.retrieval.checkpoint import WEIGHTS, tensor_name
from specontext.retrieval.draft import config_values
from specontext.retrieval.head_config import HeadConfig

ARCHITECTURE = "LlamaForCausalLMEagle3"
FEATURE_LAYERS = 3
# EAGLE-3's names of what a draft has beside its head, by the draft's own.
NAMES = {
    "v_proj.weight": "midlayer.self_attn.v_proj.weight",
    "o_proj.weight": "midlayer.self_attn.o_proj.weight",
    "post_attention_layernorm.weight": "midlayer.post_attention_layernorm.weight",
    "gate_proj.weight": "midlayer.mlp.gate_proj.weight",
    "up_proj.weight": "midlayer.mlp.up_proj.weight",
    "down_proj.weight": "midlayer.mlp.down_proj.weight",
    "norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}


def save_draft(
    draft: Draft, folder: str | Path, *, max_position_embeddings: int | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write `draft` to `folder`, complete under other names first: a folder with a config.json is always whole.

    Args:
        max_position_embeddings: longest context in tokens, for servers; None takes the length the head was trained on.
        dtype: number format of the stored weights; None keeps theirs.

    Raises:
        HeadError: the head has a form that the dialect cannot express, values are not finite numbers, or the folder holds
            something else or cannot be written; what was there before is left as it was.
    """
    check_form(draft.head.config)
    dtype = draft.lm_head.weight.dtype if dtype is None else dtype
    state = draft.state_dict()
    tensors = {stored: state[name] for name, stored in NAMES.items()}
    tensors |= {tensor_name(name): tensor for name, tensor in draft.head.state_dict().items()}
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    vocabulary = draft.vocabulary.cpu()
    tensors["d2t"] = vocabulary - torch.arange(len(vocabulary))
    tensors["t2d"] = torch.zeros(draft.head.config.vocab_size, dtype=torch.bool)
    tensors["t2d"][vocabulary] = True
    if odd := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise HeadError(f"the draft was not written to {folder}: {', '.join(odd)} holds values that are not finite numbers")
    folder = Path(folder)
    check_draft_place(folder)
    weights, config = folder / f"{WEIGHTS}.new", folder / "config.json.new"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, weights, metadata={"format": "pt"})
        config.write_text(json.dumps(draft_config(draft, max_position_embeddings, dtype), indent=2) + "\n")
        (folder / "config.json").unlink(missing_ok=True)
        weights.replace(folder / WEIGHTS)
        config.replace(folder / "config.json")
    except (OSError, SafetensorError) as error:
        raise HeadError(f"the draft cannot be written to {folder}: {error}") from error
    finally:
        for file in (weights, config):
            with suppress(OSError):
                file.unlink(missing_ok=True)


def check_draft_place(folder: Path) -> None:
    """Raises HeadError where a draft would be written over something else: to be known before one is trained."""
    if folder.exists() and not folder.is_dir():
        raise HeadError(f"the draft cannot be written to {folder}: it is a file; remove it, or name another directory")
    if (folder / "config.json").exists() and config_values(folder).get("architectures") != [ARCHITECTURE]:
        raise HeadError(f"{folder} holds something else than a draft of ours: name another directory for the draft")


def check_form(config: HeadConfig) -> None:
    """Raises HeadError, naming every reason, unless the dialect can express a draft around a head of this config."""
    layers = list(config.feature_layers)
    reasons = {
        f"variant '{config.variant}'": config.variant != "features",
        f"feature_norm '{config.feature_norm}'": config.feature_norm != "none",
        "qk_norm": config.qk_norm,
        "rope_scaling": config.rope_scaling is not None,
        "a head_map": config.head_map is not None,
        f"feature layers {layers} (it wants {FEATURE_LAYERS}, from 1 up)": len(layers) != FEATURE_LAYERS or min(layers) < 1,
    }
    if wrong := [reason for reason, holds in reasons.items() if holds]:
        raise HeadError(
            f"EAGLE-3's dialect {ARCHITECTURE} cannot express this draft, its head has {'; '.join(wrong)}: "
            "train one without, or the head alone (objective attention; save_head)"
        )


def draft_config(draft: Draft, max_position_embeddings: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """Content of the draft's config.json."""
    c = draft.head.config
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "hidden_size": c.hidden_size,
        "target_hidden_size": c.target_hidden_size,
        "intermediate_size": draft.gate_proj.out_features,
        "num_hidden_layers": 1,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "vocab_size": c.vocab_size,
        "draft_vocab_size": len(draft.vocabulary),
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": max_position_embeddings or c.trained_length,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in c.feature_layers],
            "use_aux_hidden_state": True,
        },
    }

"""Load a Hugging Face decoder and its tokenizer, and refuse by name what attention here cannot do."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from specontext.core import ModelShape
from specontext.gguf.source import weights_note
from specontext.locations import ModelError, check_not_quantised, one_sentence, read_config, resolve_model_path
from specontext.models.attention import register_attention
from specontext.models.checking import check_attention
from specontext.models.number_format import running_format
from specontext.models.tokenizer_files import load_tokenizer
from specontext.models.weights import random_model, stored_model

SUPPORTED_ROPE = ("default", "linear", "yarn", "llama3", None)


@dataclass(frozen=True)
class LoadedModel:
    """A decoder ready to run.

    Attributes:
        path: checkpoint directory, or None for a Hub id.
        end_token_ids: tokens that end an output.
    """

    name: str
    path: Path | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    shape: ModelShape
    end_token_ids: frozenset[int]

    @property
    def weights_note(self) -> str | None:
        """What was done to the weights before they were loaded, such as 'dequantised from Q4_1'."""
        return weights_note(self.path)


def load_model(
    name: str | Path,
    *,
    dtype: str,
    device: torch.device,
    load_format: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> LoadedModel:
    """Load weights and tokenizer, with attention routed through this engine.

    Args:
        load_format: "dummy" makes random weights, the same ones every time; only config and tokenizer are read. The shape
            of a quantised checkpoint is refused all the same: its sizes and speeds would be those of another model.

    Raises:
        ModelError: not found, broken or incomplete, quantised, or using a feature that is not supported.
    """
    source = resolve_model_path(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    register_attention()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    check_not_quantised(source, revision=revision)
    config = read_config(source, **options)
    check_supported(config)
    dtype = running_format(dtype, config, device)
    tokenizer = load_tokenizer(source, **options)  # before the weights, which take longer
    if load_format == "dummy":
        model: Any = random_model(config, dtype, device, options)
    else:
        model = stored_model(source, config, dtype, options)
    with one_sentence(f"cannot load the model {source}"):
        model = model.to(device).eval().requires_grad_(False)
        shape = ModelShape.from_config(config, model.dtype)
        check_attention(model, shape)
    ends = _as_ids(model.generation_config.eos_token_id) | _as_ids(tokenizer.eos_token_id) | _as_ids(config.eos_token_id)
    path = source if isinstance(source, Path) else None
    return LoadedModel(str(name), path, model, tokenizer, shape, frozenset(ends))


def check_supported(config: PreTrainedConfig) -> None:
    """Raises ModelError, naming the feature, for attention that this engine does not compute."""
    name = config.architectures[0] if config.architectures else config.model_type
    refused = None
    layer_types = set(getattr(config, "layer_types", None) or ())
    if getattr(config, "is_encoder_decoder", False):
        refused = "an encoder-decoder"
    elif getattr(config, "num_attention_heads", None) is None or getattr(config, "max_position_embeddings", None) is None:
        refused = "a model without ordinary attention heads"
    elif getattr(config, "kv_lora_rank", None):
        refused = "multi-head latent attention"
    elif getattr(config, "attn_logit_softcapping", None):
        refused = "a soft cap on attention logits"
    elif config.model_type == "gpt_oss":
        refused = "attention sinks as parameters"
    elif layer_types - {"full_attention"}:
        refused = f"layers of type {', '.join(sorted(layer_types - {'full_attention'}))}"
    elif getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        refused = f"a sliding window of {config.sliding_window} tokens"
    elif (rope := (getattr(config, "rope_parameters", None) or {}).get("rope_type")) not in SUPPORTED_ROPE:
        refused = f"RoPE of type {rope}, which depends on the longest request in a batch"
    if refused:
        raise ModelError(f"{name} is not supported: it uses {refused}")


def _as_ids(value: int | list[int] | None) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)

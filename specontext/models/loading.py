"""Load a Hugging Face decoder and its tokenizer, and refuse by name what attention here cannot do."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import logging as transformers_logging
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from specontext.core import ModelShape
from specontext.gguf.source import weights_note
from specontext.locations import check_not_quantised, one_sentence, read_config, resolve_model_path
from specontext.models.attention import register_attention
from specontext.models.checking import check_attention
from specontext.models.config_check import check_supported
from specontext.models.decoder import fix_rope
from specontext.models.end_tokens import end_tokens
from specontext.models.number_format import running_format
from specontext.models.tokenizer_files import load_tokenizer
from specontext.models.weights import random_model, stored_model


@dataclass(frozen=True)
class LoadedModel:
    """A decoder ready to run.

    Attributes:
        path: checkpoint directory, or None for a Hub id.
        end_token_ids: tokens that end an output, see `end_tokens`.
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
    fix_rope(model)
    ends = end_tokens(source, tokenizer, revision=revision)
    path = source if isinstance(source, Path) else None
    return LoadedModel(str(name), path, model, tokenizer, shape, ends)

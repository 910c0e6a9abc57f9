"""Load a Hugging Face decoder and its tokenizer, and refuse by name what attention here cannot do."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from specontext.core import ModelShape, SpeContextError
from specontext.locations import ModelError, resolve_model_path
from specontext.models.attention import ATTENTION_NAME, register_attention
from specontext.models.checking import check_attention
from specontext.models.config_check import check_supported
from specontext.models.decoder import fix_rope
from specontext.models.end_tokens import end_tokens


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
        load_format: "dummy" makes random weights, the same ones every time; only config and tokenizer are read.

    Raises:
        ModelError: not found, broken, or using a feature that is not supported.
    """
    source = resolve_model_path(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    register_attention()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(source, **options)
        check_supported(config)
        dummy = load_format == "dummy"
        model: Any = _random(config, dtype, device, options) if dummy else _stored(source, config, dtype, options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except SpeContextError:
        raise
    except SafetensorError as error:
        raise ModelError(f"the weights of {source} are broken or truncated: {error}") from error
    except KeyError as error:
        foreign = error.args == (ATTENTION_NAME,)  # a class that looks attention up in a list of its own
        why = "its attention cannot be exchanged" if foreign else f"{error} is missing"
        raise ModelError(f"cannot load the model {source}: {why}") from error
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ModelError(f"cannot load the model {source}: {_first_line(error)}") from error
    model = model.to(device).eval().requires_grad_(False)
    shape = ModelShape.from_config(config, model.dtype)
    check_attention(model, shape)
    fix_rope(model)
    ends = end_tokens(source, tokenizer, revision=revision)
    path = source if isinstance(source, Path) else None
    return LoadedModel(str(name), path, model, tokenizer, shape, ends)


def _stored(source: Path | str, config: PreTrainedConfig, dtype: str, options: dict[str, Any]) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source,
        config=config,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        attn_implementation=ATTENTION_NAME,
        output_loading_info=True,
        **options,
    )
    model: PreTrainedModel
    model, report = loaded
    if missing := sorted(report["missing_keys"]):  # transformers would put random numbers in their place
        raise ModelError(f"the weights of {source} are incomplete: they lack {_first_few(missing)}")
    return model


def _random(config: PreTrainedConfig, dtype: str, device: torch.device, options: dict[str, Any]) -> PreTrainedModel:
    own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config,
            dtype=own if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=ATTENTION_NAME,
            trust_remote_code=options["trust_remote_code"],
        )
    return model


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer alone.

    Raises:
        ModelError: not found or broken.
    """
    source = resolve_model_path(name)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load the tokenizer of {source}: {_first_line(error)}") from error


def _first_few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""Load a Hugging Face decoder and its tokenizer, and refuse by name what attention here cannot do."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from specontext.checkpoints.adapters import Adapter
from specontext.checkpoints.quantization import dequantised
from specontext.errors import ModelError, RequestError
from specontext.gguf.source import weights_note
from specontext.locations import (
    adapter_of,
    folder_of,
    one_sentence,
    quantization_of_source,
    read_config,
    resolve_model_path,
)
from specontext.memory.states import measured_states, mixers_of
from specontext.model_shape import ModelShape
from specontext.models.adapters import check_can_merge, merged
from specontext.models.attention import ATTENTION_NAME, attention_of, register_attention
from specontext.models.checking import check_attention
from specontext.models.config_check import check_supported
from specontext.models.end_tokens import end_tokens
from specontext.models.generation_entries import generation_entries
from specontext.models.layer_inputs import read_short_tables
from specontext.models.number_format import running_format
from specontext.models.quantized import Asked, load_quantised
from specontext.models.ranks import Ranks
from specontext.models.rope import fix_rope
from specontext.models.sharding import random_part, shard
from specontext.models.splits import ADVICE
from specontext.models.tokenizer_files import load_tokenizer
from specontext.models.weights import random_model, stored_format, stored_model
from specontext.quantization.linear import Codes
from specontext.quantization.schemes import scheme_of
from specontext.retrieval.checkpoint import OWN_HEAD


class NoTokenizer:
    """Stands where a model was given without its tokenizer: prompts are token ids, and outputs have no text."""

    def __call__(self, text: str) -> Any:
        raise RequestError("this model was given without a tokenizer: give token ids")

    def decode(self, *_: Any, **__: Any) -> str:
        return ""

    def convert_ids_to_tokens(self, token: int) -> None:
        return None


@dataclass(frozen=True)
class LoadedModel:
    """A decoder ready to run.

    Attributes:
        path: checkpoint directory, or None for a Hub id; of an adapter that has a retrieval head, its own.
        end_token_ids: tokens that end an output, see `end_tokens`.
        base: the model that an adapter was merged into, as its name says; None for any other.
        quantization: how its weights were quantised, and what became of that, in words; None for plain ones.
        ranks: the processes that have the other parts of its layers; None where they are whole.
        generation: what its files say of how outputs are made, see `generation_entries`.
        turn: held by the thread that runs it.
    """

    name: str
    path: Path | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    shape: ModelShape
    end_token_ids: frozenset[int]
    base: str | None = None
    quantization: str | None = None
    ranks: Ranks | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    turn: threading.RLock = field(default_factory=threading.RLock, compare=False, repr=False)

    @property
    def head_name(self) -> str:
        """The name by which retrieval heads know the model."""
        return self.base or self.name

    @property
    def weights_note(self) -> str | None:
        """What was done to the weights before they were used, such as 'dequantised from Q4_1'."""
        merged = f"merged with the LoRA adapter {Path(self.name).name}" if self.base else None
        return ", ".join(filter(None, (weights_note(self.path), self.quantization, merged))) or None

    @property
    def parameters(self) -> int:
        """Number of parameters, those that are kept as codes among them."""
        return sum(p.numel() for p in self.model.parameters()) + sum(m.numbers for m in self._quantised)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as they are in memory."""
        return sum(p.nbytes for p in self.model.parameters()) + sum(b.nbytes for m in self._quantised for b in m.buffers())

    @property
    def _quantised(self) -> list[Codes]:
        return [module for module in self.model.modules() if isinstance(module, Codes)]


def load_model(
    name: str | Path,
    *,
    dtype: str,
    device: torch.device,
    load_format: str = "auto",
    quantization: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    ranks: Ranks | None = None,
) -> LoadedModel:
    """Load weights and tokenizer, with attention routed through this engine.

    Args:
        name: as of `resolve_model_path`; the adapter that it may name is merged into its model.
        load_format: "dummy" makes random weights, the same ones every time, quantised as the config says; only config and
            tokenizer are read.
        quantization: 'fp8' or 'int4' rounds 16-bit weights of linear layers while they are loaded.
        ranks: of layers and output layer only this rank's part is read and kept; they need not be connected yet.

    Raises:
        ConfigError: heads that so many ranks cannot share.
        ModelError: not found, broken or incomplete, quantised in a way that is not read, or using a feature that is not
            supported.
    """
    adapter, source = adapter_of(name), resolve_model_path(name)
    if adapter is not None and load_format != "dummy":
        check_can_merge(adapter)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    register_attention()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    entry = quantization_of_source(source, revision=revision)
    scheme, dummy = None if entry is None else scheme_of(entry, source), load_format == "dummy"
    asked = Asked(source, scheme, quantization, dummy, adapter is None or dummy, options)
    asked.check()
    config = read_config(source, **options)
    check_supported(config)
    format_ = dequantised(config.to_dict()) if not dummy else None
    note, to_merge = f"dequantised from {format_}" if format_ else None, None if dummy else adapter
    dtype = running_format(dtype, config, device)
    tokenizer = load_tokenizer(name, **options)  # before the weights, which take longer
    model: Any
    if asked.is_quantised:
        model, note = load_quantised(asked, config, dtype, device, ranks, to_merge)
    elif ranks is not None:
        model = _part(source, config, dtype, device, options, ranks, dummy=dummy, adapter=to_merge)
    elif dummy:
        model = random_model(config, dtype, device, options)
    else:
        model = stored_model(source, config, dtype, options)
        if to_merge is not None:
            model = merged(model, to_merge)
    read_short_tables(model)
    with one_sentence(f"cannot load the model {source}"):
        model = model.to(device).eval().requires_grad_(False)
        shape = checked_shape(model, config, ranks)
    fix_rope(model, shape.max_position)
    generation = generation_entries(source, revision=revision)
    ends = end_tokens(generation, tokenizer, source)
    path = source if isinstance(source, Path) else None
    if adapter is None:
        return LoadedModel(str(name), path, model, tokenizer, shape, ends, quantization=note, ranks=ranks, generation=generation)
    path = adapter.folder if adapter.beside(OWN_HEAD) else path
    return LoadedModel(str(name), path, model, tokenizer, shape, ends, str(adapter.base), note, ranks, generation)


def checked_shape(model: PreTrainedModel, config: PreTrainedConfig, ranks: Ranks | None = None) -> ModelShape:
    """The shape of a loaded decoder, once it, or a rank's part, has been found to compute what it computes in the library."""
    shape = ModelShape.from_config(config, model.dtype)
    if ranks is None:
        check_attention(model, shape)
    else:
        with ranks.apart():
            try:
                check_attention(model, ranks.share.shape(shape))
            except ModelError as error:
                raise ModelError(f"a {type(model).__name__} cannot be shared among ranks: {error}; {ADVICE}") from error
    return replace(shape, states=measured_states(model)) if shape.inattentive or mixers_of(model) else shape


def _part(
    source: Path | str,
    config: PreTrainedConfig,
    dtype: str,
    device: torch.device,
    options: dict[str, Any],
    ranks: Ranks,
    *,
    dummy: bool,
    adapter: Adapter | None,
) -> PreTrainedModel:
    """One rank's part of a model, on its device.

    Weights are mapped from their files in the format that these have, so that what is not a rank's own is neither read nor
    copied. An adapter is merged with all of them first.
    """
    if dummy and device.type == "cuda":  # where the whole may not fit
        return random_part(config, dtype, device, options, ranks)
    running = None if dtype == "auto" else getattr(torch, dtype)
    if dummy:
        model = random_model(config, dtype, device, options)
    else:
        folder = folder_of(source, revision=options["revision"], weights=True)
        stored = stored_format(folder, config) if adapter is None else None
        running = running or (config.dtype if isinstance(config.dtype, torch.dtype) else None)
        model = stored_model(folder, config, stored or dtype, options)
        if adapter is not None:
            model = merged(model, adapter)
    with one_sentence(f"cannot load the model {source}"):
        shard(model, ModelShape.from_config(config, running or model.dtype), ranks, device, running)
        model.config.dtype = running or model.dtype
    return model


def adopt_model(model: PreTrainedModel) -> LoadedModel:
    """A decoder that its owner has loaded, and goes on using, as one that an engine can run.

    The result shares its layers. Where attention is computed by the engine, `attention_of(adopted.model, ATTENTION_NAME)` says
    so; outside of it everything is as it was.

    Raises:
        ModelError: using a feature that is not supported, or not on one device.
    """
    register_attention()
    config, name = model.config, str(model.name_or_path) or type(model).__name__
    check_supported(config)
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) != 1 or devices == ["meta"]:
        raise ModelError(f"the weights of {name} are on {', '.join(devices)}, and an engine runs on one device: load it there")
    if model.device.type not in ("cpu", "cuda"):
        raise ModelError(f"{name} is on {model.device}, and engines run on a CPU or with CUDA: move it there")
    shared = copy.copy(model)  # what its owner puts at the model itself, such as another forward, is not the engine's
    with one_sentence(f"cannot run the model {name}"), attention_of(shared, ATTENTION_NAME):
        shape = checked_shape(shared, config)
    path = Path(name) if (Path(name) / "config.json").is_file() else None
    return LoadedModel(name, path, shared, cast(PreTrainedTokenizerBase, NoTokenizer()), shape, frozenset())

"""Sizes of a model that `specontext plan` is asked about: of a preset, or of a checkpoint that nothing is built of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specontext.cli.terminal import quiet_libraries
from specontext.config_entries import of_layers
from specontext.errors import ModelError
from specontext.gguf.source import weights_note
from specontext.locations import adapter_of, quantization_of_source, read_config, resolve_model_path
from specontext.model_shape import ModelShape

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from specontext.memory.facts import HeadFacts, ModelFacts
    from specontext.memory.preset import Preset


def find_facts(
    name: str,
    dtype: str,
    retrieval_head: str = "auto",
    *,
    quantization: str | None = None,
    max_model_len: int | None = None,
    trust_remote_code: bool = False,
) -> ModelFacts:
    """Sizes of a model and its head: from a preset where the name is one's and no directory's, else from its config.

    Args:
        retrieval_head: a directory, 'none', or 'auto' for the model's own, else one of an EAGLE-3 draft's size.
        quantization: what plain weights are rounded to when they are loaded; quantised ones have the size of their tensors.
        max_model_len: the longest context, for which a preset's checkpoint may need YaRN.
        trust_remote_code: let code that comes with a checkpoint make its config and its decoder.

    Raises:
        ModelError: there is none, or it has no KV heads or attention that the engine does not compute.
        HeadError: the named head is none, or was made for another model.
    """
    from specontext.memory.presets import find_preset

    preset = find_preset(name) if not Path(name).is_dir() else None
    if preset is not None:
        return _facts_of_preset(preset, dtype, retrieval_head, quantization, max_model_len)
    return _facts_of_checkpoint(name, dtype, retrieval_head, quantization, trust_remote_code)


def _facts_of_preset(
    preset: Preset, dtype: str, retrieval_head: str, quantization: str | None, max_model_len: int | None
) -> ModelFacts:
    from specontext.memory.preset import NUMBER_FORMATS

    known = NUMBER_FORMATS["bfloat16" if dtype == "auto" else dtype]
    head = None if retrieval_head == "auto" else _head(retrieval_head, preset.shape(known), retrieval_head)
    facts = _rounded(preset, preset.facts(known, head), quantization)
    if max_model_len is None or not preset.needs_yarn(max_model_len):
        return facts
    yarn = f"beyond {preset.max_position:,} with YaRN: rope_scaling in its config.json"
    return replace(facts, shape=replace(facts.shape, max_position=max_model_len, limited_by=yarn))


def _rounded(preset: Preset, facts: ModelFacts, quantization: str | None) -> ModelFacts:
    """The facts with linear layers of 8 or 4 bits."""
    if quantization is None:
        return facts
    from specontext.quantization.made import FORMS

    form = FORMS[quantization]
    rounded = preset.linear_layers
    plain = facts.parameters - sum(n * k for n, k in rounded)
    size = plain * facts.shape.dtype.itemsize + sum(form.nbytes(n, k) for n, k in rounded)
    return replace(facts, stored_bytes=size, weights_note=f"rounded to {quantization}")


def _facts_of_checkpoint(
    name: str, dtype: str, retrieval_head: str, quantization: str | None, trust_remote_code: bool
) -> ModelFacts:
    from specontext.memory.presets import did_you_mean

    format_ = None if dtype == "auto" else _dtype(dtype)
    try:
        source = resolve_model_path(name)
    except ModelError as error:
        alike = did_you_mean(name) or ", and no such preset (--list-presets)"
        raise ModelError(f"{error}{alike}") from error
    quiet_libraries()
    from specontext.memory.facts import facts_of_config
    from specontext.models.config_check import check_supported
    from specontext.models.quantized import Asked
    from specontext.models.quantized_size import quantised_bytes
    from specontext.quantization.schemes import scheme_of

    try:
        entry = quantization_of_source(source)
        scheme = None if entry is None else scheme_of(entry, source)
        Asked(source, scheme, quantization, dummy=False, keep=True, options={}).check()
        config = read_config(source, trust_remote_code=trust_remote_code)
    except ModelError as error:
        raise ModelError(f"{str(error).rstrip('.')}{did_you_mean(name)}") from error
    check_supported(config)
    shape = ModelShape.from_config(config, format_)
    head = _head_of_checkpoint(name, Path(source), config, shape, retrieval_head)
    own_code = {"trust_remote_code": trust_remote_code}
    facts = replace(facts_of_config(name, config, dtype=format_, head=head, **own_code), weights_note=weights_note(source))
    if scheme is None and quantization is None:
        return facts
    if adapter_of(name) is not None:  # it is merged into weights that are written out
        return replace(facts, weights_note=f"dequantised from {scheme.words}" if scheme else f"rounded to {quantization}")
    size = quantised_bytes(source, config, facts.parameters, shape.dtype.itemsize, scheme, quantization, **own_code)
    note = f"rounded to {quantization}" if scheme is None else scheme.words if scheme.form else f"dequantised from {scheme.words}"
    return replace(facts, stored_bytes=size, weights_note=", ".join(filter(None, (facts.weights_note, note))))


def _head_of_checkpoint(
    name: str, source: Path, config: PreTrainedConfig, shape: ModelShape, retrieval_head: str
) -> HeadFacts | None:
    """The named head, the model's own, or the bundled one; None where one of an EAGLE-3 draft's size stands for it."""
    from specontext.memory.facts import NO_HEAD, check_heads
    from specontext.retrieval.catalog import bundled_head
    from specontext.retrieval.checkpoint import OWN_HEAD

    adapter = adapter_of(name)
    own = (adapter.folder if adapter is not None and adapter.beside(OWN_HEAD) else source) / OWN_HEAD
    asked = None if retrieval_head == "auto" else retrieval_head
    named = asked or (str(own) if own.is_dir() else None)
    if named is None and (bundled := bundled_head(name, source, shape)) is not None and bundled.is_dir():
        named = str(bundled)
    if named is not None:
        check_heads(shape, of_layers(config, "num_key_value_heads", shape.full or range(shape.depth)))
        return _head(named, shape, "the model's own" if asked is None else named)
    if shape.only_windows:
        return replace(NO_HEAD, source="none: nothing is selected where all layers have a window")
    return None


def _head(source: str, shape: ModelShape, described: str) -> HeadFacts:
    """Facts of a head directory, checked against the model; 'none' is no head, as of methods without one."""
    from specontext.memory.facts import NO_HEAD

    if source == "none":
        return replace(NO_HEAD, source="none, as of methods without one")
    from specontext.retrieval import checkpoint
    from specontext.retrieval.head import facts_of_head

    config = checkpoint.read_config(source)
    config.check_target(shape, need_map=False)
    return facts_of_head(config, described)


def _dtype(name: str) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, name)
    return found


def with_kv_formats(facts: ModelFacts, kv_cache_dtype: str, host_kv_dtype: str) -> ModelFacts:
    """The same model with its KV, or that on the host alone, in another number format."""
    from specontext.memory.preset import KV_FORMATS

    host = host_kv_dtype if host_kv_dtype != kv_cache_dtype else "auto"
    formats: dict[str, Any] = {}  # a plan asks for their sizes only
    for setting, field, name in (("kv_cache_dtype", "kv_dtype", kv_cache_dtype), ("host_kv_dtype", "host_kv_dtype", host)):
        if name != "auto":
            facts.shape.check_kv_format(f"{setting} {name}")
            formats[field] = KV_FORMATS[name]
    return replace(facts, shape=replace(facts.shape, **formats))

"""Code that comes with a checkpoint: run where that is allowed, and never left aside for the library's where it may differ."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from specontext.errors import ModelError

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedConfig

NEEDS_CODE = (
    "it comes with code of its own, which runs only where that is allowed, once you have read it: with --trust-remote-code "
    "(on the command line) or trust_remote_code=True (in Python)"
)


def own_class(auto_map: Any, entry: str, known: Collection[str]) -> str | None:
    """The class of its own that a checkpoint names, unless the library has one of that name: makers leave the code beside
    weights that the library has learned to run since.

    Args:
        auto_map: of a config; anything that may stand in a file.
        entry: such as 'AutoTokenizer'.
        known: names of the library's classes for this checkpoint.
    """
    named = auto_map.get(entry) if isinstance(auto_map, Mapping) else None
    names = [name.rpartition(".")[2] for name in (named if isinstance(named, list) else [named]) if isinstance(name, str)]
    library = {_plain(name) for name in known}
    return names[0] if names and not any(_plain(name) in library for name in names) else None


def check_decoder_code(config: PreTrainedConfig, source: object, *, allowed: bool) -> None:
    """Raises ModelError where a checkpoint brings a decoder that is not the library's of its type, and that would not be run."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    auto_map = getattr(config, "auto_map", None)
    if allowed and isinstance(auto_map, Mapping) and "AutoModelForCausalLM" in auto_map:
        return
    mappings = [auto._model_mapping for auto in (AutoModelForCausalLM, AutoModel, AutoModelForImageTextToText)]
    kinds = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
    known = [kind.__name__ for each in kinds for kind in (each if isinstance(each, tuple) else (each,)) if kind is not None]
    for entry in ("AutoModelForCausalLM", "AutoModel"):
        own = own_class(auto_map, entry, known) if known else None
        if own and not allowed:
            raise ModelError(
                f"cannot load the model {source}: {own} (auto_map in config.json) may compute something else than transformers' "
                f"{known[0]}, and {NEEDS_CODE}; to run {known[0]} with its weights, remove auto_map"
            )
        if own:
            raise ModelError(
                f"cannot load the model {source}: {own} (auto_map in config.json) is its AutoModel, and it names no "
                f"AutoModelForCausalLM, which writes text; to run transformers' {known[0]} with its weights, remove auto_map"
            )


def _plain(name: str) -> str:
    """Without what the same class is spelled with by some: Ernie4_5_ForCausalLM, MPTForCausalLM."""
    return name.lower().replace("_", "").removesuffix("fast")

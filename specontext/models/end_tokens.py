"""Which tokens end an output, as Hugging Face's `generate` decides it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from specontext.errors import ModelError


def end_tokens(entries: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, source: Path | str) -> frozenset[int]:
    """The end tokens of a checkpoint: what its generation_config.json says, and nothing else, where there is one.

    Without that file it is what config.json says; what a class of configs has by default does not count, since nobody wrote it.
    The tokenizer's end token is used only where neither names any: `generate` ignores it and would go on for ever. (vLLM always
    adds it to those of generation_config.json, and does not look into config.json where there is one.)

    Args:
        entries: as `generation_entries` gives them.
        source: the checkpoint, for messages.

    Raises:
        ModelError: end tokens that are no token ids.
    """
    named = entries.get("eos_token_id")
    if named is None:
        named = tokenizer.eos_token_id
    ids = [] if named is None else named if isinstance(named, list | tuple) else [named]
    if odd := [value for value in ids if isinstance(value, bool) or not isinstance(value, int) or value < 0]:
        raise ModelError(f"eos_token_id of {source} should be token ids, got {odd[0]!r}")
    return frozenset(ids)

"""Which tokens end an output, as Hugging Face's `generate` decides it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from specontext.errors import ModelError

GENERATION = "generation_config.json"


def end_tokens(source: Path | str, tokenizer: PreTrainedTokenizerBase, *, revision: str | None = None) -> frozenset[int]:
    """The end tokens of a checkpoint: what its generation_config.json says, and nothing else, where there is one.

    Without that file it is what config.json says; what a class of configs has by default does not count, since nobody wrote it.
    The tokenizer's end token is used only where neither names any: `generate` ignores it and would go on for ever. (vLLM always
    adds it to those of generation_config.json, and does not look into config.json where there is one.)

    Raises:
        ModelError: a generation_config.json that cannot be read, or end tokens that are no token ids.
    """
    options: dict[str, Any] = {"revision": revision}
    try:
        named: Any = GenerationConfig.from_pretrained(source, **options).eos_token_id
    except (OSError, ValueError, TypeError) as error:
        if isinstance(source, Path) and (source / GENERATION).exists():
            raise ModelError(f"cannot read {source / GENERATION}: download it again or remove it") from error
        named = PreTrainedConfig.get_config_dict(source, **options)[0].get("eos_token_id")
    if named is None:
        named = tokenizer.eos_token_id
    ids = [] if named is None else named if isinstance(named, list | tuple) else [named]
    if odd := [value for value in ids if isinstance(value, bool) or not isinstance(value, int) or value < 0]:
        raise ModelError(f"eos_token_id of {source} should be token ids, got {odd[0]!r}")
    return frozenset(ids)

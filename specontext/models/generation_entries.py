"""What a checkpoint says of how its outputs are made: end tokens, and how it wants to be sampled.

It is read from the files, not from the model, which has none of it where its weights are random or quantised.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from specontext.checkpoints.wording import in_one_sentence
from specontext.errors import ModelError, RequestError, shown
from specontext.sampling_params import SamplingParams

GENERATION = "generation_config.json"
# What requests take from it where they say nothing themselves; vLLM takes the same.
FOLLOWED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
LONGEST = "max_new_tokens"  # which bounds all outputs, as in vLLM
# What else changes the tokens that Hugging Face's `generate` writes, with values that change nothing beside null, false and 0.
NOT_FOLLOWED: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "force_words_ids"), ([], {})),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids", "constraints"), ([],)),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff", "top_h"), ()),
    **dict.fromkeys(("num_beams", "num_beam_groups", "typical_p", "guidance_scale", "encoder_repetition_penalty"), (1,)),
    **dict.fromkeys(("penalty_alpha", "dola_layers", "exponential_decay_length_penalty", "watermarking_config"), ({},)),
    **dict.fromkeys(("stop_strings", "encoder_no_repeat_ngram_size"), ([], "")),
}


def generation_entries(source: Path | str, *, revision: str | None = None) -> dict[str, Any]:
    """The entries of a checkpoint's generation_config.json that say something; those of config.json where there is none.

    Raises:
        ModelError: a generation_config.json that cannot be read.
    """
    options: dict[str, Any] = {"revision": revision}
    try:
        found = vars(GenerationConfig.from_pretrained(source, **options))
    except (OSError, ValueError, TypeError) as error:
        if isinstance(source, Path) and (source / GENERATION).exists():
            said = in_one_sentence(error)
            raise ModelError(f"cannot read {source / GENERATION}: {said}; mend it, download it again or remove it") from error
        found = PreTrainedConfig.get_config_dict(source, **options)[0]
        found = {name: found.get(name) for name in ("eos_token_id", LONGEST, *FOLLOWED, *NOT_FOLLOWED)}
    return {name: value for name, value in found.items() if value is not None and not name.startswith("_")}


def recommended_sampling(entries: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Fields of `SamplingParams` that a checkpoint recommends; `max_tokens` is the most that it wants an output to have.

    Args:
        source: the checkpoint, for messages.

    Raises:
        ModelError: a value that no request may have; the message names the entry.
    """
    found = {name: entries[name] for name in FOLLOWED if name in entries}
    found |= {"max_tokens": entries[LONGEST]} if LONGEST in entries else {}
    if isinstance(top_k := found.get("top_k"), float) and top_k.is_integer():
        found["top_k"] = int(top_k)
    try:
        SamplingParams(**found)
    except RequestError as error:
        reason = str(error).replace("max_tokens", LONGEST)
        raise ModelError(
            f"{GENERATION} of {source} cannot be followed: {reason}; mend or remove the entry, "
            "or start the server with --generation-config none"
        ) from error
    return found


def not_followed(entries: Mapping[str, Any]) -> list[str]:
    """Entries that `generate` would follow and requests here do not, with their values, for people."""
    return [
        f"{name} {shown(value)}"
        for name, neutral in NOT_FOLLOWED.items()
        if (value := entries.get(name)) and value not in neutral
    ]

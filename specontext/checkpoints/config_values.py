"""Entries of a config.json that are wrong whatever the model: sizes and number formats that are none, contradictions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specontext.checkpoints.files import Failure
from specontext.errors import shown

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "intermediate_size",
)


def check_entries(values: Mapping[str, Any], where: Path, failure: Failure) -> None:
    """Raises `failure` for sizes that are none, and for names of number formats that are none, and positions said twice."""
    import torch

    for name in ("dtype", "torch_dtype"):
        value = values.get(name)
        if value is not None and not (isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)):
            raise failure(
                f"{where} is broken: {name} is {shown(value)}, which names no number format; set it to that of "
                "the weights, such as bfloat16"
            )
    for part in (values, values.get("text_config")):
        if isinstance(part, Mapping):
            _check_positions(part, where, failure)
    for name in SIZES:
        value = values.get(name)
        if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool) and value < 1):
            raise failure(f"{where} is broken: {name} is {shown(value)}; download it again")


def _check_positions(values: Mapping[str, Any], where: Path, failure: Failure) -> None:
    """Raises `failure` where the old and the new entries for RoPE are both there and say different things."""
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    if not isinstance(new, Mapping) or any(isinstance(part, Mapping) for part in new.values()):
        return
    scaling = {("rope_type" if key == "type" else key): value for key, value in (old.items() if isinstance(old, Mapping) else ())}
    theta = values.get("rope_theta")
    said = scaling | ({"rope_theta": theta} if theta is not None else {})
    found = {"rope_type": new.get("type", "default")} | dict(new)
    # The library takes rope_scaling where there is one, and nothing of the other entry beside it.
    for key in sorted(said.keys() | found.keys()) if scaling else said.keys() & found.keys():
        if key != "type" and said.get(key) != found.get(key):
            raise failure(
                f"{where} contradicts itself: its rope_parameters say {key} {shown(found.get(key))}, and its "
                f"rope_scaling or rope_theta {shown(said.get(key))}; keep the one that the model was trained with"
            )

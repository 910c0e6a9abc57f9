"""Signs that the weights of a checkpoint are quantised, in its config and in files beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specontext.checkpoints.files import Failure, read_json

# Under which names makers put it: Hugging Face, llm-compressor, MLX, older AWQ.
KEYS = ("quantization_config", "compression_config", "quantization", "quant_config")
# Files beside the config: ModelOpt, GPTQ, AWQ, AutoRound, msModelSlim.
FILES = (
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    "quant_model_description*.json",
)
METHODS = (
    "quant_method",
    "quant_algo",
    "quant_type",
    "quantization_method",
    "format",
    "method",
    "version",
    "kv_cache_quant_algo",
)
BITS = ("bits", "w_bit", "weight_bits", "num_bits", "nbits")
SMALL_NUMBERS = ("float8_", "float6_", "float4_", "fp8", "fp4", "nf4", "int", "uint", "qint", "quint")
ADVICE = "take the checkpoint that it was quantised from, with weights in float32, bfloat16 or float16"


def quantization_of(values: Mapping[str, Any], folder: Path | None, failure: Failure) -> str | None:
    """How a checkpoint says that it is quantised, and where, in words; None where it says nothing of the kind.

    Args:
        values: content of its config.json.
        folder: its directory, for what lies beside the config; None if there is none.

    Raises:
        failure: a file beside the config is broken.
    """
    found = quantization_entry(values, folder, failure)
    return None if found is None else found.described


def quantization_entry(values: Mapping[str, Any], folder: Path | None, failure: Failure) -> Entry | None:
    """`quantization_of` with what stands there."""
    for where, entry in _entries(values, ""):
        return Entry(entry, f"{where} in config.json")
    for key in ("dtype", "torch_dtype"):
        if (number := str(values.get(key)).removeprefix("torch.")).startswith(SMALL_NUMBERS):
            return Entry(number, f"{key} in config.json")
    for file in sorted(file for pattern in FILES for file in folder.glob(pattern)) if folder is not None else ():
        content = read_json(file, failure)
        entry = content.get("quantization", content)
        if not isinstance(entry, Mapping) or not _says_none(entry):
            return Entry(entry, file.name)
    return None


def dequantised(values: Mapping[str, Any]) -> str | None:
    """The format of weights that are turned into ordinary numbers when they are read, by name; None for any other checkpoint.

    Args:
        values: content of its config.json.
    """
    entry = values.get("quantization_config")
    method = entry.get("quant_method") if isinstance(entry, Mapping) else None
    return "MXFP4" if method == "mxfp4" and values.get("model_type") == "gpt_oss" else None


@dataclass(frozen=True)
class Entry:
    """Where a checkpoint says that it is quantised, and what it says: a mapping, or something else as it stands there."""

    said: Any
    where: str

    @property
    def values(self) -> Mapping[str, Any]:
        """What it says by name; nothing where it is no mapping."""
        return self.said if isinstance(self.said, Mapping) else {}

    @property
    def described(self) -> str:
        said = self.said if isinstance(self.said, str) else _described(self.said)
        return f"{said} ({self.where})"


def _entries(values: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """Entries that speak of quantisation, at any depth of a config, with their paths."""
    for key, value in values.items():
        if key in KEYS and value and not (isinstance(value, Mapping) and _says_none(value)):
            yield f"{path}{key}", value
        elif isinstance(value, Mapping):
            yield from _entries(value, f"{path}{key}.")


def _says_none(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of ModelOpt's kind says by its nulls that nothing is quantised."""
    named = [entry[key] for key in METHODS if key in entry]
    return bool(named) and not any(named) and not any(entry.get(key) for key in BITS)


def _described(entry: Any) -> str:
    if not isinstance(entry, Mapping):
        return repr(entry)
    method = next((str(entry[key]) for key in METHODS if entry.get(key)), "a method without a name")
    bits = next((f"{entry[key]} bits" for key in BITS if entry.get(key)), None)
    bits = bits or next((f"{n} bits" for n in (4, 8) if entry.get(f"load_in_{n}bit")), None)
    return f"{method}, {bits}" if bits else method

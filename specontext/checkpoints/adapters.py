"""LoRA adapters: directories that hold what a fine-tuning changed, and the name of the model that it was made for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from specontext.checkpoints.files import Failure, read_json, user_path

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
LORA = "LORA"  # what peft calls it


@dataclass(frozen=True)
class Adapter:
    """An adapter.

    Attributes:
        weights: the file with its weights.
        base: the model that it belongs to: a directory, or a name.
    """

    folder: Path
    weights: Path
    base: str | Path

    def beside(self, *names: str) -> bool:
        """Whether something of these names comes with it, instead of what comes with its model."""
        return any((self.folder / name).exists() for name in names)


def adapter_in(folder: Path | str, failure: Failure) -> Adapter | None:
    """The adapter that a directory is; None for a checkpoint, with an adapter beside it or without, and for anything else.

    Raises:
        failure: it is one of another kind than LoRA, is incomplete, or does not name its model.
    """
    user_path(folder, failure)
    folder = Path(folder)
    if not (folder / CONFIG).is_file() or (folder / "config.json").exists():
        return None
    values = read_json(folder / CONFIG, failure)
    kind, base = values.get("peft_type"), values.get("base_model_name_or_path")
    if kind is None:
        raise failure(f"{folder} has an {CONFIG} that is not peft's, as it names no peft_type: convert the adapter, or merge it")
    if kind != LORA:
        raise failure(f"{folder} is an adapter of type {kind}, and only LoRA adapters are merged: name a whole checkpoint")
    if not isinstance(base, str) or not base:
        raise failure(f"{folder} is a LoRA adapter whose model is not known: name it in {CONFIG} (base_model_name_or_path)")
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise failure(f"{folder} is a LoRA adapter without weights: download {WEIGHTS[0]} too")
    beside = folder / base
    return Adapter(folder, weights, beside.resolve() if beside.is_dir() else base)

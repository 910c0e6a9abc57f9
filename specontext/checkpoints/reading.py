"""Tensors out of a checkpoint's files, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from specontext.checkpoints.weights import StoredTensor

if TYPE_CHECKING:  # takes seconds to import
    from torch import Tensor


def tensor_reader(stored: Mapping[str, StoredTensor]) -> Callable[[str], Tensor]:
    """A function that reads the tensor of a name. Files stay open, mapped into memory, for as long as it is kept.

    Args:
        stored: as `read_headers` gives them, so the files are whole.
    """

    @cache
    def opened(file: Path) -> Any:
        if file.suffix == ".safetensors":
            return safe_open(file, framework="pt").get_tensor
        import torch

        return torch.load(file, map_location="cpu", weights_only=True, mmap=True).__getitem__

    def read(name: str) -> Tensor:
        found: Tensor = opened(stored[name].file)(stored[name].key or name)
        return found

    return read


def metadata_of(file: Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors."""
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata() or {})

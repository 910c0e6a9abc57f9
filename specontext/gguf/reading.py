"""A GGUF file: its metadata as plain values, and its tensors as they are stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from specontext.errors import GGUFError
from specontext.installing import install_command

INSTALL = install_command("gguf")
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # formats that are no quantisation


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file.

    Attributes:
        shape: as PyTorch counts, slowest dimension first.
        format: name of its quantisation or number format, such as Q4_1 or F16.
        values: reads it as float32 of that shape.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    values: Callable[[], NDArray[np.float32]]


@dataclass(frozen=True)
class GGUFFile:
    """Metadata and tensors, which are read from the file when they are asked for."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[StoredTensor, ...]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def own(self, key: str, default: Any = None) -> Any:
        """A setting of the file's architecture, such as `block_count`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        """A setting without which there is no model."""
        value = self.own(key)
        if value is None:
            raise GGUFError(f"{self.path} is incomplete: it does not say {self.architecture}.{key}")
        return value

    @property
    def format(self) -> str:
        """The quantisation or number format that most of the numbers have."""
        return self._most(self.tensors)

    @property
    def quantisation(self) -> str | None:
        """The quantisation that most of the quantised numbers have; None where none is quantised."""
        return self._most([tensor for tensor in self.tensors if tensor.format not in PLAIN])

    @staticmethod
    def _most(tensors: Sequence[StoredTensor]) -> Any:
        sizes: dict[str, int] = {}
        for tensor in tensors:
            sizes[tensor.format] = sizes.get(tensor.format, 0) + int(np.prod(tensor.shape))
        return max(sizes, key=lambda name: sizes[name], default=None)


def read_file(path: Path) -> GGUFFile:
    """Open a GGUF file.

    Raises:
        GGUFError: the package `gguf` is missing, the file is broken, or only a part of a model.
    """
    try:
        import gguf
    except ImportError as error:
        raise GGUFError(f"reading {path.name} takes the package gguf: {INSTALL}") from error
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        parts = int(metadata.get("split.count") or 1)
    except (OSError, ValueError, IndexError, KeyError, OverflowError, TypeError, MemoryError) as error:
        raise GGUFError(f"{path} is not a GGUF file, or it is broken or truncated: {error}") from error
    if parts > 1:
        raise GGUFError(f"{path} is one of {parts} parts: join them with llama.cpp's `llama-gguf-split --merge`")
    if not reader.tensors:
        raise GGUFError(f"{path} has no weights")
    return GGUFFile(path, metadata, tuple(_tensor(path, stored) for stored in reader.tensors))


def _tensor(path: Path, stored: Any) -> StoredTensor:
    shape = tuple(int(n) for n in reversed(stored.shape))

    def values() -> NDArray[np.float32]:
        import gguf

        try:
            numbers: NDArray[np.float32] = gguf.dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            wanted = f"the quantisation {stored.tensor_type.name} of {stored.name} in {path} is not supported"
            raise GGUFError(f"{wanted}: take a file in another one, such as Q4_K_M, Q8_0 or BF16") from error
        return np.ascontiguousarray(numbers, dtype=np.float32).reshape(shape)

    return StoredTensor(stored.name, shape, stored.tensor_type.name, values)

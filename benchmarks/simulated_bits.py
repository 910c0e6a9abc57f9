"""Formats that the engine does not have, simulated in plain PyTorch: numbers are rounded to fewer bits before they are stored.

What a format would lose is what an engine loses whose numbers were rounded so; its speed and its bytes are not simulated.

  head-keys-int8   the retrieval head's keys with 8 bits and a bfloat16 scale for each
  values-int4      values with 4 bits, a bfloat16 scale and zero for each 32 numbers
  keys-int4        keys with the same
  keys-int4-turned keys after a rotation by a Hadamard matrix, with the same, and turned back
Keys and values are rounded where they are written in 8 bits, so these need kv_cache_dtype or host_kv_dtype beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from specontext.kernels import rows
from specontext.retrieval.methods import speculative

GROUP = 32


def head_keys_in_8_bits(keys: Tensor) -> Tensor:
    """Keys [..., D] as codes of 8 bits with a scale for each would have them."""
    numbers = keys.float()
    scale = (numbers.abs().amax(-1, keepdim=True).clamp(min=2.0**-100) / 127).bfloat16().float()
    return ((numbers / scale).round().clamp(-127, 127) * scale).to(keys.dtype)


def in_4_bits(numbers: Tensor) -> Tensor:
    """Numbers [..., D] as groups of 16 levels between their least and their greatest would have them."""
    parts = numbers.float().unflatten(-1, (-1, GROUP))
    least = parts.amin(-1, keepdim=True).bfloat16().float()
    step = ((parts.amax(-1, keepdim=True) - least) / 15).clamp(min=2.0**-100).bfloat16().float()
    return (((parts - least) / step).round().clamp(0, 15) * step + least).flatten(-2)


def turned(numbers: Tensor) -> Tensor:
    """Numbers [..., D] times an orthonormal Hadamard matrix, which is its own inverse; D a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < numbers.shape[-1]:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return numbers.float() @ (matrix / len(matrix) ** 0.5)


def _keys(numbers: Tensor) -> Tensor:
    return torch.stack((in_4_bits(numbers[..., 0, :]), numbers[..., 1, :].float()), dim=-2)


def _turned_keys(numbers: Tensor) -> Tensor:
    return torch.stack((turned(in_4_bits(turned(numbers[..., 0, :]))), numbers[..., 1, :].float()), dim=-2)


def _values(numbers: Tensor) -> Tensor:
    return torch.stack((numbers[..., 0, :].float(), in_4_bits(numbers[..., 1, :])), dim=-2)


OF_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "values-int4": _values,
    "keys-int4": _keys,
    "keys-int4-turned": _turned_keys,
}
NAMES = ("head-keys-int8", *OF_ROWS)


@contextmanager
def simulated(names: list[str]) -> Iterator[None]:
    """Inside, what is stored is rounded as these names say."""
    quantise, append_keys = rows.quantise, speculative.append_keys

    def rounded(numbers: Tensor, codes: torch.dtype) -> Tensor:
        for name in names:
            numbers = OF_ROWS[name](numbers) if name in OF_ROWS else numbers
        return quantise(numbers, codes)

    def appended(keys: Tensor, table: Tensor, seats: Tensor, positions: Tensor, new: Tensor, **others: Any) -> None:
        append_keys(keys, table, seats, positions, head_keys_in_8_bits(new), **others)

    with mock.patch.object(rows, "quantise", rounded):
        if "head-keys-int8" in names:
            with mock.patch.object(speculative, "append_keys", appended):
                yield
        else:
            yield

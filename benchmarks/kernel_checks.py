"""What the kernels benchmark times, and how it checks results first: against float64, or equal to the PyTorch reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from kernel_case import PAGE_SIZE
from measure import Call
from torch import Tensor

from specontext.kernels.quantised_rows import SCALES, dequantised
from specontext.kernels.spans import CODES, read_rows
from specontext.kernels.tables import is_quantised

ROUNDED = {torch.bfloat16: 1e-2, torch.float16: 3e-3, torch.float32: 1e-4}  # tolerated relative error of attention


class WrongResult(Exception):
    """An operation does not compute what its reference does."""


@dataclass
class Operation:
    """Something that is timed.

    Attributes:
        calls: take turns; each works on inputs of its own.
        bytes: that one call must move: over the bus for rows from or to pinned memory, else in the device's memory.
        flops: floating-point operations of one call, where they and not bytes are the limit.
        error: relative error against the reference.
        over: "memory", "bus" or "arithmetic": what the floor is made of.
    """

    name: str
    shape: str
    calls: Sequence[Call]
    error: float
    bytes: int | None = None
    flops: int | None = None
    over: str = "memory"
    note: str = ""


def calls_of(call: Callable[[int], Any], count: int) -> list[Call]:
    return [lambda i=i: call(i) for i in range(count)]  # type: ignore[misc]


def relative_error(found: Tensor, right: Tensor) -> float:
    """Root mean square of the difference over that of the right numbers, in float64."""
    found, right = found.double(), right.double()
    return float((found - right).norm() / right.norm().clamp(min=1e-300))


def require(name: str, error: float, most: float) -> float:
    if not error <= most:
        raise WrongResult(f"{name}: relative error {error:.3g} against the reference, at most {most:.3g} is right")
    return error


def require_equal(name: str, found: Tensor, right: Tensor) -> float:
    if found.dtype in CODES:  # as bytes, since they need not be numbers
        found, right = found.view(torch.uint8), right.view(torch.uint8)
    if found.shape != right.shape or not torch.equal(found.to(right), right):
        raise WrongResult(f"{name}: differs from the reference")
    return 0.0


def exact_attention(query: Tensor, rows: Tensor, scale: float) -> Tensor:
    """Attention in float64: query [Hq, D] over rows [Hkv, T, 2 or 1, D] gives [Hq, D]."""
    keys, values = rows.double().select(2, 0), rows.double().select(2, -1)
    grouped = query.double().view(len(rows), -1, query.shape[-1])
    return (torch.softmax(grouped @ keys.mT * scale, -1) @ values).view(query.shape)


def numbers_at(pool: Tensor, rows: Tensor) -> Tensor:
    """K and V [.., 2 or 1, D] of rows of a pool, dequantised where they are in 8 bits."""
    taken = read_rows(pool, rows)
    return dequantised(taken, torch.empty(0, 2, (taken.shape[-1] - SCALES) // 2)) if is_quantised(taken) else taken


def row_numbers(pages: Tensor, entries: Tensor, kv_heads: int) -> Tensor:
    """Rows [R, Hkv, B] of entries [R, Hkv, B] in the pages [R, P]."""
    page = pages.gather(1, (entries // PAGE_SIZE).flatten(1)).view_as(entries)
    return (page * PAGE_SIZE + entries % PAGE_SIZE) * kv_heads + torch.arange(kv_heads, device=entries.device)[:, None]

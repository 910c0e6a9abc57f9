"""How fast a decode step can be: the bytes that it must move over the bandwidths. A floor, not a measurement."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specontext.memory.facts import ModelFacts

if TYPE_CHECKING:  # takes seconds to import, and only annotations here need it
    import torch


@dataclass(frozen=True)
class Bandwidths:
    """Bytes a second.

    Attributes:
        device: reading device memory.
        host: from host to device.
    """

    device: float
    host: float


@dataclass(frozen=True)
class StepFloor:
    """Least time of one decode step.

    Attributes:
        device_bytes, host_bytes: bytes moved in device memory, and from the host.
        seconds: the longer of the two, since loads run beside the model.
    """

    device_bytes: int
    host_bytes: int
    seconds: float
    loads_limit: bool


def floor_seconds(count: float, bandwidth: float) -> float:
    """Least time to move so many bytes."""
    return count / bandwidth


def decode_floor(
    facts: ModelFacts, speed: Bandwidths, *, length: int, requests: int, offloaded: int, budget: int, overlap: float
) -> StepFloor:
    """The floor of a decode step of `requests` requests of `length` tokens.

    On the device: weights and retrieval head once (of an embedding table of its own only some rows are read), the head's keys of
    all tokens, the selected rows of all layers, windows, states, and the loaded rows, which are written into their slots. From
    the host: of the selected rows of offloaded layers those that the last step did not select.

    Args:
        overlap: share of the selected entries that the last step selected too.
    """
    shape = facts.shape
    rows = requests * min(budget, length) * shape.kv_heads  # that are selected in one layer
    selected, missing = rows * shape.row_bytes, rows * offloaded * (1 - overlap) if length > budget else 0
    loaded = round(missing * shape.on_host.row_bytes)
    keys = requests * length * facts.key_bytes_per_token
    near = requests * shape.near_bytes(length)
    device = facts.step_bytes + keys + selected * shape.reads + near + round(missing * shape.row_bytes)
    compute, loads = floor_seconds(device, speed.device), floor_seconds(loaded, speed.host)
    return StepFloor(device, loaded, max(compute, loads), loads > compute)


def prefill_operations(facts: ModelFacts, length: int) -> int:
    """Floating-point operations of reading a text of `length` tokens densely.

    Two for every parameter that multiplies a token, and the products of causal attention: queries with keys, and weights with
    values, of half of all pairs.
    """
    shape = facts.shape
    pairs = shape.reads * length * length + 2 * length * sum(min(window.size, length) for window in shape.windows_read)
    attention = 2 * shape.query_heads * shape.made_dim * pairs
    return 2 * (facts.parameters - facts.lookup_parameters) * length + attention


def measure_products(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """Floating-point operations a second of this machine: the best of five products of two matrices [size, size]."""
    import torch

    matrix = torch.ones((size, size), dtype=dtype, device=device)
    return 2 * size**3 / best_seconds(device, lambda: matrix @ matrix)


def measure_bandwidths(device: torch.device, size: int = 1 << 28) -> Bandwidths:
    """The bandwidths of this machine: the best of five sums over `size` bytes, and of five copies of them from the host.

    On a CPU both tiers are the same memory, and the second is that of a copy.
    """
    import torch

    block = torch.ones(max(size // 4, 1), dtype=torch.float32, device=device)
    source = torch.ones(block.shape, dtype=torch.float32, pin_memory=device.type == "cuda")

    count = block.numel() * 4
    seconds = best_seconds(device, block.sum), best_seconds(device, lambda: block.copy_(source, non_blocking=True))
    return Bandwidths(count / seconds[0], count / seconds[1])


def best_seconds(device: torch.device, work: Callable[[], object], repeats: int = 5) -> float:
    """The least time that a work takes, of some."""
    best = float("inf")
    for _ in range(repeats):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)

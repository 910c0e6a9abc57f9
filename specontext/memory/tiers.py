"""Sizes of the two tiers' pools, from bytes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from specontext.errors import MemoryPlanError
from specontext.memory.free import free_gpu_memory, free_host_memory

if TYPE_CHECKING:
    import torch

    from specontext.memory.kv_cost import KVCost

SHARE_OF_FREE_MEMORY = 0.4


class Tier(Enum):
    """Where KV lives."""

    DEVICE = "device"
    HOST = "host"


@dataclass(frozen=True)
class TierSizes:
    """Pages of both pools, null pages included, and their bytes. A page of the host has the rows of a block's layers."""

    device_pages: int
    host_pages: int
    device_bytes: int
    host_bytes: int


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device (for the CPU: of the host's memory)."""
    if device.type == "cuda":
        return free_gpu_memory(device)
    return free_host_memory()


def size_tiers(
    kv: KVCost,
    *,
    offloaded: int | None,
    seats: int,
    max_tokens: int,
    device_memory: int,
    host_memory: int,
    beside_known: int | None = None,
) -> TierSizes:
    """Pools for `seats` requests of `max_tokens` tokens, or for as much of that as the memory allows.

    KV pages, slots and the head's keys share the device's pool, so memory goes to whichever needs it. The host's has room for all
    layers, whichever live there: requests that have to wait keep their KV in it; and beside them for their prompts, where these
    are kept for others. Only what is reached of it is committed.

    Args:
        kv: bytes of a token and of a request's slots.
        offloaded: layers that live on the host; None where that changes while the engine runs.
        device_memory, host_memory: bytes of each tier.
        beside_known: bytes that are kept of each page of a known prompt besides the KV that grows; None where none is kept.

    Raises:
        MemoryPlanError: not even one page of one request fits.
    """
    page = kv.page_size * kv.resident_token
    tokens = seats * kv.whole_pages(max_tokens)
    least = min(
        _with_null(kv, kv.page_size, 1, number) for number in (range(kv.layers + 1) if offloaded is None else [offloaded])
    )
    if device_memory < least:
        ways = ["raise --gpu-memory by that"]
        if kv.layer_slots:
            ways.append("lower --slots")
        if offloaded is not None and offloaded < kv.layers:
            ways.append("offload more layers")
        raise MemoryPlanError(
            f"the device tier of KV has {device_memory} bytes and needs at least {least} for one request, "
            f"{least - device_memory} more: {', or '.join(ways)}"
        )
    host_page, blocks = kv.host_page, kv.host_blocks
    away = kv.host_layers(kv.layers if offloaded is None else offloaded) // blocks.places
    host_least = host_page * max(1, 2 * away)
    if host_memory < host_least:
        raise MemoryPlanError(
            f"the host tier of KV has {host_memory} bytes and needs at least {host_least}, {host_least - host_memory} more: "
            "raise --host-memory by that"
        )
    device_pages = min(_with_null(kv, tokens, seats, offloaded or 0), device_memory) // page
    lines = len(blocks.sizes)
    of_known = 0 if beside_known is None else lines + -(-beside_known // host_page)
    host_pages = min(1 + tokens // kv.page_size * (lines + of_known), host_memory // host_page)
    return TierSizes(device_pages, host_pages, device_pages * page, host_pages * host_page)


def _with_null(kv: KVCost, tokens: int, requests: int, offloaded: int) -> int:
    """Device bytes, with a page of keys that is not full for each request, and the page that nobody holds."""
    page = kv.page_size * kv.resident_token
    keys = requests * page if kv.common_token else 0
    return -(-(kv.device(tokens, requests, offloaded) + keys + page) // page) * page

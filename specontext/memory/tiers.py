"""Sizes of the two tiers' pools, from bytes."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from specontext.core import ModelShape, SpeContextError

SHARE_OF_FREE_MEMORY = 0.4


class MemoryPlanError(SpeContextError):
    """The memory that was allowed cannot hold what was asked for; the message says how much is needed."""


@dataclass(frozen=True)
class TierSizes:
    """Pages of every pool, null pages included, and their bytes."""

    device_pages: int
    host_pages: int
    key_pages: int
    device_bytes: int
    host_bytes: int


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device (for the CPU: what the system calls available)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def size_tiers(
    shape: ModelShape,
    *,
    resident_layers: int,
    slots: int,
    key_bytes_per_token: int,
    seats: int,
    max_tokens: int,
    page_size: int,
    device: torch.device,
    gpu_memory: int | None,
    host_memory: int | None,
) -> TierSizes:
    """Pools for `seats` requests of `max_tokens` tokens, or for as much of that as the memory allows.

    A request takes pages of its tokens for every resident layer, pages of slots for every offloaded one, and pages of head
    keys, all on the device; and pages of its tokens for every offloaded layer on the host.

    Args:
        gpu_memory, host_memory: bytes of a tier; None takes what the requests need, up to a share of the free memory.

    Raises:
        MemoryPlanError: not even one page of one request fits.
    """
    offloaded = shape.layers - resident_layers
    page_bytes = page_size * shape.kv_heads * shape.row_bytes
    key_page_bytes = page_size * key_bytes_per_token
    slot_pages = offloaded * -(-slots // page_size)
    token_pages = -(-max_tokens // page_size)
    fixed = (seats * slot_pages + 1) * page_bytes + key_page_bytes
    per_token_page = resident_layers * page_bytes + key_page_bytes
    device_limit = gpu_memory if gpu_memory is not None else int(SHARE_OF_FREE_MEMORY * free_memory(device))
    host_limit = host_memory if host_memory is not None else int(SHARE_OF_FREE_MEMORY * free_memory(torch.device("cpu")))
    device_token_pages = seats * token_pages
    if per_token_page:
        device_token_pages = min(device_token_pages, (device_limit - fixed) // per_token_page)
    host_token_pages = seats * token_pages
    if offloaded:
        host_token_pages = min(host_token_pages, host_limit // (offloaded * page_bytes) - 1)
    least = fixed + per_token_page
    if device_token_pages < 1 or device_limit < fixed:
        raise MemoryPlanError(
            f"the device tier of KV has {device_limit} bytes and needs at least {least} for {seats} requests: "
            "raise --gpu-memory, lower --max-num-seqs or --slots, or offload more layers"
        )
    if host_token_pages < 1:
        raise MemoryPlanError(
            f"the host tier of KV has {host_limit} bytes and needs at least {2 * offloaded * page_bytes}: raise --host-memory"
        )
    device_pages = 1 + seats * slot_pages + device_token_pages * resident_layers
    host_pages = 1 + host_token_pages * offloaded
    key_pages = 1 + device_token_pages
    return TierSizes(
        device_pages,
        host_pages,
        key_pages,
        device_bytes=device_pages * page_bytes + (key_pages * key_page_bytes if key_page_bytes else 0),
        host_bytes=host_pages * page_bytes if offloaded else 0,
    )

"""New decode rows of all offloaded layers go to the host at once, from the slots where attention has read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specontext.kernels.rows import fixed_slots, gather_rows_layers

if TYPE_CHECKING:
    from specontext.kv.tiered import TieredKV


def write_back(kv: TieredKV, seats: Tensor, positions: Tensor) -> None:
    """Copy the rows of one token a request, which is a sink or the newest in the ring, in every offloaded layer.

    Args:
        seats, positions: int64 [R]; negative positions are skipped.
    """
    assert kv.hot is not None
    tokens = positions[:, None, None]  # [R, 1, 1]: one group, which all heads read
    gather_rows_layers(
        kv.arena.rows,
        kv.host.rows,
        kv.slot_pages.table,
        kv.host_pages.table,
        kv.layers,
        seats,
        torch.zeros_like(kv.reader.head_map),
        kv.resident_flags,
        fixed_slots(tokens, kv.hot.sink, kv.hot.recent),
        tokens,
        tokens >= 0,
        kv.page_size,
    )

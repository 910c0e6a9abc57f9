"""Moving KV rows by index: gather from one tier into another, and writing new rows."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_rows(source: Tensor, source_rows: Tensor, target: Tensor, target_rows: Tensor) -> None:
    """target[target_rows] = source[source_rows]; entries with a negative source row are skipped.

    Args:
        source: [N, 2, D].
        source_rows, target_rows: int64, equal shapes. Target rows are distinct.
        target: [M, 2, D], changed in place.
    """
    wanted = source_rows >= 0
    target.index_copy_(0, target_rows[wanted], source.index_select(0, source_rows[wanted].to(source.device)).to(target.device))


def append_rows(arena: Tensor, rows: Tensor, key: Tensor, value: Tensor) -> None:
    """Write K and V of new tokens: arena[rows[t, h]] = (key[t, h], value[t, h]); negative rows are skipped.

    Args:
        arena: [N, 2, D], changed in place.
        rows: int64 [T, Hkv], distinct where not negative.
        key, value: [T, Hkv, D].
    """
    wanted = rows >= 0
    new = torch.stack((key[wanted], value[wanted]), dim=1)
    arena.index_copy_(0, rows[wanted].to(arena.device), new.to(arena))

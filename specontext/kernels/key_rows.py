"""Writing new keys of the retrieval head into their pages."""

from __future__ import annotations

from torch import Tensor

from specontext.kernels.dispatch import operation


@operation(decided_by="new")
def append_keys(keys: Tensor, table: Tensor, seats: Tensor, positions: Tensor, new: Tensor) -> None:
    """keys[table[seats[t], positions[t] // page_size], positions[t] % page_size] = new[t]; negative positions are skipped.

    Args:
        keys: [pages, page_size, G, D], dense in the last two dimensions, changed in place.
        table: int64 [seats, P].
        seats, positions: int64 [T], distinct places.
        new: [T, G, D].
    """
    present = (positions >= 0).nonzero().squeeze(1)
    if len(present) < len(positions):
        seats, positions, new = seats[present], positions[present], new[present]
    page_size = keys.shape[1]
    keys[table[seats, positions // page_size], positions % page_size] = new.to(keys.dtype)

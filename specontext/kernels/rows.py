"""Moving rows by index: gather from one tier into another, and writing new rows of KV, and keys of the retrieval head.
How rows lie in pages, `tables.py` says.

On a GPU a pool may also be pinned host memory: the kernels read and write it in place, over the bus. (They are not asked whether
it is pinned, since a stream that is being captured could not answer; for pageable memory Triton raises.) Without Triton the
PyTorch version copies through a staging tensor, and waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.dispatch import operation, use_triton
from specontext.kernels.tables import NewTokens, Pages, Tiers


@operation(decided_by="source_rows")
def gather_rows(source: Tensor, source_rows: Tensor, target: Tensor, target_rows: Tensor) -> None:
    """target[target_rows] = source[source_rows]; entries with a negative source row are skipped.

    Args:
        source: [N, 2, D].
        source_rows, target_rows: int64, equal shapes. Target rows are distinct where they are not skipped.
        target: [M, 2, D], the source's dtype, changed in place.
    """
    wanted = source_rows >= 0
    _copy_rows(source, source_rows.masked_select(wanted), target, target_rows.masked_select(wanted))


def append_rows(arena: Tensor, rows: Tensor, key: Tensor, value: Tensor) -> None:
    """Write K and V of new tokens: arena[rows[t, h]] = (key[t, h], value[t, h]); negative rows are skipped.

    Args:
        arena: [N, 2, D], changed in place.
        rows: int64 [T, Hkv], distinct where not negative.
        key, value: [T, Hkv, D].
    """
    if use_triton(key):
        from specontext.kernels.triton.rows import append_rows as kernel

        return kernel(arena, rows, key, value)
    return append_rows_reference(arena, rows, key, value)


@operation(decided_by="new.key")
def append_tokens(pages: Pages, layer: int, new: NewTokens) -> None:
    """Write K and V of new tokens into the pages of one layer."""
    _append(pages, layer, new.seats, new.positions, torch.stack((new.key, new.value), dim=2))


@operation(decided_by="new.key")
def append_layer(tiers: Tiers, layer: int, new: NewTokens, *, to_host: bool = True) -> None:
    """Write K and V of new tokens of one layer to the tier where it lives, which on a GPU is read there.

    A resident layer keeps all its tokens on the device. An offloaded one keeps all on the host, and sinks and the last ones also
    in their slots: token p has slot p when p < sink, and is in the ring at slot sink + p % recent when it is one of the last
    `recent`.

    Args:
        to_host: False writes the slots of an offloaded layer only: the host's rows follow for all layers at once.
    """
    numbers = torch.stack((new.key, new.value), dim=2)
    if bool(tiers.resident[layer]):
        return _append(tiers.tokens, layer, new.seats, new.positions, numbers)
    if to_host:
        _append(tiers.host, layer, new.seats, new.positions, numbers)
    assert tiers.slots is not None
    slots = ring_slots(new.positions, new.lengths, tiers.slots.sink, tiers.slots.recent)
    _append(tiers.slots, layer, new.seats, slots, numbers)


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


def ring_slots(positions: Tensor, lengths: Tensor, sink: int, recent: int) -> Tensor:
    """Slots (any shape) of sinks and of the last `recent` of `lengths` tokens, -1 for all others and for negative positions."""
    kept = (positions >= 0) & ((positions < sink) | (positions >= lengths - recent))
    return torch.where(kept, fixed_slots(positions, sink, recent), -1)


def fixed_slots(positions: Tensor, sink: int, recent: int) -> Tensor:
    """The slot that a position has as a sink or in the ring; negative positions stay as they are."""
    return torch.where(positions < sink, positions, sink + positions % recent)


def _append(pages: Pages, layer: int, seats: Tensor, entries: Tensor, numbers: Tensor) -> None:
    """Write numbers [T, Hkv, 2, D] to entries [T], -1 for none. Heads of a token that are neighbours are written as one."""
    chosen = (entries >= 0).nonzero().squeeze(1)
    if len(chosen) < len(entries):
        seats, entries, numbers = seats[chosen], entries[chosen], numbers[chosen]
    table = pages.table_of(layer)
    page = table.view(-1).index_select(0, (seats * table.shape[1]).add_(entries // pages.size))
    piece, rows = pages.pieces(page, entries), as_words(pages.rows)
    new = as_words(numbers.to(pages.rows).flatten(0, 1))
    if pages.layers.count == 1:
        width = pages.heads * rows.shape[1]
        rows.view(-1, width).index_copy_(0, (piece // pages.heads).to(rows.device), new.view(-1, width))
    else:
        row = (piece[:, None] + torch.arange(pages.heads, device=piece.device)).mul_(pages.layers.count)
        rows.index_copy_(0, row.add_(pages.layers.homes[layer][1]).flatten().to(rows.device), new)


def _copy_rows(source: Tensor, source_rows: Tensor, target: Tensor, target_rows: Tensor) -> None:
    """target[target_rows] = source[source_rows], for int64 [T] without negative rows, between any two devices."""
    if source.device == target.device:  # a CPU copies bits word by word
        source, target = (as_words(rows) for rows in (source, target))
    taken = source.index_select(0, source_rows.to(source.device))
    target.index_copy_(0, target_rows.to(target.device), taken.to(target.device))


def as_words(rows: Tensor) -> Tensor:
    """Rows as [N, words] of the widest number format that divides a row."""
    flat = rows.view(len(rows), rows.shape[1] * rows.shape[2])
    row_bytes = flat.shape[1] * rows.itemsize
    word = next((w for w in (torch.complex128, torch.int64, torch.int32) if row_bytes % w.itemsize == 0), None)
    return flat if word is None else flat.view(word)


def append_rows_reference(arena: Tensor, rows: Tensor, key: Tensor, value: Tensor) -> None:
    """See `append_rows`."""
    wanted = rows >= 0
    new = torch.stack((key[wanted], value[wanted]), dim=1)
    arena.index_copy_(0, rows[wanted].to(arena.device), new.to(arena))

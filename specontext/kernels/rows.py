"""Moving KV rows by index: gather from one tier into another, and writing new rows.

A row is [K|V, D]. Pages hold `page_size` entries (tokens or slots) of all KV heads, as `kv.pool` lays them out:
row = (page * page_size + entry % page_size) * Hkv + head, where page = table[entry // page_size].

On a GPU a pool may also be pinned host memory: the kernels read and write it in place, over the bus. (They are not asked whether
it is pinned, since a stream that is being captured could not answer; for pageable memory Triton raises.) Without Triton the
PyTorch version copies through a staging tensor, and waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.dispatch import use_triton


def gather_rows(source: Tensor, source_rows: Tensor, target: Tensor, target_rows: Tensor) -> None:
    """target[target_rows] = source[source_rows]; entries with a negative source row are skipped.

    Args:
        source: [N, 2, D].
        source_rows, target_rows: int64, equal shapes. Target rows are distinct where they are not skipped.
        target: [M, 2, D], the source's dtype, changed in place.
    """
    if use_triton(source_rows):
        from specontext.kernels.triton.rows import gather_rows as kernel

        return kernel(source, source_rows, target, target_rows)
    return gather_rows_reference(source, source_rows, target, target_rows)


def gather_rows_layers(
    source: Tensor,
    target: Tensor,
    source_pages: Tensor,
    target_pages: Tensor,
    layers: Tensor,
    seats: Tensor,
    head_map: Tensor,
    resident: Tensor,
    tokens: Tensor,
    slots: Tensor,
    missing: Tensor,
    page_size: int,
) -> None:
    """Copy what one plan misses, for several layers and their KV heads at once: rows of tokens into rows of slots.

    Args:
        source: [N, 2, D], pages of tokens.
        target: [M, 2, D], pages of slots, the source's dtype, changed in place.
        source_pages, target_pages: int64 [L, seats, P], page tables of all layers.
        layers: int64 [N], the layers to load; seats: int64 [R], the requests' rows of the page tables.
        head_map: int64 [L, Hkv], the group whose entries a KV head of a layer reads.
        resident: bool [L], layers that are passed over: they have no slots. On a GPU it is read there, so that a captured
            graph serves whichever layers are resident.
        tokens, slots: int64 [R, G, B]; missing: bool [R, G, B], the entries to copy, whose slots are distinct in each pair.
    """
    arguments = (source_pages, target_pages, layers, seats, head_map, resident, tokens, slots, missing, page_size)
    if use_triton(tokens):
        from specontext.kernels.triton.rows import gather_rows_layers as kernel

        return kernel(source, target, *arguments)
    return gather_rows_layers_reference(source, target, *arguments)


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


def append_tokens(
    pool: Tensor, pages: Tensor, seats: Tensor, positions: Tensor, key: Tensor, value: Tensor, page_size: int
) -> None:
    """Write K and V of new tokens into the pages of one layer.

    Args:
        pool: [N, 2, D], changed in place.
        pages: int64 [seats, P], the layer's page table.
        seats, positions: int64 [T], the tokens' requests and places in them, distinct; negative positions are skipped.
        key, value: [T, Hkv, D].
    """
    if use_triton(key):
        from specontext.kernels.triton.rows import append_tokens as kernel

        return kernel(pool, pages, seats, positions, key, value, page_size)
    return append_tokens_reference(pool, pages, seats, positions, key, value, page_size)


def append_layer(
    host: Tensor,
    host_pages: Tensor,
    arena: Tensor,
    token_pages: Tensor,
    slot_pages: Tensor,
    resident: Tensor,
    seats: Tensor,
    positions: Tensor,
    lengths: Tensor,
    key: Tensor,
    value: Tensor,
    page_size: int,
    sink: int,
    recent: int,
    *,
    to_host: bool = True,
) -> None:
    """Write K and V of new tokens of one layer to the tier where it lives.

    A resident layer keeps all its tokens in the arena. An offloaded one keeps all on the host, and sinks and the last ones also
    in their slots: token p has slot p when p < sink, and is in the ring at slot sink + p % recent when it is one of the last
    `recent`.

    Args:
        host, arena: [N, 2, D] and [M, 2, D], changed in place.
        host_pages, token_pages, slot_pages: int64 [seats, P], the layer's page tables: of tokens on the host and in the arena,
            and of slots in the arena.
        resident: bool [1], where the layer lives; on a GPU it is read there.
        seats, positions: as in `append_tokens`.
        lengths: int64 [T], tokens in context of the token's request, these included.
        key, value: [T, Hkv, D].
        to_host: False writes the slots of an offloaded layer only: the host's rows follow for all layers at once.
    """
    pages = (host, host_pages, arena, token_pages, slot_pages)
    arguments = (*pages, resident, seats, positions, lengths, key, value, page_size, sink, recent)
    if use_triton(key):
        from specontext.kernels.triton.rows import append_layer as kernel

        return kernel(*arguments, to_host=to_host)
    return append_layer_reference(*arguments, to_host=to_host)


def ring_slots(positions: Tensor, lengths: Tensor, sink: int, recent: int) -> Tensor:
    """Slots (any shape) of sinks and of the last `recent` of `lengths` tokens, -1 for all others and for negative positions."""
    kept = (positions >= 0) & ((positions < sink) | (positions >= lengths - recent))
    return torch.where(kept, fixed_slots(positions, sink, recent), -1)


def fixed_slots(positions: Tensor, sink: int, recent: int) -> Tensor:
    """The slot that a position has as a sink or in the ring; negative positions stay as they are."""
    return torch.where(positions < sink, positions, sink + positions % recent)


# References -----------------------------------------------------------------------------------------------------------


def gather_rows_reference(source: Tensor, source_rows: Tensor, target: Tensor, target_rows: Tensor) -> None:
    """See `gather_rows`."""
    wanted = source_rows >= 0
    copy_rows(source, source_rows.masked_select(wanted), target, target_rows.masked_select(wanted))


def gather_rows_layers_reference(
    source: Tensor,
    target: Tensor,
    source_pages: Tensor,
    target_pages: Tensor,
    layers: Tensor,
    seats: Tensor,
    head_map: Tensor,
    resident: Tensor,
    tokens: Tensor,
    slots: Tensor,
    missing: Tensor,
    page_size: int,
) -> None:
    """See `gather_rows_layers`. Only missing entries are expanded to layers and heads, and only their rows are read."""
    requests, groups = missing.shape[:2]
    kv_heads = head_map.shape[1]
    device = missing.device
    layers = layers[~resident[layers]]
    request, group, entry = missing.nonzero(as_tuple=True)
    token, slot = tokens[request, group, entry], slots[request, group, entry]
    # A reader is a (layer, KV head, request); it wants the run of misses of its pair (request, group).
    pair = torch.arange(requests, device=device) * groups + head_map.index_select(0, layers)[..., None]  # [Loff, Hkv, R]
    of_pair = torch.bincount(request * groups + group, minlength=requests * groups)
    counts = of_pair[pair].view(-1)
    reader = torch.repeat_interleave(counts)  # readers in order, each as often as it has misses
    shift = (of_pair.cumsum(0) - of_pair)[pair].view(-1) - (counts.cumsum(0) - counts)
    miss = shift.index_select(0, reader).add_(torch.arange(len(reader), device=device))
    head = torch.arange(kv_heads, device=device)[:, None].expand(pair.shape).reshape(-1).index_select(0, reader)

    def rows(pages: Tensor, index: Tensor) -> Tensor:
        tables = layers[:, None, None] * pages.shape[1] + seats  # [Loff, 1, R]
        first = (tables * pages.shape[2]).expand(pair.shape).reshape(-1)
        place = first.index_select(0, reader).add_((index // page_size).index_select(0, miss))
        page = pages.view(-1).index_select(0, place)
        return page.mul_(page_size * kv_heads).add_((index % page_size * kv_heads).index_select(0, miss)).add_(head)

    copy_rows(source, rows(source_pages, token), target, rows(target_pages, slot))


def append_rows_reference(arena: Tensor, rows: Tensor, key: Tensor, value: Tensor) -> None:
    """See `append_rows`."""
    wanted = rows >= 0
    new = torch.stack((key[wanted], value[wanted]), dim=1)
    arena.index_copy_(0, rows[wanted].to(arena.device), new.to(arena))


def append_tokens_reference(
    pool: Tensor, pages: Tensor, seats: Tensor, positions: Tensor, key: Tensor, value: Tensor, page_size: int
) -> None:
    """See `append_tokens`. The heads of a token are neighbours in its page, and are written as one."""
    token = (positions >= 0).nonzero().squeeze(1)
    _append_entries(pool, pages, seats, positions, token, torch.stack((key, value), dim=2), page_size)


def append_layer_reference(
    host: Tensor,
    host_pages: Tensor,
    arena: Tensor,
    token_pages: Tensor,
    slot_pages: Tensor,
    resident: Tensor,
    seats: Tensor,
    positions: Tensor,
    lengths: Tensor,
    key: Tensor,
    value: Tensor,
    page_size: int,
    sink: int,
    recent: int,
    *,
    to_host: bool = True,
) -> None:
    """See `append_layer`."""
    new = torch.stack((key, value), dim=2)
    present = (positions >= 0).nonzero().squeeze(1)
    if bool(resident):
        return _append_entries(arena, token_pages, seats, positions, present, new, page_size)
    if to_host:
        _append_entries(host, host_pages, seats, positions, present, new, page_size)
    slots = ring_slots(positions, lengths, sink, recent)
    _append_entries(arena, slot_pages, seats, slots, (slots >= 0).nonzero().squeeze(1), new, page_size)


def _append_entries(
    pool: Tensor, pages: Tensor, seats: Tensor, entries: Tensor, chosen: Tensor, new: Tensor, page_size: int
) -> None:
    """Write new[chosen], where new is [T, Hkv, 2, D], to the entries of that index."""
    if len(chosen) < len(new):
        seats, entries, new = seats[chosen], entries[chosen], new[chosen]
    page = pages.view(-1).index_select(0, seats * pages.shape[1] + entries // page_size)
    at = page * page_size + entries % page_size
    pool.view(-1, *new.shape[1:]).index_copy_(0, at.to(pool.device), new.to(pool))


def copy_rows(source: Tensor, source_rows: Tensor, target: Tensor, target_rows: Tensor) -> None:
    """target[target_rows] = source[source_rows], for int64 [T] without negative rows, between any two devices."""
    if source.device == target.device:
        source, target = as_words(source), as_words(target)
    taken = source.index_select(0, source_rows.to(source.device))
    target.index_copy_(0, target_rows.to(target.device), taken.to(target.device))


def as_words(rows: Tensor) -> Tensor:
    """Rows as [N, words] of the widest number format that divides a row: a CPU copies bits word by word."""
    flat = rows.view(len(rows), rows.shape[1] * rows.shape[2])
    row_bytes = flat.shape[1] * rows.itemsize
    word = next((w for w in (torch.complex128, torch.int64, torch.int32) if row_bytes % w.itemsize == 0), None)
    return flat if word is None else flat.view(word)

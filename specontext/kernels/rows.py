"""Moving rows by index: gather from one tier into another, and writing new rows of KV, and keys of the retrieval head.
How rows lie in pages, `tables.py` says.

On a GPU a pool may also be pinned host memory: the kernels read and write it in place, over the bus. (They are not asked whether
it is pinned, since a stream that is being captured could not answer; for pageable memory Triton raises.) Without Triton the
PyTorch version copies through a staging tensor, and waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.dispatch import operation, scratch
from specontext.kernels.quantised_rows import dequantise, dequantised, quantise
from specontext.kernels.spans import CODES, read_rows, row_size, vectors_in, write_rows
from specontext.kernels.tables import Copies, NewTokens, Pages, Parts, Tiers, is_quantised, word_of

CACHED_BYTES = 1 << 22  # that a CPU reads and then writes: they stay in its cache, and its threads have enough to share


@operation(decided_by="source_rows")
def gather_rows(source: Tensor, source_rows: Tensor, target: Tensor, target_rows: Tensor) -> None:
    """target[target_rows] = source[source_rows]; entries with a negative source row are skipped.

    Args:
        source: [N, *row].
        source_rows, target_rows: int64, equal shapes. Target rows are distinct where they are not skipped.
        target: [M, *row], the source's dtype, changed in place. Rows in 8 bits of either may lie in spans (`spans.py`).
    """
    wanted = source_rows >= 0
    _copy_rows(source, source_rows.masked_select(wanted), target, target_rows.masked_select(wanted))


@operation(decided_by="target")
def gather_tokens(pages: Pages, layer: int, seat: int, start: int, target: Tensor) -> None:
    """target[t] = K and V of the token start + t of a seat in one layer.

    Args:
        target: [T, Hkv, *row], contiguous, on the device of the rows, changed in place.
    """
    device = pages.table.device
    tokens = torch.arange(start, start + len(target), device=device)[None, None]
    target.copy_(read_rows(pages.rows, pages.rows_of(layer, torch.full((1,), seat, device=device), tokens)[0].T))


@operation(decided_by="skipped")
def copy_pieces(
    source: Pages, target: Pages, parts: Parts, skipped: Tensor, copies: Copies, *, programs: int | None = None
) -> None:
    """Copy rows of entries, for several layers and KV heads at once.

    Where a pool has neighbouring layers side by side, what a GPU reads or writes of it are pieces: the rows of an entry in all
    layers of a part. On a CPU parts whose rows fill a piece are copied as pieces, others row by row, and as many at a time as
    stay in its cache between being read and being written.

    Args:
        target: pages of rows in the source's number format, or of numbers where the source has codes, which are dequantised on
            the way; changed in place.
        skipped: bool [L], layers that are passed over. On a GPU it is read there, so that a captured graph serves whichever
            layers are on the device.
        programs: how many share the work on a GPU: more bring more bytes a second and leave less of the device to what runs
            beside them. None takes the kernel's own number.
    """
    wanted = (parts.layers >= 0) & ~skipped[parts.layers.clamp(min=0)]
    requests, groups, most = copies.source.shape
    whole, device = wanted.all(1), wanted.device
    coded = is_quantised(source.rows)
    kinds = ((wanted.any(1), False),) if coded else ((whole, True), (~whole & wanted.any(1), False))
    for some, pieces in kinds:
        chosen = some.nonzero().squeeze(1)
        if not len(chosen):
            continue
        part = Parts(parts.layers[chosen], parts.heads[chosen], parts.groups[chosen])
        # A reader is a request of a part; it wants the list of its pair (request, group).
        pair = torch.arange(requests, device=device) * groups + part.groups[:, None]  # [K, R]
        counts = copies.counts.view(-1).long()[pair].view(-1)
        reader = torch.repeat_interleave(counts)  # readers in order, each as often as it wants entries
        entry = (pair.view(-1) * most - (counts.cumsum(0) - counts)).index_select(0, reader)
        entry += torch.arange(len(reader), device=device)
        (take, taken), (put, places) = (
            _numbers(pool, part, copies.seats, reader, numbers.reshape(-1).long(), entry, pieces=pieces)
            for pool, numbers in ((source, copies.source), (target, copies.target))
        )
        if not pieces:  # rows [T, W] on both sides
            present = wanted[chosen].repeat_interleave(requests, 0).index_select(0, reader)
            taken, places = taken.masked_select(present), places.masked_select(present)
        if coded:
            _copy_codes(source, taken.reshape(-1), target, places.reshape(-1))
            continue
        from_rows, to_rows = (pool.words.view(-1, rows * pool.words.shape[1]) for pool, rows in ((source, take), (target, put)))
        taken, places = taken.reshape(-1).to(from_rows.device), places.reshape(-1).to(to_rows.device)
        at_once = max(1, CACHED_BYTES // (from_rows.shape[1] * from_rows.itemsize)) * put  # whole pieces on both sides
        buffer = scratch("rows.copied", (min(at_once, len(taken)), from_rows.shape[1]), from_rows.dtype, from_rows.device)
        for start in range(0, len(taken), at_once):
            here = taken[start : start + at_once]
            rows = torch.index_select(from_rows, 0, here, out=buffer[: len(here)])
            there = places[start * take // put : (start + len(here)) * take // put]
            to_rows.index_copy_(0, there, rows.view(-1, to_rows.shape[1]).to(to_rows.device))


def _numbers(
    pool: Pages, parts: Parts, seats: Tensor, reader: Tensor, entries: Tensor, chosen: Tensor, *, pieces: bool
) -> tuple[int, Tensor]:
    """Where a pool has the chosen entries: 1 and rows [T, W], or where the parts fill its pieces their size and numbers [T]."""
    width, layers = parts.layers.shape[1], parts.layers.clamp(min=0)
    if pieces and pool.layers.count == width > 1:
        pieces = bool((pool.layers.places[layers] == torch.arange(width, device=layers.device)).all())
        layers = layers[:, :1] if pieces else layers  # all of a piece are in the first one's line
    else:
        pieces = False
    tables = pool.layers.lines[layers][:, None] * pool.table.shape[1] + seats[:, None]  # [K, R, W]
    place = (tables * pool.table.shape[2]).flatten(0, 1).index_select(0, reader)
    place += (entries // pool.size).index_select(0, chosen)[:, None]
    page = pool.table.reshape(-1).index_select(0, place.view(-1)).view(place.shape)
    heads = parts.heads.repeat_interleave(len(seats)).index_select(0, reader)
    numbers = pool.pieces(page.T, entries, chosen).add_(heads).T
    if pieces:
        return width, numbers[:, 0]
    if pool.layers.count > 1:
        of_layer = pool.layers.places[layers].repeat_interleave(len(seats), 0)
        numbers = numbers.mul_(pool.layers.count).add_(of_layer.index_select(0, reader))
    return 1, numbers


@operation(decided_by="new.key")
def append_tokens(pages: Pages, layer: int, new: NewTokens) -> None:
    """Write K and V of new tokens into the pages of one layer, quantised where those are."""
    rows = pages.rows
    vectors = vectors_in(rows, new.key.shape[-1]) if rows.dtype in CODES else rows.shape[1]  # of a latent one, which is both
    _append(pages, layer, new.seats, new.positions, torch.stack((new.key, new.value)[:vectors], dim=2))


@operation(decided_by="new.key")
def append_layer(tiers: Tiers, layer: int, new: NewTokens, *, to_host: bool = True) -> None:
    """Write K and V of new tokens of one layer to the tier where it lives, which on a GPU is read there.

    A resident layer keeps all its tokens on the device. An offloaded one keeps all on the host, and sinks and the last ones also
    in their slots, as the host has them: token p has slot p when p < sink, and is in the ring at slot sink + p % recent when it
    is one of the last `recent`.

    Args:
        to_host: False writes the slots of an offloaded layer only: the host's rows follow for all layers at once.
    """
    rows = tiers.tokens.rows
    vectors = vectors_in(rows, new.key.shape[-1]) if rows.dtype in CODES else rows.shape[1]  # of a latent one, which is both
    numbers = torch.stack((new.key, new.value)[:vectors], dim=2)
    if bool(tiers.resident[layer]):
        return _append(tiers.tokens, layer, new.seats, new.positions, numbers)
    if is_quantised(tiers.host.rows):
        numbers = quantise(numbers, tiers.host.rows.dtype)
    if to_host:
        _append(tiers.host, layer, new.seats, new.positions, numbers)
    assert tiers.slots is not None
    slots = ring_slots(new.positions, new.lengths, tiers.slots.sink, tiers.slots.recent)
    if is_quantised(numbers) and not is_quantised(tiers.slots.rows):
        numbers = dequantised(numbers, tiers.slots.rows)
    _append(tiers.slots, layer, new.seats, slots, numbers)


@operation(decided_by="new")
def append_pieces(pages: Pages, line: int, seats: Tensor, positions: Tensor, new: Tensor, wanted: Tensor) -> None:
    """Write the rows of new tokens in all layers of a block, as whole pieces.

    Args:
        pages: changed in place.
        line: of the page table.
        seats, positions: int64 [T], distinct; a negative position is padding.
        new: [T, Hkv, count, *row], contiguous, in the pages' number format.
        wanted: bool [count], places that are written; the others of a piece stay as they are.
    """
    token = (positions >= 0).nonzero().squeeze(1)
    at = positions[token]
    piece = pages.pieces(pages.table[line, seats[token], at // pages.size], at)
    if is_quantised(pages.rows):
        row = (piece[:, None] + torch.arange(pages.heads, device=piece.device)).mul_(pages.layers.count)
        row = row[..., None] + wanted.nonzero().squeeze(1)  # [T, Hkv, places]
        some = new.index_select(0, token)[:, :, wanted].flatten(0, 2)
        return write_rows(pages.rows, row.flatten().to(pages.rows.device), some.to(pages.rows.device))
    first, words = piece // pages.heads, pages.words
    shape = (-1, pages.heads, pages.layers.count, words.shape[1])
    rows, new = words.view(shape), new.flatten(3).view(words.dtype).index_select(0, token).to(words.device)
    place = wanted.nonzero().squeeze(1).to(words.device)
    if len(place) == pages.layers.count:
        rows.flatten(1).index_copy_(0, first.to(words.device), new.flatten(1))
    else:
        rows[first.to(words.device)[:, None], :, place] = new.transpose(1, 2)[:, place]


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


def row_of(key: Tensor, value: Tensor, pool: Tensor) -> Tensor:
    """K and V [T, Hkv, D] as rows of a pool: [T, Hkv, 2, D], latents [T, Hkv, 1, D], or quantised [T, Hkv, 2 * D + 4] or
    [T, Hkv, D + 4]."""
    if is_quantised(pool):
        rows, dim = quantise_tokens(key, value, pool.dtype), key.shape[-1]
        return rows if vectors_in(pool, dim) == 2 else torch.cat((rows[..., :dim], rows[..., 2 * dim :]), dim=-1)
    return torch.stack((key, value)[: pool.shape[1]], dim=-2).to(pool.dtype)


def as_stored(key: Tensor, value: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
    """New K and V [T, Hkv, D] as they will be read from a pool: it makes no difference then from where attention takes them."""
    if not is_quantised(pool):
        return key, value
    rows = quantise_tokens(key, value, pool.dtype)
    read = dequantise(rows, key.new_empty((*key.shape[:-1], 2, key.shape[-1])))
    return read[..., 0, :], read[..., 1, :]


@operation(decided_by="key")
def quantise_tokens(key: Tensor, value: Tensor, codes: torch.dtype) -> Tensor:
    """Rows [T, Hkv, 2 * D + 4] of K and V [T, Hkv, D]; see `quantised_rows.py`."""
    return quantise(torch.stack((key, value), dim=-2), codes)


def ring_slots(positions: Tensor, lengths: Tensor, sink: int, recent: int) -> Tensor:
    """Slots (any shape) of sinks and of the last `recent` of `lengths` tokens, -1 for all others and for negative positions."""
    kept = (positions >= 0) & ((positions < sink) | (positions >= lengths - recent))
    return torch.where(kept, fixed_slots(positions, sink, recent), -1)


def fixed_slots(positions: Tensor, sink: int, recent: int) -> Tensor:
    """The slot that a position has as a sink or in the ring; negative positions stay as they are."""
    return torch.where(positions < sink, positions, sink + positions % recent)


def _append(pages: Pages, layer: int, seats: Tensor, entries: Tensor, numbers: Tensor) -> None:
    """Write numbers [T, Hkv, 2 or 1, D], or rows of the pool, to entries [T], -1 for none. Heads of a token that are neighbours
    are written as one."""
    chosen = (entries >= 0).nonzero().squeeze(1)
    if len(chosen) < len(entries):
        seats, entries, numbers = seats[chosen], entries[chosen], numbers[chosen]
    line, place = pages.layers.homes[layer]
    table = pages.table[line]
    page = table.view(-1).index_select(0, (seats * table.shape[1]).add_(entries // pages.size))
    piece = pages.pieces(page, entries)
    if coded := pages.rows.dtype in CODES:
        new = (numbers if is_quantised(numbers) else quantise(numbers, pages.rows.dtype)).to(pages.rows.device)
    else:
        words = pages.words
        new = numbers.to(pages.rows).flatten(2).view(words.dtype)  # [T, Hkv, words]
    if pages.layers.count == 1 and not coded:
        words.view(-1, new.shape[1] * new.shape[2]).index_copy_(0, (piece // pages.heads).to(words.device), new.flatten(1))
    else:
        row = (piece[:, None] + torch.arange(pages.heads, device=piece.device)).mul_(pages.layers.count).add_(place)
        row = row.flatten().to(pages.rows.device)
        if coded:
            write_rows(pages.rows, row, new.flatten(0, 1))
        else:
            words.index_copy_(0, row, new.flatten(0, 1))


def _copy_codes(source: Pages, source_rows: Tensor, target: Pages, target_rows: Tensor) -> None:
    """target[target_rows] = source[source_rows], for int64 [T], of rows in 8 bits, and to rows of numbers dequantised."""
    at_once = CACHED_BYTES // row_size(source.rows)[0]
    size, device = row_size(source.rows), source.rows.device
    for here, there in zip(source_rows.split(at_once), target_rows.to(target.rows.device).split(at_once), strict=True):
        buffer = scratch("rows.copied", (len(here), *size), source.rows.dtype, device)
        rows = read_rows(source.rows, here.to(device), buffer)
        if is_quantised(target.rows):
            write_rows(target.rows, there, rows.to(target.rows.device))
        else:
            numbers = dequantised(rows, target.rows).flatten(1).view(target.words.dtype)
            target.words.index_copy_(0, there, numbers.to(target.rows.device))


def _copy_rows(source: Tensor, source_rows: Tensor, target: Tensor, target_rows: Tensor) -> None:
    """target[target_rows] = source[source_rows], for int64 [T] without negative rows, between any two devices."""
    if is_quantised(source):
        rows = read_rows(source, source_rows.to(source.device)).to(target.device)
        return write_rows(target, target_rows.to(target.device), rows)
    source, target = (rows.flatten(1).view(word_of(rows)) for rows in (source, target))
    taken = source.index_select(0, source_rows.to(source.device))
    target.index_copy_(0, target_rows.to(target.device), taken.to(target.device))

"""Copying rows of several layers between pools that lay them out in two ways: layer by layer, and neighbouring ones side by side.

A GPU reads and writes pinned host memory in place, over the bus, and the larger the pieces the faster: where one selection
serves several layers, all their rows of a token come with one read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.dispatch import operation, scratch
from specontext.kernels.rows import as_words
from specontext.kernels.tables import Copies, Pages, Parts

CACHED_BYTES = 1 << 22  # that a CPU reads and then writes: they stay in its cache, and its threads have enough to share


@operation(decided_by="wanted")
def listed(seats: Tensor, source: Tensor, target: Tensor, wanted: Tensor) -> Copies:
    """The entries that are wanted, in their order.

    Args:
        seats: int64 [R].
        source, target: integers [R, G, N].
        wanted: bool [R, G, N].
    """
    counts = wanted.sum(-1, dtype=torch.int32)
    width = int(counts.max()) if counts.numel() else 0
    kept = torch.arange(width, device=wanted.device) < counts[..., None]
    lists = []
    for entries in (source, target):
        packed = torch.zeros(kept.shape, dtype=torch.int32, device=wanted.device)
        lists.append(packed.masked_scatter_(kept, entries.masked_select(wanted).int()))
    return Copies(seats, lists[0], lists[1], counts)


@operation(decided_by="skipped")
def copy_pieces(
    source: Pages, target: Pages, parts: Parts, skipped: Tensor, copies: Copies, *, programs: int | None = None
) -> None:
    """Copy rows of entries, for several layers and KV heads at once.

    On a CPU parts whose rows fill a piece are copied as pieces, others row by row.

    Args:
        target: pages of rows in the source's number format, changed in place.
        skipped: bool [L], layers that are passed over. On a GPU it is read there, so that a captured graph serves whichever
            layers are on the device.
        programs: how many share the work on a GPU: more bring more bytes a second and leave less of the device to what runs
            beside them. None takes the kernel's own number.
    """
    wanted = (parts.layers >= 0) & ~skipped[parts.layers.clamp(min=0)]
    width = parts.layers.shape[1]
    whole = wanted.all(1)
    in_order = torch.arange(width, device=wanted.device)
    for some, pieces in ((whole, True), (~whole & wanted.any(1), False)):
        chosen = some.nonzero().squeeze(1)
        if not len(chosen):
            continue
        part = Parts(parts.layers[chosen], parts.heads[chosen], parts.groups[chosen])
        reader, entry = _readers(part.groups, copies)
        sides = []
        for pool, entries in ((source, copies.source), (target, copies.target)):
            together = pieces and pool.layers.count == width and bool((pool.layers.places[part.layers] == in_order).all())
            numbers = _numbers(pool, part, copies.seats, reader, entries.reshape(-1).long(), entry, together)
            sides.append((width if together else 1, numbers))
        if not pieces:  # [T, W] rows on both sides
            present = wanted[chosen].repeat_interleave(len(copies.seats), 0).index_select(0, reader)
            sides = [(1, numbers.masked_select(present)) for _, numbers in sides]
        _move(source.rows, target.rows, *sides)


def _readers(groups: Tensor, copies: Copies) -> tuple[Tensor, Tensor]:
    """Every part's every request as often as it has entries, and the numbers of these among all entries: both int64 [T]."""
    requests, group_count, width = copies.source.shape
    device = groups.device
    pair = torch.arange(requests, device=device) * group_count + groups[:, None]  # [K, R]
    counts = copies.counts.view(-1).long()[pair].view(-1)
    reader = torch.repeat_interleave(counts)
    shift = pair.view(-1) * width - (counts.cumsum(0) - counts)
    return reader, shift.index_select(0, reader).add_(torch.arange(len(reader), device=device))


def _numbers(pool: Pages, parts: Parts, seats: Tensor, reader: Tensor, entries: Tensor, chosen: Tensor, together: bool) -> Tensor:
    """Numbers of pieces [T], or of rows [T, W], of the chosen entries."""
    layers = parts.layers[:, :1] if together else parts.layers.clamp(min=0)  # [K, W], of pieces the first layer's
    tables = pool.layers.lines[layers][:, None] * pool.table.shape[1] + seats[:, None]  # [K, R, W]
    first = (tables * pool.table.shape[2]).flatten(0, 1)
    place = first.index_select(0, reader).add_((entries // pool.size).index_select(0, chosen)[:, None])
    page = pool.table.reshape(-1).index_select(0, place.view(-1)).view(place.shape)
    heads = parts.heads.repeat_interleave(len(seats)).index_select(0, reader)
    numbers = pool.pieces(page.T, entries, chosen).add_(heads).T
    if together:
        return numbers[:, 0]
    if pool.layers.count > 1:
        of_layer = pool.layers.places[layers].repeat_interleave(len(seats), 0)
        numbers.mul_(pool.layers.count).add_(of_layer.index_select(0, reader))
    return numbers


def _move(source: Tensor, target: Tensor, take: tuple[int, Tensor], put: tuple[int, Tensor]) -> None:
    """Copy rows of one pool to rows of another; `take` and `put` have how many rows are one piece, and the pieces' numbers.

    As many at a time as stay in a CPU's cache between being read and being written.
    """
    alike = source.device == target.device
    source, target = (as_words(rows) if alike else rows.flatten(1) for rows in (source, target))
    pieces, places = source.view(-1, take[0] * source.shape[1]), target.view(-1, put[0] * target.shape[1])
    numbers, where = take[1].reshape(-1).to(source.device), put[1].reshape(-1).to(target.device)
    if not alike:
        places.index_copy_(0, where, pieces.index_select(0, numbers).view(-1, places.shape[1]).to(target.device))
        return
    some = max(1, CACHED_BYTES // (pieces.shape[1] * pieces.itemsize)) * put[0]  # whole pieces on both sides
    buffer = scratch("pieces.moved", (min(some, len(numbers)), pieces.shape[1]), pieces.dtype, pieces.device)
    for start in range(0, len(numbers), some):
        part = numbers[start : start + some]
        taken = torch.index_select(pieces, 0, part, out=buffer[: len(part)])
        first, last = (at * take[0] // put[0] for at in (start, start + len(part)))
        places.index_copy_(0, where[first:last], taken.view(-1, places.shape[1]))


@operation(decided_by="new")
def append_pieces(pages: Pages, line: int, seats: Tensor, positions: Tensor, new: Tensor, wanted: Tensor) -> None:
    """Write the rows of new tokens in all layers of a block, as whole pieces.

    Args:
        pages: changed in place.
        line: of the page table.
        seats, positions: int64 [T], distinct; a negative position is padding.
        new: [T, Hkv, count, 2, D], contiguous, in the pages' number format.
        wanted: bool [count], places that are written; the others of a piece stay as they are.
    """
    token = (positions >= 0).nonzero().squeeze(1)
    at, pool = positions[token], pages.rows
    first = pages.pieces(pages.table[line, seats[token], at // pages.size], at) // pages.heads
    entry, new = first.to(pool.device), new.index_select(0, token).to(pool)
    rows, new_rows = as_words(pool), as_words(new.flatten(0, 2))
    shape = (-1, pages.heads, pages.layers.count, rows.shape[1])
    if bool(wanted.all()):
        rows.view(shape).flatten(1).index_copy_(0, entry, new_rows.view(shape).flatten(1))
    else:
        place = wanted.nonzero().squeeze(1).to(pool.device)
        rows.view(shape)[entry[:, None], :, place] = new_rows.view(shape).transpose(1, 2)[:, place]

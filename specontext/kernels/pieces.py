"""Copying rows of KV between pools that lay them out in two ways: layer by layer, and with neighbouring layers side by side.

A pool has pages of `page_size` entries (tokens or slots) of all KV heads. In a pool with P *places* the rows of an entry and KV
head in P layers lie together, as one *piece*:

    page = table[line[layer], seat, entry // page_size]
    row = ((page * page_size + entry % page_size) * Hkv + head) * P + place[layer]

A GPU reads and writes pinned host memory in place, over the bus, and the larger the pieces the faster: where one selection
serves several layers, all their rows of a token come with one read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specontext.kernels.dispatch import use_triton
from specontext.kernels.rows import as_words
from specontext.kernels.scratch import scratch

CACHED_BYTES = 1 << 22  # that a CPU reads and then writes: they stay in its cache, and its threads have enough to share


@dataclass(frozen=True, eq=False)
class PagedRows:
    """A pool and where it has the entries of requests.

    Attributes:
        rows: [N, 2, D], contiguous.
        table: int64 [lines, seats, pages].
        line, place: int64 [L], of each layer: its line of the table, and its place in a piece.
        places: P, rows of a piece.
        page_size: entries of a page.
    """

    rows: Tensor
    table: Tensor
    line: Tensor
    place: Tensor
    places: int
    page_size: int


@dataclass(frozen=True, eq=False)
class Parts:
    """What is copied together: some layers of a block, in which a KV head reads the same retrieval group.

    Attributes:
        layers: int64 [K, W], -1 where a part has fewer.
        heads, groups: int64 [K].
        kv_heads: Hkv.
    """

    layers: Tensor
    heads: Tensor
    groups: Tensor
    kv_heads: int

    def __len__(self) -> int:
        return len(self.heads)

    def __getitem__(self, some: slice) -> Parts:
        return Parts(self.layers[some], self.heads[some], self.groups[some], self.kv_heads)


@dataclass(frozen=True, eq=False)
class Entries:
    """What is copied of each request and group: the first counts[r, g] of a list.

    Attributes:
        source, target: integers [R, G, N], entries in the one pool and in the other.
        counts: int32 [R, G].
    """

    source: Tensor
    target: Tensor
    counts: Tensor


def all_entries(source: Tensor, target: Tensor) -> Entries:
    """Entries of lists that are full."""
    return Entries(source, target, torch.full(source.shape[:2], source.shape[2], dtype=torch.int32, device=source.device))


def listed(source: Tensor, target: Tensor, wanted: Tensor) -> Entries:
    """The entries that are wanted, in their order.

    Args:
        source, target: integers [R, G, N].
        wanted: bool [R, G, N].
    """
    if use_triton(wanted):
        from specontext.kernels.triton.pieces import listed as kernel

        return kernel(source, target, wanted)
    return listed_reference(source, target, wanted)


def copy_pieces(
    source: PagedRows,
    target: PagedRows,
    parts: Parts,
    seats: Tensor,
    skipped: Tensor,
    entries: Entries,
    *,
    programs: int | None = None,
) -> None:
    """Copy rows of entries, for several layers and KV heads at once.

    Args:
        seats: int64 [R], the requests' rows of the page tables.
        skipped: bool [L], layers that are passed over. On a GPU it is read there, so that a captured graph serves whichever
            layers are on the device.
        entries: those of a group are copied for every part that reads it; targets are distinct.
        programs: how many share the work on a GPU: more bring more bytes a second and leave less of the device to what runs
            beside them. None takes the kernel's own number.
    """
    if use_triton(seats):
        from specontext.kernels.triton.pieces import copy_pieces as kernel

        return kernel(source, target, parts, seats, skipped, entries, programs=programs)
    return copy_pieces_reference(source, target, parts, seats, skipped, entries)


def append_pieces(
    pool: Tensor, pages: Tensor, seats: Tensor, positions: Tensor, new: Tensor, wanted: Tensor, page_size: int
) -> None:
    """Write the rows of new tokens in all layers of a block, as whole pieces.

    Args:
        pool: [N, 2, D], changed in place.
        pages: int64 [seats, pages], the block's page table.
        seats, positions: int64 [T], the tokens' requests and places in them, distinct; negative positions are skipped.
        new: [T, Hkv, P, 2, D], contiguous, in the pool's format.
        wanted: bool [P], places that are written; the others of a piece stay as they are.
    """
    if use_triton(new):
        from specontext.kernels.triton.pieces import append_pieces as kernel

        return kernel(pool, pages, seats, positions, new, wanted, page_size)
    return append_pieces_reference(pool, pages, seats, positions, new, wanted, page_size)


# References -----------------------------------------------------------------------------------------------------------


def listed_reference(source: Tensor, target: Tensor, wanted: Tensor) -> Entries:
    """See `listed`."""
    counts = wanted.sum(-1, dtype=torch.int32)
    width = int(counts.max()) if counts.numel() else 0
    kept = torch.arange(width, device=wanted.device) < counts[..., None]
    lists = []
    for entries in (source, target):
        packed = entries.new_zeros((*wanted.shape[:2], width))
        lists.append(packed.masked_scatter_(kept, entries.masked_select(wanted)))
    return Entries(lists[0], lists[1], counts)


def copy_pieces_reference(
    source: PagedRows, target: PagedRows, parts: Parts, seats: Tensor, skipped: Tensor, entries: Entries
) -> None:
    """See `copy_pieces`. Parts whose rows fill a piece are copied as pieces, others row by row."""
    wanted = (parts.layers >= 0) & ~skipped[parts.layers.clamp(min=0)]
    width = parts.layers.shape[1]
    whole = wanted.all(1)
    in_order = torch.arange(width, device=wanted.device)
    for some, pieces in ((whole, True), (~whole & wanted.any(1), False)):
        chosen = some.nonzero().squeeze(1)
        if not len(chosen):
            continue
        layers = parts.layers[chosen]
        reader, entry = _readers(parts.groups[chosen], entries)
        sides = []
        for pool, index in ((source, entries.source), (target, entries.target)):
            together = pieces and pool.places == width and bool((pool.place[layers] == in_order).all())
            index = index.reshape(-1).long()
            numbers = _numbers(pool, layers, parts.heads[chosen], parts.kv_heads, seats, reader, index, entry, together)
            sides.append((width if together else 1, numbers))
        if not pieces:  # [T, W] rows on both sides
            present = wanted[chosen].repeat_interleave(len(seats), 0).index_select(0, reader)
            sides = [(1, numbers.masked_select(present)) for _, numbers in sides]
        _move(source.rows, target.rows, *sides)


def _readers(groups: Tensor, entries: Entries) -> tuple[Tensor, Tensor]:
    """Every part's every request as often as it has entries, and the numbers of these among all entries: both int64 [T]."""
    requests, group_count, width = entries.source.shape
    device = groups.device
    pair = torch.arange(requests, device=device) * group_count + groups[:, None]  # [K, R]
    counts = entries.counts.view(-1).long()[pair].view(-1)
    reader = torch.repeat_interleave(counts)
    shift = pair.view(-1) * width - (counts.cumsum(0) - counts)
    return reader, shift.index_select(0, reader).add_(torch.arange(len(reader), device=device))


def _numbers(
    pool: PagedRows,
    layers: Tensor,
    heads: Tensor,
    kv_heads: int,
    seats: Tensor,
    reader: Tensor,
    index: Tensor,
    entry: Tensor,
    together: bool,
) -> Tensor:
    """Numbers of pieces [T], or of rows [T, W], of the entries index[entry]."""
    members = layers[:, :1] if together else layers.clamp(min=0)  # [K, W], of pieces the first layer's
    tables = pool.line[members][:, None] * pool.table.shape[1] + seats[:, None]  # [K, R, W]
    first = (tables * pool.table.shape[2]).flatten(0, 1)
    place = first.index_select(0, reader).add_((index // pool.page_size).index_select(0, entry)[:, None])
    pages = pool.table.reshape(-1).index_select(0, place.view(-1)).view(place.shape)
    within = (index % pool.page_size * kv_heads).index_select(0, entry)
    within.add_(heads.repeat_interleave(len(seats)).index_select(0, reader))
    numbers = pages.mul_(pool.page_size * kv_heads).add_(within[:, None])
    if together:
        return numbers[:, 0]
    if pool.places > 1:
        numbers.mul_(pool.places).add_(pool.place[members].repeat_interleave(len(seats), 0).index_select(0, reader))
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
    buffer = scratch("pieces.moved", (some, pieces.shape[1]), pieces.dtype, pieces.device)
    for start in range(0, len(numbers), some):
        part = numbers[start : start + some]
        taken = torch.index_select(pieces, 0, part, out=buffer[: len(part)])
        first, last = (at * take[0] // put[0] for at in (start, start + len(part)))
        places.index_copy_(0, where[first:last], taken.view(-1, places.shape[1]))


def append_pieces_reference(
    pool: Tensor, pages: Tensor, seats: Tensor, positions: Tensor, new: Tensor, wanted: Tensor, page_size: int
) -> None:
    """See `append_pieces`."""
    kv_heads, places = new.shape[1:3]
    token = (positions >= 0).nonzero().squeeze(1)
    at = positions[token]
    entry = (pages[seats[token], at // page_size] * page_size + at % page_size).to(pool.device)
    new = new.index_select(0, token).to(pool)
    rows, new_rows = as_words(pool), as_words(new.flatten(0, 2))
    if bool(wanted.all()):
        width = kv_heads * places * rows.shape[1]
        rows.view(-1, width).index_copy_(0, entry, new_rows.view(-1, width))
    else:
        place = wanted.nonzero().squeeze(1).to(pool.device)
        entries, new_entries = (x.view(-1, kv_heads, places, x.shape[1]) for x in (rows, new_rows))
        entries[entry[:, None], :, place] = new_entries.transpose(1, 2)[:, place]

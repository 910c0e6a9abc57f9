"""What kernels of paged rows are handed: tensors, and the few numbers that say how they lie.

Row numbers of KV are made here, by `Pages`, and in `triton/slot_plan.py` by `piece_of`, and nowhere else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from specontext.kernels.spans import CODES, CodedPages, parts_of


def is_quantised(rows: Tensor) -> bool:
    """Whether rows are codes and scales; see `quantised_rows.py` and `spans.py`."""
    return rows.dtype in CODES


def holds_latents(rows: Tensor) -> bool:
    """Whether a row of a pool of numbers is one vector, which is key and value at once; of codes `spans.vectors_in` says it."""
    return rows.dim() == 3 and rows.shape[1] == 1 and not is_quantised(rows)


def word_of(rows: Tensor) -> torch.dtype:
    """The widest number format that divides a row of a pool [N, ...]."""
    row_bytes = math.prod(rows.shape[1:]) * rows.itemsize  # also where there are none
    return next((w for w in (torch.complex128, torch.int64, torch.int32) if row_bytes % w.itemsize == 0), rows.dtype)


@dataclass(frozen=True, eq=False)
class Places:
    """Where the layers are in the pieces of a pool: the rows of an entry and KV head in neighbouring layers, side by side.

    Attributes:
        homes: line of the page tables, and place in a piece, of each layer.
        lines, places: the same on the device, int64 [L].
        count: rows of a piece, 1 where each layer lies by itself.
    """

    homes: tuple[tuple[int, int], ...]
    lines: Tensor
    places: Tensor
    count: int


@dataclass(frozen=True, eq=False)
class Pages:
    """Rows of a pool, and where the entries of each seat lie in them.

    An entry is a token, or a slot. A page holds `size` entries of all KV heads, of one layer or of some side by side:

        entry e of a seat, KV head h  ->  piece (page * size + e % size) * heads + h, where page = table[line, seat, e // size]
        in a layer                    ->  row piece * count + place

    Attributes:
        rows: [N, 2, D], K and V, or latents [N, 1, D], which are both; in 8 bits [spans, S, 2 * D + 4] or [N, 2 * D + 4],
            see `spans.py`.
        table: int64 [lines, seats, P]; page 0 stands where there is none. On the device, wherever the rows are.
        size: entries of a page.
        heads: KV heads.
        layers: their lines and places.
    """

    rows: Tensor
    table: Tensor
    size: int
    heads: int
    layers: Places

    @cached_property
    def words(self) -> Tensor:
        """Rows of numbers as [N, words]: a CPU copies bits word by word."""
        with torch.inference_mode(False):  # or they could not be written outside of inference mode
            return self.rows.flatten(1).view(word_of(self.rows))

    def table_of(self, layer: int) -> Tensor:
        """Pages int64 [seats, P] of a layer."""
        return self.table[self.layers.homes[layer][0]]

    def by_page(self, layer: int) -> Tensor | CodedPages:
        """The rows of a layer in every page: [pages, size, Hkv, *row], of any strides but the last."""
        shape, place = (-1, self.size, self.heads, self.layers.count), self.layers.homes[layer][1]
        if self.rows.dtype in CODES:
            codes, scales = (part.view(*shape, part.shape[2])[:, :, :, place] for part in parts_of(self.rows))
            return CodedPages(self.rows, codes, scales)
        return self.rows.view(*shape, *self.rows.shape[1:])[:, :, :, place]

    def pieces(self, page: Tensor, entries: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Pieces of the first KV heads of entries, or of the chosen ones, in these pages, which are worked on in place."""
        within = entries % self.size * self.heads
        return page.mul_(self.size * self.heads).add_(within if chosen is None else within.index_select(0, chosen))

    def rows_at(self, layer: int, seats: Tensor, entries: Tensor) -> Tensor:
        """Rows of single entries in one layer, of all KV heads.

        Args:
            seats, entries: int64 [N].

        Returns:
            int64 [N, Hkv].
        """
        table, (_, place) = self.table_of(layer), self.layers.homes[layer]
        page = table.view(-1).index_select(0, seats * table.shape[1] + entries // self.size)
        rows = self.pieces(page, entries)[:, None] + torch.arange(self.heads, device=page.device)
        return rows.mul_(self.layers.count).add_(place) if self.layers.count > 1 else rows

    def rows_of(self, layer: int, seats: Tensor, entries: Tensor) -> Tensor:
        """Rows of entries in one layer.

        Args:
            seats: int64 [R].
            entries: int64 [R, H, B], numbers for each KV head (H is Hkv, or 1 when all heads want the same), negative where there
                is none.

        Returns:
            int64 [R, Hkv, B], -1 where there is none.
        """
        pages = self.table_of(layer).index_select(0, seats)
        page = pages.gather(1, (entries.clamp(min=0) // self.size).flatten(1)).view_as(entries)
        rows = self.pieces(page, entries) + torch.arange(self.heads, device=page.device)[:, None]
        if self.layers.count > 1:
            rows.mul_(self.layers.count).add_(self.layers.homes[layer][1])
        return rows.masked_fill_(entries < 0, -1)


@dataclass(frozen=True, eq=False)
class Slots(Pages):
    """Slots of offloaded layers: the first `sink` tokens, a ring of the last `recent` ones, and the others."""

    sink: int
    recent: int


@dataclass(frozen=True, eq=False)
class Tiers:
    """Where rows of all layers are.

    Attributes:
        tokens: all tokens of the resident layers, on the device.
        slots: of the offloaded layers, on the device; None where methods use none.
        host: all tokens of the offloaded layers.
        resident: bool [L] on the device; kernels read it, so that a captured graph serves before and after a layer moves.
    """

    tokens: Pages
    slots: Slots | None
    host: Pages
    resident: Tensor


@dataclass(frozen=True, eq=False)
class NewTokens:
    """New tokens of one layer.

    Attributes:
        seats, positions: int64 [T], distinct; a negative position is padding.
        lengths: int64 [T], tokens in context of the token's request once this step is stored.
        key, value: [T, Hkv, D], the key after RoPE; of latents both are the same, and it is stored once.
    """

    seats: Tensor
    positions: Tensor
    lengths: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True, eq=False)
class Copies:
    """Entries that are copied for every KV head that reads their group: the first counts[r, g] of a list.

    Attributes:
        seats: int64 [R].
        source, target: int32 [R, G, N], numbers of entries; the targets are distinct for each request and group.
        counts: int32 [R, G].
    """

    seats: Tensor
    source: Tensor
    target: Tensor
    counts: Tensor

    @classmethod
    def of_all(cls, seats: Tensor, source: Tensor, target: Tensor) -> Copies:
        """Copies of whole lists of entries, integers [R, G, N]."""
        counts = torch.full(source.shape[:2], source.shape[2], dtype=torch.int32, device=source.device)
        return cls(seats, source.int(), target.int(), counts)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.seats, self.source, self.target, self.counts


@dataclass(frozen=True, eq=False)
class Parts:
    """What is copied together: some layers of a piece, in which a KV head reads the same group.

    Attributes:
        layers: int64 [K, W], -1 where a part has fewer.
        heads, groups: int64 [K].
    """

    layers: Tensor
    heads: Tensor
    groups: Tensor

    def __len__(self) -> int:
        return len(self.heads)

    def __getitem__(self, some: slice) -> Parts:
        return Parts(self.layers[some], self.heads[some], self.groups[some])

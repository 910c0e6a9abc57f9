"""What kernels of paged rows are handed: tensors, and the few numbers that say how they lie.

Row numbers of KV are made here, by `Pages`, and in `triton/rows.py` by `row_of`, and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pages:
    """Rows of a pool, and where the entries of each seat lie in them.

    An entry is a token, or a slot. A page holds `size` entries of all KV heads of one layer:

        entry e of a seat, KV head h  ->  row (page * size + e % size) * heads + h, where page = table[layer, seat, e // size]

    Attributes:
        rows: [N, 2, D], K and V.
        table: int64 [L, seats, P]; page 0 stands where there is none. On the device, wherever the rows are.
        size: entries of a page.
        heads: KV heads.
    """

    rows: Tensor
    table: Tensor
    size: int
    heads: int

    def first_rows(self, page: Tensor, entries: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Rows of the first KV heads of entries, or of the chosen ones, that lie in these pages, which are worked on in place."""
        within = entries % self.size * self.heads
        return page.mul_(self.size * self.heads).add_(within if chosen is None else within.index_select(0, chosen))

    def rows_of(self, layer: int, seats: Tensor, entries: Tensor) -> Tensor:
        """Rows of entries in one layer.

        Args:
            seats: int64 [R].
            entries: int64 [R, H, B], numbers for each KV head (H is Hkv, or 1 when all heads want the same), negative where there
                is none.

        Returns:
            int64 [R, Hkv, B], -1 where there is none.
        """
        pages = self.table[layer].index_select(0, seats)
        page = pages.gather(1, (entries.clamp(min=0) // self.size).flatten(1)).view_as(entries)
        rows = self.first_rows(page, entries) + torch.arange(self.heads, device=page.device)[:, None]
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
        key, value: [T, Hkv, D], the key after RoPE.
    """

    seats: Tensor
    positions: Tensor
    lengths: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True, eq=False)
class Copies:
    """Entries that are copied for every KV head that reads their group.

    Attributes:
        seats: int64 [R].
        source, target: int64 [R, G, B], numbers of entries; the targets are distinct for each request and group.
        wanted: bool [R, G, B], which of them are copied.
        head_map: int64 [L, Hkv], the group that a KV head of a layer reads.
    """

    seats: Tensor
    source: Tensor
    target: Tensor
    wanted: Tensor
    head_map: Tensor

"""Which pages of a pool each seat holds in each layer, and the page table that kernels read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from specontext.kv.pool import PagePool


class SeatPages:
    """Pages by (layer, seat), in the order of the tokens or slots that lie in them.

    Attributes:
        table: int64 [L, seats + 1, P] on the device, 0 (the null page) where there is none. The last row belongs to no seat: the
            padding of a batch points at it.
    """

    def __init__(self, pool: PagePool, layers: int, seats: int, width: int, device: torch.device) -> None:
        self.pool = pool
        self.table = torch.zeros((layers, seats + 1, max(width, 1)), dtype=torch.int64, device=device)
        self._held: list[list[list[int]]] = [[[] for _ in range(seats)] for _ in range(layers)]

    def of(self, layer: int, seat: int) -> list[int]:
        """The pages, which are not to be changed."""
        return self._held[layer][seat]

    def lacking(self, layers: Iterable[int], seat: int, count: int) -> int:
        """Pages that `extend` would take."""
        return sum(max(0, count - len(self._held[layer][seat])) for layer in layers)

    def extend(self, layers: Sequence[int], seat: int, count: int) -> None:
        """Give a seat pages until it holds at least `count` in each of the layers.

        Raises:
            OutOfPagesError: fewer are free; nothing is taken.
        """
        pages = self.pool.allocate(self.lacking(layers, seat, count))
        same: dict[int, list[int]] = {}
        for layer in layers:
            same.setdefault(len(self._held[layer][seat]), []).append(layer)
        taken = 0
        for held, members in same.items():
            new = count - held
            if new <= 0:
                continue
            part = pages[taken : taken + new * len(members)]
            taken += len(part)
            for i, layer in enumerate(members):
                self._held[layer][seat] += part[i * new : (i + 1) * new]
            rows = torch.tensor(part, dtype=torch.int64).view(len(members), new).to(self.table.device)
            self.table[_as_index(members), seat, held:count] = rows

    def release(self, layers: Iterable[int], seat: int) -> None:
        """Give back all pages of a seat in these layers."""
        members = [layer for layer in layers if self._held[layer][seat]]
        for layer in members:
            self.pool.pages.free(self._held[layer][seat])
            self._held[layer][seat] = []
        if members:
            self.table[_as_index(members), seat] = 0

    def detach(self, layer: int, seat: int) -> list[int]:
        """Take pages out of a seat without giving them back."""
        pages, self._held[layer][seat] = self._held[layer][seat], []
        self.table[layer, seat] = 0
        return pages

    def attach(self, layer: int, seat: int, pages: list[int]) -> None:
        """Put detached pages into a seat that has none in this layer."""
        assert not self._held[layer][seat]
        self._held[layer][seat] = pages
        self.table[layer, seat, : len(pages)] = torch.tensor(pages, dtype=torch.int64).to(self.table.device)

    def all_held(self) -> list[list[int]]:
        """Every list of pages, for the pool's check."""
        return [pages for layer in self._held for pages in layer]

    def check_integrity(self) -> None:
        """Raises AssertionError when the table says something else than the lists."""
        for layer, seats in enumerate(self._held):
            table = self.table[layer].tolist()
            for seat, pages in enumerate(seats):
                assert table[seat] == pages + [0] * (len(table[seat]) - len(pages)), f"page table of layer {layer}, seat {seat}"
            assert not any(table[-1]), "padding has a page"


def _as_index(layers: list[int]) -> slice | list[int]:
    """Layers as an index: a slice where they follow one another, which needs no tensor on the device."""
    return slice(layers[0], layers[-1] + 1) if layers[-1] - layers[0] + 1 == len(layers) else layers

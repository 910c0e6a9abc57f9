"""What open seats, waiting requests and a moving layer hold, and the page tables of kernels. Only `KVCache` changes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from specontext.kernels.dispatch import upload
from specontext.kv.layout import Reader
from specontext.kv.pool import PagePool
from specontext.kv.prefix_tree import Block
from specontext.kv.streams import PREFETCH, WRITE_BACK
from specontext.memory.tiers import Tier

Lent = dict[int, Block]  # by number of the page, in the order of the tokens


@dataclass(eq=False)
class Seat:
    """An open seat.

    Attributes:
        reader: how its request reads its selections.
        room: tokens that its pages hold.
    """

    reader: Reader
    room: int = 0


@dataclass(frozen=True, eq=False)
class ParkedKV:
    """KV of a request without a seat.

    Attributes:
        tokens: tokens stored.
        pages: host pages of every block of layers.
        reader: how the request reads its selections.
        beside: host pages of what its seat had beside the KV in these blocks; see `SeatCopies`.
        lent: blocks of known prompts that some of these pages are lent from.
    """

    tokens: int
    pages: list[list[int]]
    reader: Reader
    beside: list[int] = field(default_factory=list)
    lent: Lent = field(default_factory=dict)

    @property
    def num_pages(self) -> int:
        return sum(map(len, self.pages)) + len(self.beside)

    def held(self, lendable: frozenset[int]) -> list[list[int]]:
        """The pages that are its own."""
        return [*(own_pages(self.pages[line], line, self.lent, lendable) for line in range(len(self.pages))), self.beside]


@dataclass(eq=False)
class LayerMove:
    """A layer on its way to the other tier.

    Attributes:
        copied: tokens that are in both tiers, or on their way there, by open seat.
        claimed: pages of the other tier that are promised to it and not taken yet, by open seat.
        bytes: rows copied so far.
    """

    layer: int
    to_host: bool
    copied: dict[int, int] = field(default_factory=dict)
    claimed: dict[int, int] = field(default_factory=dict)
    bytes: int = 0

    @property
    def side(self) -> str:
        return WRITE_BACK if self.to_host else PREFETCH

    @property
    def tier(self) -> Tier:
        """Where it goes."""
        return Tier.HOST if self.to_host else Tier.DEVICE


class SeatPages:
    """Pages by (line, seat), in the order of the tokens or slots that lie in them. A line is a layer, or on the host a block.

    Args:
        lendable: lines in which a seat may have pages of known prompts, which are not given back with it.

    Attributes:
        table: int64 [lines, seats + 1, P] on the device, 0 (the null page) where there is none. The last row belongs to no seat:
            the padding of a batch points at it.
    """

    def __init__(
        self, pool: PagePool, lines: int, seats: int, width: int, device: torch.device, lendable: Iterable[int] = ()
    ) -> None:
        self.pool, self.lendable = pool, frozenset(lendable)
        self._lent: list[Lent] = [{} for _ in range(seats)]
        self.table = torch.zeros((lines, seats + 1, max(width, 1)), dtype=torch.int64, device=device)
        self._held: list[list[list[int]]] = [[[] for _ in range(seats)] for _ in range(lines)]

    def of(self, line: int, seat: int) -> list[int]:
        """The pages, which are not to be changed."""
        return self._held[line][seat]

    def lacking(self, wanted: Mapping[int, int], seat: int) -> int:
        """Pages that `extend` would take."""
        return sum(max(0, count - len(self._held[layer][seat])) for layer, count in wanted.items())

    def extend(self, wanted: Mapping[int, int], seat: int) -> None:
        """Give a seat pages until it holds at least as many as are wanted, by layer.

        Raises:
            OutOfPagesError: fewer are free; nothing is taken.
        """
        pages = self.pool.allocate(self.lacking(wanted, seat))
        same: dict[tuple[int, int], list[int]] = {}  # layers by the pages they have and want
        for layer, count in wanted.items():
            same.setdefault((len(self._held[layer][seat]), count), []).append(layer)
        taken = 0
        for (held, count), members in same.items():
            new = count - held
            if new <= 0:
                continue
            part = pages[taken : taken + new * len(members)]
            taken += len(part)
            for i, layer in enumerate(members):
                self._held[layer][seat] += part[i * new : (i + 1) * new]
            rows = upload(part, torch.int64, self.table.device).view(len(members), new)
            self.table[_as_index(members), seat, held:count] = rows

    def extend_line(self, line: int, new: Mapping[int, int], *, claimed: bool = False) -> None:
        """Give some seats so many pages more in one line, by seat, with one list of numbers for the device.

        Args:
            claimed: the pages are of those that were claimed.

        Raises:
            OutOfPagesError, HostMemoryError: they cannot be had; nothing is taken.
        """
        pages = self.pool.allocate(sum(new.values()), claimed=claimed)
        if not pages:
            return
        parts, taken = [], 0
        for seat, count in new.items():
            held = self._held[line][seat]
            parts.append((seat, len(held), len(held) + count))
            held += pages[taken : taken + count]
            taken += count
        seats, places = entries_of(parts, self.table.device)
        rows = upload(pages, torch.int64, self.table.device)
        self.table[line].view(-1).index_copy_(0, seats * self.table.shape[2] + places, rows)

    def release_line(self, line: int) -> None:
        """Give back all pages of all seats in a line, in the same time however many they are."""
        assert line not in self.lendable
        held, self._held[line] = self._held[line], [[] for _ in self._held[line]]
        for pages in held:
            self.pool.pages.give_back(pages)
        if any(held):
            self.table[line].zero_()

    def release(self, layers: Iterable[int], seat: int) -> None:
        """Give back all pages of a seat in these layers."""
        members = [layer for layer in layers if self._held[layer][seat]]
        for layer in members:
            self.pool.pages.free(own_pages(self._held[layer][seat], layer, self._lent[seat], self.lendable))
            self._held[layer][seat] = []
        if members:
            self.table[_as_index(members), seat] = 0

    def release_all(self, seat: int) -> list[Block]:
        """Give back all pages of a seat; the blocks that it has no longer."""
        self.release(range(len(self._held)), seat)
        return list(self.detach_lent(seat).values())

    # Pages of known prompts that a seat reads where they are. It has them in all lines where pages can be lent.

    def borrow(self, seat: int, chain: Sequence[Block]) -> None:
        """The first pages of a seat that has none are those of a chain of blocks, which are lent to it."""
        self.attach_lent(seat, dict(enumerate(chain)))
        for line in self.lendable:
            self.attach(line, seat, [block.pages[line] for block in chain])

    def hand_over(self, seat: int, first: int, blocks: Sequence[Block]) -> None:
        """Pages of a seat, from number `first` on, belong to blocks from now on, and are lent to it."""
        for number, block in enumerate(blocks, start=first):
            assert number not in self._lent[seat]
            self._lent[seat][number] = block

    def has_lent(self, seat: int, chain: Sequence[Block]) -> bool:
        """Whether the first pages of a seat are lent from these blocks."""
        return all(self._lent[seat].get(number) is block for number, block in enumerate(chain))

    def detach_lent(self, seat: int) -> Lent:
        """Which of the pages that are taken out of a seat are lent, and from which blocks."""
        lent, self._lent[seat] = self._lent[seat], {}
        return lent

    def attach_lent(self, seat: int, lent: Lent) -> None:
        assert not self._lent[seat]
        self._lent[seat] = lent

    def detach(self, layer: int, seat: int) -> list[int]:
        """Take pages out of a seat without giving them back."""
        pages, self._held[layer][seat] = self._held[layer][seat], []
        self.table[layer, seat] = 0
        return pages

    def attach(self, layer: int, seat: int, pages: list[int]) -> None:
        """Put detached pages into a seat that has none in this layer."""
        assert not self._held[layer][seat]
        self._held[layer][seat] = pages
        self.table[layer, seat, : len(pages)] = upload(pages, torch.int64, self.table.device)

    def all_held(self) -> list[list[int]]:
        """Every list of pages but for those that are lent, for the pool's check."""
        return [
            own_pages(pages, line, self._lent[seat], self.lendable)
            for line, seats in enumerate(self._held)
            for seat, pages in enumerate(seats)
        ]

    def lent(self) -> Iterable[Block]:
        """The blocks that seats have, each as often as it is lent."""
        return (block for lent in self._lent for block in lent.values())

    def check_integrity(self) -> None:
        """Raises AssertionError when the table says something else than the lists."""
        for layer, seats in enumerate(self._held):
            table = self.table[layer].tolist()
            for seat, pages in enumerate(seats):
                assert table[seat] == pages + [0] * (len(table[seat]) - len(pages)), f"page table of layer {layer}, seat {seat}"
                if layer in self.lendable:
                    lent = self._lent[seat].items()
                    assert all(pages[number] == block.pages[layer] for number, block in lent), "a lent page is another one"
            assert not any(table[-1]), "padding has a page"


def own_pages(pages: list[int], line: int, lent: Lent, lendable: frozenset[int]) -> list[int]:
    """Those pages of a line that are not lent, which is the list itself where none is."""
    if not lent or line not in lendable:
        return pages
    return [page for number, page in enumerate(pages) if number not in lent]


def entries_of(parts: Sequence[tuple[int, int, int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Seats and numbers, int64 [N], of the entries start .. stop - 1 of some seats: one copy to the device, and nothing waits.

    Args:
        parts: seat, start and stop, at least one.
    """
    ends = list(accumulate(stop - start for _, start, stop in parts))
    rows = [(seat, stop - end, end) for (seat, _, stop), end in zip(parts, ends, strict=True)]
    seats, shifts, bounds = upload(list(zip(*rows, strict=True)), torch.int64, device)
    number = torch.arange(ends[-1], device=device)
    part = torch.searchsorted(bounds, number, right=True)
    return seats.index_select(0, part), number + shifts.index_select(0, part)


def _as_index(layers: list[int]) -> slice | list[int]:
    """Layers as an index: a slice where they follow one another, which needs no tensor on the device."""
    return slice(layers[0], layers[-1] + 1) if layers[-1] - layers[0] + 1 == len(layers) else layers

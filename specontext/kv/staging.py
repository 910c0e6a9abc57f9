"""Stored tokens of offloaded layers on their way to a GPU, ahead of the attention that reads them all.

Prompt chunks and dense decoding read everything that a layer has stored. Their rows come through two buffers: while one is
attended to, the other is filled, by the few programs that fill a bus. Where a buffer holds them, the rows of a whole block of
layers come together, as the pieces in which they lie on the host: each is read once, at the bus's speed, while the layers of the
block before compute. Longer contexts come layer by layer and tile by tile, in smaller pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specontext.kernels.rows import copy_pieces
from specontext.kernels.tables import Copies, Pages, Parts, Places
from specontext.kv.dense import tiles_of
from specontext.kv.streams import PREFETCH, Mark
from specontext.kv.transfers import Transfers

ONE_PAGE = 1 << 30  # entries of a buffer's only page: more than it has


@dataclass(frozen=True, eq=False)
class DenseRead:
    """Stored tokens of some requests that a step reads in every layer.

    Attributes:
        seats: int64 [R].
        stop: the tokens 0 .. stop - 1 are read.
        tile: so many of each request at once.
        ends: int64 [R], where requests end before `stop`; None where none does.
    """

    seats: Tensor
    stop: int
    tile: int
    ends: Tensor | None = None

    @property
    def tiles(self) -> list[tuple[int, int]]:
        return tiles_of(self.stop, self.tile)

    @property
    def tokens_at_once(self) -> int:
        return len(self.seats) * min(self.tile, self.stop)

    @property
    def tokens(self) -> int:
        """Of all requests together, as if all were as long."""
        return len(self.seats) * self.stop


@dataclass(frozen=True, eq=False)
class StagedTile:
    """Some tokens of a read in one layer.

    Attributes:
        start, stop: these tokens of each request.
        buffer: rows [N, *row], contiguous.
        tokens: those of K and V [R, T, Hkv, *row] in it, a view. What is behind the end of a request is not there.
    """

    start: int
    stop: int
    buffer: Tensor
    tokens: Tensor

    def rows(self) -> Tensor:
        """Row numbers of the buffer: int64 [R, Hkv, T]."""
        numbers, unit = self.tokens.flatten(3)[..., 0], self.buffer.stride(0)
        first = (self.tokens.storage_offset() - self.buffer.storage_offset()) // unit
        along = (
            torch.arange(count, device=self.buffer.device) * (stride // unit)
            for count, stride in zip(numbers.shape, numbers.stride(), strict=True)
        )
        request, token, head = along
        return first + request[:, None, None] + head[:, None] + token


@dataclass(frozen=True, eq=False)
class _Unit:
    """What is fetched at once: some layers of a block, and of reads the tokens start .. stop - 1 of each request.

    Attributes:
        parts: the layers' rows.
        copies: host entries and where they go in a buffer.
        reads: index among `Staging`'s reads, start, stop and first entry in the buffer of each.
        places: layers side by side in the buffer.
    """

    parts: Parts
    copies: Copies
    table: Tensor
    reads: tuple[tuple[int, int, int, int], ...]
    places: Places


class Staging:
    """Reads of offloaded layers, one unit ahead of the one that is attended to.

    The order in which they are read is known before: layer by layer, and in each of them one read after the other. What is on
    its way is the unit after the last one that was read. A tile that is asked for out of that order is right too: it is fetched
    when it is asked for, and the order goes on behind it.

    Args:
        reads: in the order in which every layer reads them.
        room: bytes that each of the two buffers may have for rows of a whole block; tiles have what they need.
    """

    def __init__(self, transfers: Transfers, reads: Sequence[DenseRead], room: int) -> None:
        self._transfers, self._reads = transfers, [read for read in reads if read.stop]
        self._number = {id(read): number for number, read in enumerate(self._reads)}
        host, resident = transfers.tiers.host, transfers.resident
        layers = [layer for layer in range(len(resident)) if not transfers.in_reach(layer)]
        entry = host.heads * host.rows.stride(0) * host.rows.itemsize  # bytes of a token in one layer
        together = sum(read.tokens for read in self._reads) * host.layers.count
        self._whole = together * entry <= room
        self._units: list[_Unit] = []
        self._place: dict[tuple[int, int, tuple[int, int]], int] = {}  # of a layer, read and tile: number of its unit
        if layers and self._reads:
            self._make_units(layers)
        most = together if self._whole else max((read.tokens_at_once for read in self._reads), default=0)
        self._buffers = [host.rows.new_empty(0)] * 2
        if self._units:
            rows = transfers.tiers.tokens.rows
            self._buffers = [rows.new_empty((most * host.heads, *rows.shape[1:])) for _ in range(2)]
        self._turn = 0
        self._here: tuple[int, Tensor] | None = None  # the unit that is read, and its buffer
        self._coming: tuple[int, Tensor, Mark] | None = None  # the next one, and when it is there
        self._fetch(0)

    def tiles(self, layer: int, read: DenseRead) -> Iterator[StagedTile]:
        """The tiles of a read in an offloaded layer, each valid until the next one is asked for."""
        if not read.stop:
            return
        host, number = self._transfers.tiers.host, self._number[id(read)]
        for bounds in self._bounds(read):
            at = self._place[layer, number, bounds]
            buffer, unit = self._take(at), self._units[at]
            start, stop, first = next(rest for index, *rest in unit.reads if index == number)
            count, place = unit.places.count, unit.places.homes[layer][1]
            entries = buffer.view(-1, host.heads, count, *buffer.shape[1:])
            part = entries[first : first + len(read.seats) * (stop - start), :, place]
            yield StagedTile(start, stop, buffer, part.unflatten(0, (len(read.seats), -1)))

    def _bounds(self, read: DenseRead) -> list[tuple[int, int]]:
        return [(0, read.stop)] if self._whole else read.tiles

    # Units ------------------------------------------------------------------------------------------------------------

    def _make_units(self, layers: Sequence[int]) -> None:
        transfers, blocks = self._transfers, self._transfers.layer_blocks
        host, device = transfers.tiers.host, transfers.tiers.resident.device
        nought = torch.zeros_like(host.layers.lines)
        if self._whole:
            copies, table = self._copies([(number, 0, read.stop) for number, read in enumerate(self._reads)])
            firsts = [sum(read.tokens for read in self._reads[:number]) for number in range(len(self._reads))]
            reads = tuple((number, 0, read.stop, firsts[number]) for number, read in enumerate(self._reads))
            homes = tuple((0, place) for _, place in host.layers.homes)
            places = Places(homes, nought, host.layers.places, host.layers.count)
            for block in blocks.of(layers):
                for layer in blocks.members[block]:
                    self._place |= {(layer, number, (0, read.stop)): len(self._units) for number, read in enumerate(self._reads)}
                self._units.append(_Unit(transfers.by_block.of(block), copies, table, reads, places))
            return
        places = Places(((0, 0),) * len(transfers.resident), nought, torch.zeros_like(nought, device=device), 1)
        tiles = [(number, *bounds) for number, read in enumerate(self._reads) for bounds in read.tiles]
        copied = [self._copies([tile]) for tile in tiles]
        for layer in layers:
            for (number, start, stop), (copies, table) in zip(tiles, copied, strict=True):
                self._place[layer, number, (start, stop)] = len(self._units)
                unit = _Unit(transfers.by_layer.of(layer), copies, table, ((number, start, stop, 0),), places)
                self._units.append(unit)

    def _copies(self, tiles: Sequence[tuple[int, int, int]]) -> tuple[Copies, Tensor]:
        """Tokens start .. stop - 1 of each request of some reads, one behind the other in a buffer; and all their host pages."""
        host, device = self._transfers.tiers.host, self._transfers.tiers.resident.device
        seats = torch.cat([self._reads[number].seats for number, _, _ in tiles])
        starts, counts, lengths = [], [], []
        for number, start, stop in tiles:
            read = self._reads[number]
            ends = read.ends if read.ends is not None else torch.full_like(read.seats, stop)
            starts.append(torch.full_like(read.seats, start))
            lengths.append(torch.full_like(read.seats, stop - start))
            counts.append((ends - start).clamp(min=0, max=stop - start))
        start_of, length_of = torch.cat(starts)[:, None], torch.cat(lengths)
        first_of = (length_of.cumsum(0) - length_of)[:, None]
        along = torch.arange(max(stop - start for _, start, stop in tiles), device=device)
        source, target = ((first + along)[:, None].int() for first in (start_of, first_of))
        numbers = torch.arange(len(seats), device=device)
        copies = Copies(numbers, source, target, torch.cat(counts)[:, None].int())
        return copies, host.table.index_select(1, seats)

    # On their way -----------------------------------------------------------------------------------------------------

    def _take(self, at: int) -> Tensor:
        if self._here is not None and self._here[0] == at:
            return self._here[1]
        if self._coming is None or self._coming[0] != at:
            self._fetch(at)
        assert self._coming is not None
        _, buffer, mark = self._coming
        self._transfers.after(mark)
        self._here = at, buffer
        self._fetch(at + 1)
        return buffer

    def _fetch(self, at: int) -> None:
        if at >= len(self._units):
            self._coming = None
            return
        unit, buffer, transfers = self._units[at], self._buffers[self._turn], self._transfers
        host = transfers.tiers.host
        here = Pages(buffer, unit.table.new_zeros((1, unit.table.shape[1], 1)), ONE_PAGE, host.heads, unit.places)
        # Compute has been given all that reads this buffer's last unit.
        with transfers.beside(PREFETCH, unit.table, here.table, buffer, *unit.copies.tensors):
            there = replace(host, table=unit.table)
            copy_pieces(there, here, unit.parts, transfers.tiers.resident, unit.copies, programs=transfers.programs)
        self._coming = at, buffer, transfers.mark(PREFETCH)
        self._turn = 1 - self._turn

"""Stored tokens of offloaded layers on their way to a GPU, ahead of the attention that reads them all.

Prompt chunks and dense decoding read everything that a layer has stored, tile by tile. Tiles come through two buffers: while one
is attended to, the other is filled by a few programs, across the bounds of layers. Tiles of prompts are long, so that up to tens
of thousands of tokens all rows of a layer are on their way while the layer before computes. Consecutive tokens of one layer come
at the bus's full speed, although its rows lie in pieces with those of its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specontext.kernels.rows import copy_pieces
from specontext.kernels.spans import read_rows, room_for
from specontext.kernels.tables import Copies, Pages, Places, is_quantised
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


@dataclass(frozen=True, eq=False)
class StagedTile:
    """Some tokens of a read in one layer, which are the first rows of a buffer, as [R, T, Hkv].

    Attributes:
        start, stop: these tokens of each request.
        buffer: a pool. What is behind the end of a request is not there.
        shape: R, T and Hkv.
    """

    start: int
    stop: int
    buffer: Tensor
    shape: tuple[int, int, int]

    @property
    def tokens(self) -> Tensor:
        """The rows [R, T, Hkv, *row]; in 8 bits a copy, each by itself."""
        if is_quantised(self.buffer):
            return read_rows(self.buffer, self.rows().transpose(1, 2))
        return self.buffer[: math.prod(self.shape)].view(*self.shape, *self.buffer.shape[1:])

    def rows(self) -> Tensor:
        """Their numbers in `buffer`: int64 [R, Hkv, T]."""
        return torch.arange(math.prod(self.shape), device=self.buffer.device).view(self.shape).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class _Copied:
    """A tile of a read, the same for all layers: its entries on the host and in a buffer, and the host pages of its requests."""

    copies: Copies
    table: Tensor


class Staging:
    """Tiles of offloaded layers, one ahead of the one that is attended to.

    The order in which they are read is known before: layer by layer, and in each of them one read after the other. What is on
    its way is the tile after the last one that was read. A tile that is asked for out of that order is right too: it is fetched
    when it is asked for, and the order goes on behind it.

    Args:
        reads: in the order in which every layer reads them.
        read_order: the layers one after another; by default each once.
    """

    def __init__(self, transfers: Transfers, reads: Sequence[DenseRead], read_order: Sequence[int] | None = None) -> None:
        self._transfers = transfers
        order = range(len(transfers.resident)) if read_order is None else read_order
        layers = [layer for layer in order if not transfers.in_reach(layer)]
        self._order = [(layer, read, bounds) for layer in layers for read in reads for bounds in read.tiles]
        self._places: dict[tuple[int, int, tuple[int, int]], list[int]] = {}
        for at, (layer, read, bounds) in enumerate(self._order):
            self._places.setdefault((layer, id(read), bounds), []).append(at)
        host, device = transfers.tiers.host, transfers.tiers.resident.device
        most = max((read.tokens_at_once for read in reads), default=0) * host.heads
        # Of the host's numbers or codes: who reads them dequantises.
        self._buffers = [room_for(host.rows, most, host.size * host.heads, device) for _ in range(2)] if self._order else []
        self._copied: dict[tuple[int, tuple[int, int]], _Copied] = {}
        # Every layer lies in a buffer by itself.
        nought = torch.zeros_like(host.layers.lines)
        self._alone = Places(((0, 0),) * len(transfers.resident), nought, nought, 1)
        self._turn = 0
        self._coming: tuple[int, Tensor, Mark] | None = None  # place, buffer, and when it is filled
        self._fetch(0)

    def tiles(self, layer: int, read: DenseRead) -> Iterator[StagedTile]:
        """The tiles of a read in an offloaded layer, each valid until the next one is asked for."""
        heads, requests = self._transfers.tiers.host.heads, len(read.seats)
        for start, stop in read.tiles:
            buffer = self._take(self._places[layer, id(read), (start, stop)])
            yield StagedTile(start, stop, buffer, (requests, stop - start, heads))

    def _take(self, places: Sequence[int]) -> Tensor:
        """The buffer of a tile that stands at these places of the order: the next of them, where there is one."""
        coming = self._coming[0] if self._coming is not None else len(self._order)
        at = next((place for place in places if place >= coming), places[-1])
        if self._coming is None or self._coming[0] != at:
            self._fetch(at)
        assert self._coming is not None
        _, buffer, mark = self._coming
        self._transfers.after(mark)
        self._fetch(at + 1)
        return buffer

    def _fetch(self, at: int) -> None:
        if at >= len(self._order):
            self._coming = None
            return
        layer, read, bounds = self._order[at]
        tile, buffer, transfers = self._tile(read, *bounds), self._buffers[self._turn], self._transfers
        host = replace(transfers.tiers.host, table=tile.table)
        here = Pages(buffer, torch.zeros_like(tile.table[:1, :, :1]), ONE_PAGE, host.heads, self._alone)
        parts, resident = transfers.by_layer.of(layer), transfers.tiers.resident
        # Compute has been given all that reads this buffer's last tile.
        with transfers.beside(PREFETCH, buffer, here.table, host.table, *tile.copies.tensors):
            copy_pieces(host, here, parts, resident, tile.copies, programs=transfers.programs)
        self._coming = at, buffer, transfers.mark(PREFETCH)
        self._turn = 1 - self._turn

    def _tile(self, read: DenseRead, start: int, stop: int) -> _Copied:
        key = id(read), (start, stop)
        if key not in self._copied:
            seats, count = read.seats, stop - start
            request = torch.arange(len(seats), device=seats.device)
            along = torch.arange(count, dtype=torch.int32, device=seats.device)
            source = (start + along).expand(len(seats), 1, count)
            target = (request.int() * count)[:, None, None] + along
            ends = torch.full_like(seats, stop) if read.ends is None else read.ends
            counts = (ends - start).clamp(min=0, max=count).int()[:, None]
            copies = Copies(request, source.contiguous(), target, counts)
            self._copied[key] = _Copied(copies, self._transfers.tiers.host.table.index_select(1, seats))
        return self._copied[key]

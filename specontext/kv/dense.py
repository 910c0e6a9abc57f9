"""Dense reading of the tokens that a layer has stored: prompt chunks and dense decoding read them all, tile by tile.

Rows of an offloaded layer are read where they lie on a CPU. For a GPU they are streamed into one of two staging tiles while
the other is attended to, across the bounds of layers: the first tile of a layer is on its way while the layer before computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specontext.kernels.paged_attention import tile_buffer, tokens_of_pages
from specontext.kernels.rows import gather_rows
from specontext.kv.streams import PREFETCH, Mark
from specontext.kv.transfers import Transfers


def tiles_of(stop: int, tile: int) -> list[tuple[int, int]]:
    """Bounds of tiles of `tile` tokens, the last one perhaps shorter."""
    return [(start, min(start + tile, stop)) for start in range(0, stop, tile)]


def stored_tiles(transfers: Transfers, layer: int, seat: int, stop: int, tile: int) -> Iterator[Tensor]:
    """K and V of the tokens 0 .. stop - 1 of a request, in tiles [T, Hkv, 2, D], T at most `tile`, where they are in reach.

    A tile is a view of the pool or of a buffer that the next tile overwrites.
    """
    if not stop:
        return
    assert transfers.in_reach(layer)
    home = transfers.home(layer)
    pages, rows = home.table_of(layer)[seat, : -(-stop // home.size)], home.by_page(layer)
    buffer = tile_buffer(rows, min(tile, stop))
    for bounds in tiles_of(stop, tile):
        yield tokens_of_pages(rows, pages, *bounds, buffer=buffer)


def read_tile(transfers: Transfers, layer: int, seats: Tensor, start: int, stop: int, ends: Tensor) -> tuple[Tensor, Tensor]:
    """A buffer [N, 2, D] that attention can read, and rows [R, Hkv, T] in it of the tokens start .. stop - 1 of some requests.

    Args:
        ends: int64 [R], tokens of the requests; -1 stands beyond them.
    """
    tokens = torch.arange(start, stop, device=seats.device)[None]
    return read_tokens(transfers, layer, seats, torch.where(tokens < ends[:, None], tokens, -1)[:, None])


def read_tokens(transfers: Transfers, layer: int, seats: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The same of any tokens int64 [R, Hkv, B], -1 for none."""
    home = transfers.home(layer)
    rows = home.rows_of(layer, seats, tokens)
    if transfers.in_reach(layer):
        return home.rows, rows
    staging = transfers.tiers.tokens.rows.new_empty((rows.numel(), *home.rows.shape[1:]))
    place = torch.arange(rows.numel(), device=rows.device).view_as(rows)
    gather_rows(home.rows, rows, staging, place)
    return staging, torch.where(rows >= 0, place, -1)


@dataclass(frozen=True, eq=False)
class DenseRead:
    """Stored tokens of some requests that a step reads in every layer.

    Rows of a tile come as [R, T, Hkv], in the order in which they lie: a bus reads faster what lies close together.

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


class Staging:
    """Tiles of offloaded layers on their way to a GPU, one ahead of the one that is read.

    The order in which they are read is known before: layer by layer, and in each of them one read after the other. What is on
    its way is the tile after the last one that was read. A tile that is asked for out of that order is right too: it is fetched
    when it is asked for, and the order goes on behind it.

    Args:
        reads: in the order in which every layer reads them.
    """

    def __init__(self, transfers: Transfers, reads: Sequence[DenseRead]) -> None:
        self._transfers = transfers
        layers = [layer for layer in range(len(transfers.resident)) if not transfers.in_reach(layer)]
        self._order = [(layer, read, bounds) for layer in layers for read in reads for bounds in read.tiles]
        self._place = {(layer, id(read), bounds): at for at, (layer, read, bounds) in enumerate(self._order)}
        rows = transfers.tiers.tokens.rows
        most = max((read.tokens_at_once for read in reads), default=0) * transfers.tiers.host.heads
        self._buffers = [rows.new_empty((most, *rows.shape[1:])) for _ in range(2)] if self._order else []
        self._turn = 0
        self._coming: tuple[int, Tensor, Mark] | None = None  # place, rows, and when they are there
        self._fetch(0)

    def tiles(self, layer: int, read: DenseRead) -> Iterator[tuple[int, int, Tensor]]:
        """Bounds and rows [N, 2, D] of the tiles of a read in an offloaded layer, valid until the next tile is asked for."""
        for bounds in read.tiles:
            yield *bounds, self._take(self._place[layer, id(read), bounds])

    def _take(self, at: int) -> Tensor:
        if self._coming is None or self._coming[0] != at:
            self._fetch(at)
        assert self._coming is not None
        _, rows, mark = self._coming
        self._transfers.after(mark)
        self._fetch(at + 1)
        return rows

    def _fetch(self, at: int) -> None:
        if at >= len(self._order):
            self._coming = None
            return
        layer, read, (start, stop) = self._order[at]
        wanted = self._rows(layer, read, start, stop)
        place, buffer = torch.arange(wanted.numel(), device=wanted.device), self._buffers[self._turn]
        # Compute has been given all that reads this buffer's last tile.
        with self._transfers.beside(PREFETCH, wanted, place, buffer):
            gather_rows(self._transfers.tiers.host.rows, wanted, buffer, place)
        self._coming = at, buffer[: wanted.numel()], self._transfers.mark(PREFETCH)
        self._turn = 1 - self._turn

    def _rows(self, layer: int, read: DenseRead, start: int, stop: int) -> Tensor:
        """Host rows of a tile; -1 leaves a place as it is."""
        tokens = torch.arange(start, stop, device=read.seats.device)[None]
        if read.ends is None:
            tokens = tokens.expand(len(read.seats), -1)
        else:
            tokens = torch.where(tokens < read.ends[:, None], tokens, -1)
        rows = self._transfers.tiers.host.rows_of(layer, read.seats, tokens[:, None])
        return rows.transpose(1, 2).reshape(-1)

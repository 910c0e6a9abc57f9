"""A layer on its way to the other tier, in chunks between steps, while decoding goes on (paper, section on adaptive memory).

    start     pages in the other tier for all that is stored
    advance   some rows more, however many tokens came meanwhile
    finish    the last rows; a leaving layer's slots are filled from its own pages by the current slot table; then the flag is
              turned between two steps, and the pages it leaves are given back

New tokens go where the layer lives until the flag is turned: rows are copied in the order of their tokens, so what came
meanwhile is copied last. Nothing that attention reads moves.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from specontext.kernels.rows import gather_rows
from specontext.kv.seat_pages import SeatPages
from specontext.kv.slot_fill import fill_slots
from specontext.kv.streams import COMPUTE, PREFETCH, WRITE_BACK
from specontext.kv.tiered import TieredKV
from specontext.memory.pages import OutOfPagesError


def prepare(kv: TieredKV) -> None:
    """Compile what a GPU runs when layers move, with a row that is skipped, so that no step waits for the compiler."""
    if kv.streams.asynchronous:
        nothing = torch.full((1,), -1, device=kv.device)
        gather_rows(kv.arena.rows, nothing, kv.host.rows, nothing)


class LayerMove:
    """One layer's move; only one is under way at a time.

    Attributes:
        bytes_moved: rows copied so far, in bytes.

    Raises:
        OutOfPagesError: the other tier has too little room; nothing has changed.
    """

    def __init__(self, kv: TieredKV, layer: int, *, to_host: bool) -> None:
        assert kv.moving is None and kv.resident[layer] == to_host
        self.kv, self.layer, self.to_host = kv, layer, to_host
        self.bytes_moved = 0
        self._pages = kv.host_pages if to_host else kv.token_pages
        try:
            for seat, room in kv.room.items():
                self._pages.extend([layer], seat, kv.pages_for(room))
        except BaseException:
            self._give_back(self._pages)
            raise
        kv.moving, kv.moved = layer, {}

    def remaining_bytes(self, stored: Mapping[int, int]) -> int:
        """Bytes that are not copied yet.

        Args:
            stored: tokens stored by seat, of all open seats.
        """
        token_bytes = self.kv.shape.kv_heads * self.kv.shape.row_bytes
        return sum(tokens - self.kv.moved.get(seat, 0) for seat, tokens in stored.items()) * token_bytes

    def advance(self, stored: Mapping[int, int], max_bytes: int) -> int:
        """Copy up to `max_bytes` (and at least a token) more; the bytes copied, 0 when all is there."""
        kv = self.kv
        token_bytes = kv.shape.kv_heads * kv.shape.row_bytes
        room, moved = max(1, max_bytes // token_bytes), 0
        for seat in kv.room:
            start = kv.moved.get(seat, 0)
            stop = min(stored[seat], start + room - moved)
            if stop > start:
                self._copy(seat, start, stop)
                kv.moved[seat] = stop
                moved += stop - start
        self.bytes_moved += moved * token_bytes
        return moved * token_bytes

    @property
    def room_after(self) -> int:
        """Free device pages once the layer has arrived; negative where the slots of the next layer to leave find too few."""
        kv = self.kv
        if not self.to_host:
            return kv.arena.pages.num_free
        others = any(here for layer, here in enumerate(kv.resident) if layer != self.layer)
        slots = kv.pages_for(kv.slot_count) * len(kv.room) if kv.adaptive and others else 0
        left = sum(len(kv.token_pages.of(self.layer, seat)) for seat in kv.room)
        return kv.arena.pages.num_free + left - slots

    def finish(self, stored: Mapping[int, int]) -> None:
        """Copy what is left and turn the flag; between two steps.

        Raises:
            OutOfPagesError: there is no room for the slots of the next layer to leave; the move goes on.
        """
        if self.room_after < 0:
            raise OutOfPagesError(f"the {self.kv.arena.pages.name} has too few pages for the slots of one layer more")
        while self.advance(stored, 1 << 62):
            pass
        kv, layer = self.kv, self.layer
        side = WRITE_BACK if self.to_host else PREFETCH
        kv.streams.wait(COMPUTE, kv.streams.record(side))
        kv.join_copies()  # they read the pages that are given back
        if self.to_host:
            fill_slots(kv, layer, {seat: stored[seat] for seat in kv.room}, from_host=False)
        kv.resident[layer] = not self.to_host
        kv.resident_flags[layer] = not self.to_host
        kv.moving = None
        self._give_back(kv.token_pages if self.to_host else kv.host_pages)
        for seat in kv.room:
            kv.reserve_slots(seat)

    def cancel(self) -> None:
        """Stay where it was."""
        side = WRITE_BACK if self.to_host else PREFETCH
        self.kv.streams.wait(COMPUTE, self.kv.streams.record(side))
        self.kv.moving = None
        self._give_back(self._pages)

    def _give_back(self, pages: SeatPages) -> None:
        for seat in self.kv.room:
            pages.release([self.layer], seat)

    def _copy(self, seat: int, start: int, stop: int) -> None:
        """Rows of the tokens start .. stop - 1 of a seat, beside what is computed."""
        kv, streams = self.kv, self.kv.streams
        tokens = torch.arange(start, stop, device=kv.device)[None, None]
        here = kv.arena.rows_of(kv.token_pages.table[self.layer, seat][None], tokens)
        there = kv.host.rows_of(kv.host_pages.table[self.layer, seat][None], tokens)
        side = WRITE_BACK if self.to_host else PREFETCH
        streams.wait(side, streams.record(COMPUTE))
        with streams.on(side):
            if self.to_host:
                gather_rows(kv.arena.rows, here, kv.host.rows, there)
            else:
                gather_rows(kv.host.rows, there, kv.arena.rows, here)
        streams.keep(side, here, there)

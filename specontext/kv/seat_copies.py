"""What a seat has stored, copied between tiers: all of it when its request waits or comes back, slots when layers leave or find
stored tokens. Tables are read here and never written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from specontext.kernels.dispatch import upload
from specontext.kv.copying import copy_pages, fill_slots
from specontext.kv.hot_slots import HotSlots
from specontext.kv.pool import PagePool
from specontext.kv.rings import Rings
from specontext.kv.seats import Seat
from specontext.kv.states import SeatStates
from specontext.kv.streams import PREFETCH, WRITE_BACK
from specontext.kv.transfers import Transfers


class SeatCopies:
    """Copies of what seats hold; what is computed next finds them there.

    A waiting request has host pages of its own *beside* those of its KV: first for the rings of layers with a window, then for
    what layers keep instead of KV.

    Args:
        seats: those that are open.
        hot: what the slots hold; None where no layer can need one.
    """

    def __init__(
        self,
        transfers: Transfers,
        seats: Mapping[int, Seat],
        hot: HotSlots | None,
        host: PagePool,
        rings: Rings | None,
        states: SeatStates | None,
    ) -> None:
        self._transfers, self._seats, self._hot = transfers, seats, hot
        self._page_bytes, self._device = host.page_bytes, transfers.tiers.resident.device
        self._rings, self._states = rings, states

    def pages_beside(self, tokens: int) -> int:
        """Pages of the host beside those of a seat's KV, of so many tokens."""
        return self._ring_pages(tokens) + (0 if self._states is None else self._states.pages_of_seat(self._page_bytes))

    def copy(self, seat: int, tokens: int, beside: Sequence[int], *, to_host: bool) -> None:
        """Copy all that a seat has on the device to its pages of the host, and those beside them, or back.

        Args:
            tokens: tokens stored.
            beside: as many pages as `pages_beside` says.
        """
        rings, rows = self._ring_pages(tokens), tokens > 0 and any(self._transfers.resident)
        if self._rings is not None and tokens:
            width = min(tokens, self._rings.entries)
            self._rings.copy(self._transfers, seat, [0], width, self._table(beside[:rings]), to_host=to_host)
        if self._states is not None:
            copy = self._states.store if to_host else self._states.load
            copy(self._transfers, seat, self._table(beside[rings:]))
        if rows:
            self._copy_rows(seat, tokens, to_host=to_host)
        if rows or beside:
            self._transfers.join(WRITE_BACK if to_host else PREFETCH)

    def _ring_pages(self, tokens: int) -> int:
        """Pages of the host that hold the ring of a seat with so many tokens."""
        return 0 if self._rings is None else self._rings.pages_of(min(tokens, self._rings.entries), self._page_bytes)

    def _table(self, pages: Sequence[int]) -> Tensor:
        """int64 [pages, 1] on the device."""
        return torch.tensor(pages, dtype=torch.int64)[:, None].to(self._device)

    def _copy_rows(self, seat: int, tokens: int, *, to_host: bool) -> None:
        """All rows of a seat in its resident layers, on their way from one tier to the other."""
        tiers, pages = self._transfers.tiers, -(-tokens // self._transfers.tiers.tokens.size)
        here, there = (
            replace(home, table=home.table[:, seat : seat + 1, :pages].contiguous()) for home in (tiers.tokens, tiers.host)
        )
        source, target = (here, there) if to_host else (there, here)
        side = WRITE_BACK if to_host else PREFETCH
        copy_pages(self._transfers, source, target, tokens, skipped=~tiers.resident, side=side)

    def fill_slots(self, layer: int, stored: Mapping[int, int], *, from_host: bool) -> None:
        """Copy sinks, recent tokens and hot entries of seats, with so many tokens stored, into a layer's slots."""
        if self._hot is None:
            return
        for reader in {id(self._seats[seat].reader): self._seats[seat].reader for seat in stored}.values():
            alike = {seat: tokens for seat, tokens in stored.items() if self._seats[seat].reader is reader}
            seats, lengths = upload([list(alike), list(alike.values())], torch.int64, self._device)
            tokens = self._hot.tokens_of(reader.table(layer), seats, lengths)
            fill_slots(self._transfers, layer, seats, tokens, reader, from_host=from_host)

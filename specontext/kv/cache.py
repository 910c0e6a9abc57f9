"""The owner of KV over two tiers: device arena and host pool.

A resident layer keeps pages of all its tokens in the arena. An offloaded layer keeps them in the host pool, which is the
truth, and in the arena only slots: sinks, a ring of the recent tokens, and hot slots that cache host rows. Attention reads
arena rows by index in both cases; only the index differs, and where a layer lives is a flag that kernels read. So a layer can
move between two steps, and a captured graph serves before and after.

Pages of a seat:

                       token pages (arena)    slot pages (arena)    in the host pages of its block
    resident layer     its tokens             -                     -
      next to leave    its tokens             reserved              -
    leaving            its tokens             reserved              filling up
    offloaded layer    -                      its slots             its tokens
    returning          filling up             its slots             its tokens

On the host neighbouring layers lie side by side (`Layout.blocks`): a seat has pages of a block as soon as one of its layers is
there or on its way, and they have room for all of them.

`KVCache` alone writes page tables, slot tables and the flags, and asserts this table wherever it changes what a seat holds.
`Transfers`, which it has, moves the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from specontext.core import Selection
from specontext.kernels.tables import Slots, Tiers
from specontext.kv.block_state import State
from specontext.kv.blocks import Blocks
from specontext.kv.copying import copy_pages, copy_tokens, fill_slots, prepare_moves
from specontext.kv.hot_slots import HotSlots, SlotSizes
from specontext.kv.layout import Reader, Reading
from specontext.kv.pool import PagePool
from specontext.kv.prefix_tree import Block, Tokens
from specontext.kv.seats import LayerMove, ParkedKV, Seat, SeatPages
from specontext.kv.streams import PREFETCH, WRITE_BACK, streams_of
from specontext.kv.transfers import Transfers
from specontext.memory.tiers import Tier


class KVCache:
    """Pages, slots and residency of all layers.

    Where something takes pages, it returns the tier that has too few, and has changed nothing then; None where it is done.

    Args:
        arena, host: the pools of both tiers; other things may hold pages of the arena, too.
        resident: for every layer whether its KV is on the device at first.
        reader: how requests read their selections, unless they are opened with another way.
        slots: device slots for each KV head of an offloaded layer; None when all methods stream offloaded layers instead.
        adaptive: layers may move: slot space for the next one to leave is always reserved.
        write_through: new rows are on the host within the step, for those who look at all of them; see `Transfers`.
        state: numbers that are kept of each page of known prompts, and of its last token.

    Attributes:
        resident: for every layer whether its KV is on the device.
        transfers: what moves rows.
        hot: what the slots hold; None where no layer can need one.
        seats: those that are open.
        move: the layer that is on its way.
        parked: requests without a seat.
        blocks: pages of prompts that are known.
    """

    def __init__(
        self,
        arena: PagePool,
        host: PagePool,
        *,
        resident: Sequence[bool],
        reader: Reader,
        slots: SlotSizes | None,
        seats: int,
        max_tokens: int,
        adaptive: bool = False,
        verify_loads: bool = False,
        write_through: bool = False,
        state: tuple[int, int] = (0, 0),
    ) -> None:
        layout, device = arena.layout, arena.rows.device
        assert len(layout.full) == len(layout.layers) == len(resident), "layers of other kinds than full ones have no owner yet"
        self.layout, self.page_size, self.device = layout, layout.page_size, device
        self.arena, self.host, self.reader, self.adaptive = arena, host, reader, adaptive
        self.num_seats = seats
        self._resident, self._flags = list(resident), torch.tensor(list(resident), device=device)
        width = layout.pages_of(max_tokens)
        self._slot_pages = layout.pages_of(slots.count) if slots is not None else 0
        self._tokens = SeatPages(arena, len(resident), seats, width, device)
        self._slots = SeatPages(arena, len(resident), seats, self._slot_pages, device)
        self._on_host = SeatPages(host, len(layout.blocks.sizes), seats, width, device)
        self.hot: HotSlots | None = None
        if slots is not None and (adaptive or not all(resident)):
            self.hot = HotSlots(slots, seats=seats + 1, max_tokens=max_tokens, device=device)
        of_slots = None
        if self.hot is not None:
            of_slots = Slots(
                arena.rows, self._slots.table, self.page_size, layout.heads, arena.places, self.hot.sink, self.hot.recent
            )
        self.transfers = Transfers(
            Tiers(arena.paged(self._tokens.table), of_slots, host.paged(self._on_host.table), self._flags),
            layout.blocks,
            self._resident,
            streams_of(device),
            adaptive=adaptive,
            write_through=write_through or (slots is not None and slots.tables > 1),
            verify=verify_loads,
        )
        self.seats: dict[int, Seat] = {}
        self.move: LayerMove | None = None
        self.parked: list[ParkedKV] = []
        self.blocks = Blocks(self.transfers, host, state)
        if adaptive:
            prepare_moves(self.transfers)

    # Where layers live ------------------------------------------------------------------------------------------------

    @property
    def resident(self) -> tuple[bool, ...]:
        return tuple(self._resident)

    @property
    def offloaded(self) -> list[int]:
        """Layers whose KV lives on the host."""
        return [layer for layer, here in enumerate(self._resident) if not here]

    @property
    def next_to_leave(self) -> int | None:
        """The last resident layer."""
        return max((layer for layer, here in enumerate(self._resident) if here), default=None)

    def _has(self, layer: int, tier: Tier) -> bool:
        """Whether seats have pages of their tokens in a tier: where the layer lives, and where it is going."""
        return self._resident[layer] == (tier is Tier.DEVICE) or (self.move is not None and self.move.layer == layer)

    def _layers_in(self, tier: Tier) -> list[int]:
        return [layer for layer in range(len(self._resident)) if self._has(layer, tier)]

    @property
    def _slotted(self) -> list[int]:
        """Layers in which seats have slots: the offloaded ones, and the next to leave where layers may move."""
        last = self.next_to_leave if self.adaptive else None
        return sorted([*self.offloaded, *([last] if last is not None else [])]) if self._slot_pages else []

    def host_pages_for(self, tokens: int) -> int:
        """Host pages of a seat with so many tokens."""
        return sum(self._host_pages(self._layers_in(Tier.HOST), tokens).values())

    def _pages(self, layers: Iterable[int], tokens: int) -> dict[int, int]:
        """Device pages of tokens, by layer."""
        return {layer: self.layout.pages_for(layer, tokens) for layer in layers}

    def _host_pages(self, layers: Sequence[int], tokens: int) -> dict[int, int]:
        """Host pages of tokens in the blocks of some layers, by block."""
        return dict.fromkeys(self.layout.blocks.of(layers), self.layout.pages_of(tokens))

    # Seats ------------------------------------------------------------------------------------------------------------

    def open(self, seat: int, tokens: int, reader: Reader | None = None) -> Tier | None:
        """Give a seat its slots, and pages for the first `tokens` tokens in every layer."""
        assert seat not in self.seats, f"seat {seat} is taken"
        slots = dict.fromkeys(self._slotted, self._slot_pages)
        short = self._take(seat, tokens, slots)
        if short is None:
            self.seats[seat] = Seat(reader or self.reader, self.layout.pages_of(tokens) * self.page_size)
            if self.hot is not None:
                self.hot.reset(seat)
            self._assert_pages(seat)
        return short

    def grow(self, seat: int, tokens: int) -> Tier | None:
        """Make room for `tokens` tokens of an open seat."""
        if tokens <= self.seats[seat].room:
            return None
        short = self._take(seat, tokens)
        if short is None:
            self.seats[seat].room = self.layout.pages_of(tokens) * self.page_size
            self._assert_pages(seat)
        return short

    def _take(self, seat: int, tokens: int, slots: Mapping[int, int] | None = None) -> Tier | None:
        """Pages of tokens in both tiers, and of slots; raises HostMemoryError where the host's memory is refused."""
        slots = slots or {}
        device = self._pages(self._layers_in(Tier.DEVICE), tokens)
        host = self._host_pages(self._layers_in(Tier.HOST), tokens)
        if self._tokens.lacking(device, seat) + self._slots.lacking(slots, seat) > self.arena.pages.num_free:
            return Tier.DEVICE
        if self._on_host.lacking(host, seat) > self.host.pages.num_free:
            return Tier.HOST
        self._on_host.extend(host, seat)  # first: its memory may be refused
        self._slots.extend(slots, seat)
        self._tokens.extend(device, seat)
        return None

    def close(self, seat: int) -> None:
        """Give back everything a seat holds."""
        for pages in (self._tokens, self._slots, self._on_host):
            pages.release_all(seat)
        self.transfers.join_copies()
        if self.move is not None and self.move.copied.pop(seat, None) is not None:
            self.transfers.join(PREFETCH, WRITE_BACK)  # rows may be on their way to pages that others get next
        del self.seats[seat]

    # The step ---------------------------------------------------------------------------------------------------------

    def read(self, seats: Tensor, selection: Selection, layer: int | None = None, reader: Reader | None = None) -> Reading:
        """Plan a selection's loads and start them, for every offloaded layer, or for the one that selected.

        Args:
            seats: int64 [R].
            reader: how these requests read it; by default the one that all have which say nothing else.
        """
        reader, plan = reader or self.reader, None
        needed = self.transfers.planned if layer is None else not self._resident[layer]
        if self.hot is not None and needed:
            selection, plan = self.hot.plan(layer or 0, seats, selection)
        reading = Reading(seats, selection, reader, plan)
        if plan is not None:
            self.transfers.load(reading, layer)
        return reading

    # Waiting ----------------------------------------------------------------------------------------------------------

    def park(self, seat: int, tokens: int) -> ParkedKV | None:
        """Take a seat's KV to the host and leave the seat; None where the host has too little room, and nothing has changed."""
        whole = self._host_pages(range(len(self._resident)), tokens)
        if self._on_host.lacking(whole, seat) > self.host.pages.num_free:
            return None
        self._on_host.extend(whole, seat)
        self._copy_seat(seat, tokens, to_host=True)
        held = [self._on_host.detach(block, seat) for block in whole]
        for block, count in whole.items():  # room for tokens that never came
            self.host.pages.free(held[block][count:])
        parked = ParkedKV(tokens, [held[block][:count] for block, count in whole.items()], self.seats[seat].reader)
        self.parked.append(parked)
        self.close(seat)
        return parked

    def unpark(self, seat: int, parked: ParkedKV) -> Tier | None:
        """Give parked KV a seat: resident layers get their pages back, and the slots of offloaded ones start empty."""
        on_device = self._pages(self._layers_in(Tier.DEVICE), parked.tokens)
        slots = dict.fromkeys(self._slotted, self._slot_pages)
        if sum(on_device.values()) + sum(slots.values()) > self.arena.pages.num_free:
            return Tier.DEVICE
        assert self.open(seat, 0, parked.reader) is None
        self._tokens.extend(on_device, seat)
        for block, pages in enumerate(parked.pages):
            self._on_host.attach(block, seat, pages)
        self.parked = [other for other in self.parked if other is not parked]
        self.seats[seat].room = self.layout.pages_of(parked.tokens) * self.page_size
        self._copy_seat(seat, parked.tokens, to_host=False)
        self._leave_host(seat)
        for layer in self.offloaded:
            self._fill_slots(layer, {seat: parked.tokens}, from_host=True)
        self._assert_pages(seat)
        return None

    def discard(self, parked: ParkedKV) -> None:
        """Give back what parked KV holds."""
        for pages in parked.pages:
            self.host.pages.free(pages)
        self.parked = [other for other in self.parked if other is not parked]

    def _copy_seat(self, seat: int, tokens: int, *, to_host: bool) -> None:
        """All rows of a seat in its resident layers, from one tier to the other; what is computed next finds them there."""
        if not any(self._resident) or not tokens:
            return
        part, side = slice(0, self.layout.pages_of(tokens)), WRITE_BACK if to_host else PREFETCH
        here = self.arena.paged(self._tokens.table[:, seat : seat + 1, part].contiguous())
        there = self.host.paged(self._on_host.table[:, seat : seat + 1, part].contiguous())
        source, target = (here, there) if to_host else (there, here)
        copy_pages(self.transfers, source, target, tokens, skipped=~self._flags, side=side)
        self.transfers.join(side)

    def _fill_slots(self, layer: int, stored: Mapping[int, int], *, from_host: bool) -> None:
        """Copy sinks, recent tokens and hot entries of seats, with so many tokens stored, into a layer's slots."""
        if self.hot is None:
            return
        for reader in {id(self.seats[seat].reader): self.seats[seat].reader for seat in stored}.values():
            alike = {seat: tokens for seat, tokens in stored.items() if self.seats[seat].reader is reader}
            seats, lengths = (torch.tensor(list(numbers), device=self.device) for numbers in (alike, alike.values()))
            tokens = self.hot.tokens_of(reader.table(layer), seats, lengths)
            fill_slots(self.transfers, layer, seats, tokens, reader, from_host=from_host)

    # Moving -----------------------------------------------------------------------------------------------------------

    # A layer moves in chunks between steps, while decoding goes on. Rows are copied in the order of their tokens. New tokens go
    # where the layer lives until its flag is turned, so what came meanwhile is copied last. Nothing that attention reads moves.

    def begin_move(self, layer: int, *, to_host: bool) -> bool:
        """Take pages in the other tier for all that is stored; False where it has too few, and nothing has changed."""
        assert self.move is None and self._resident[layer] == to_host
        pages, pages_of = (self._on_host, self._host_pages) if to_host else (self._tokens, self._pages)
        wanted = {seat: pages_of([layer], one.room) for seat, one in self.seats.items()}
        if sum(pages.lacking(count, seat) for seat, count in wanted.items()) > pages.pool.pages.num_free:
            return False
        try:
            for seat, count in wanted.items():
                pages.extend(count, seat)
        except BaseException:  # the host's memory was refused
            self._leave_tier(layer, to_host)
            raise
        self.move = LayerMove(layer, to_host)
        self._assert_pages(*self.seats)
        return True

    def remaining_bytes(self, stored: Mapping[int, int]) -> int:
        """Bytes of the moving layer that are not copied yet.

        Args:
            stored: tokens stored by seat, of all open seats.
        """
        move = self._moving
        return sum(tokens - move.copied.get(seat, 0) for seat, tokens in stored.items()) * self._entry_bytes(move.layer)

    def advance_move(self, stored: Mapping[int, int], max_bytes: int) -> int:
        """Copy up to `max_bytes` (and at least a token) more; the bytes copied, 0 when all is there."""
        move = self._moving
        entry = self._entry_bytes(move.layer)
        left, before = max(1, max_bytes // entry), move.bytes
        for seat in self.seats:
            start = move.copied.get(seat, 0)
            stop = min(stored[seat], start + left)
            if stop > start:
                copy_tokens(self.transfers, move.layer, seat, start, stop, to_host=move.to_host)
                move.copied[seat] = stop
                move.bytes += (stop - start) * entry
                left -= stop - start
        return move.bytes - before

    @property
    def room_after_move(self) -> int:
        """Free device pages once the layer has arrived; negative where the slots of the next layer to leave find too few."""
        move, free = self._moving, self.arena.pages.num_free
        if not move.to_host:
            return free
        others = any(here for layer, here in enumerate(self._resident) if layer != move.layer)
        slots = self._slot_pages * len(self.seats) if self.adaptive and others else 0
        return free + sum(len(self._tokens.of(move.layer, seat)) for seat in self.seats) - slots

    def finish_move(self, stored: Mapping[int, int]) -> bool:
        """Copy what is left and turn the flag, between two steps; a leaving layer's slots are filled from its own pages.

        False where there is no room for the slots of the next layer to leave; the move goes on.
        """
        if self.room_after_move < 0:
            return False
        while self.advance_move(stored, 1 << 62):
            pass
        move = self._moving
        self.transfers.join(move.side)
        self.transfers.join_copies()  # they read the pages that are given back
        if move.to_host:
            self._fill_slots(move.layer, {seat: stored[seat] for seat in self.seats}, from_host=False)
        self._resident[move.layer] = not move.to_host
        self._flags[move.layer] = not move.to_host
        self.move = None
        self._leave_tier(move.layer, not move.to_host)
        slotted = dict.fromkeys(self._slotted, self._slot_pages)
        for seat in self.seats:
            self._slots.extend(slotted, seat)
            self._slots.release(set(range(len(self._resident))) - set(slotted), seat)
        self._assert_pages(*self.seats)
        return True

    def cancel_move(self) -> None:
        """The layer stays where it was."""
        move = self._moving
        self.transfers.join(move.side)
        self.move = None
        self._leave_tier(move.layer, move.to_host)
        self._assert_pages(*self.seats)

    @property
    def _moving(self) -> LayerMove:
        assert self.move is not None, "no layer is moving"
        return self.move

    def _entry_bytes(self, layer: int) -> int:
        return self.layout.layers[layer].entry_bytes

    def _leave_tier(self, layer: int, host: bool) -> None:
        """A layer that does not live in a tier any more gives back what only it had there."""
        for seat in self.seats:
            if host:
                self._leave_host(seat)
            else:
                self._tokens.release([layer], seat)

    def _leave_host(self, seat: int) -> None:
        """Give back the host pages of a seat in blocks of which no layer is there."""
        away = set(self.layout.blocks.of(self._layers_in(Tier.HOST)))
        self._on_host.release(set(range(len(self.layout.blocks.sizes))) - away, seat)

    # Known prompts ----------------------------------------------------------------------------------------------------

    def keep(self, chain: list[Block], pages: Sequence[Tokens], seat: int, state: State) -> None:
        """Keep the next pages of a seat behind a chain of blocks; see `Blocks.keep`."""
        self.blocks.keep(chain, pages, seat, state)

    def bring(self, chain: Sequence[Block], seat: int) -> State:
        """Put the rows of a chain into an open seat that has nothing stored yet; what is computed next finds them there.

        Returns:
            The state of its tokens.
        """
        state = self.blocks.bring(chain, seat)
        for layer in self.offloaded:
            self._fill_slots(layer, {seat: len(chain) * self.page_size}, from_host=True)
        return state

    # Accounts ---------------------------------------------------------------------------------------------------------

    def _assert_pages(self, *seats: int) -> None:
        """What seats hold in each layer is what the table at the top of this file says."""
        slotted, away = self._slotted, self._layers_in(Tier.HOST)
        for seat in seats:
            room = self.seats[seat].room
            for layer in range(len(self._resident)):
                on_device = self.layout.pages_for(layer, room) if self._has(layer, Tier.DEVICE) else 0
                slots = self._slot_pages if layer in slotted else 0
                assert len(self._tokens.of(layer, seat)) == on_device, f"token pages of layer {layer}"
                assert len(self._slots.of(layer, seat)) == slots, f"slot pages of layer {layer}"
            on_host = self._host_pages(away, room)
            for block in range(len(self.layout.blocks.sizes)):
                assert len(self._on_host.of(block, seat)) == on_host.get(block, 0), f"host pages of block {block}"

    def check_integrity(self, others: Sequence[list[int]] = ()) -> None:
        """Raises AssertionError when a page is lost or held twice, or tables contradict each other or what layers need.

        Args:
            others: pages of the arena that others hold.
        """
        self.arena.pages.check_integrity([*self._tokens.all_held(), *self._slots.all_held(), *others])
        self.host.pages.check_integrity(self._on_host.all_held() + [pages for parked in self.parked for pages in parked.pages])
        self._assert_pages(*self.seats)
        for pages in (self._tokens, self._slots, self._on_host):
            pages.check_integrity()
        assert self._flags.tolist() == self._resident
        if self.hot is not None:
            self.hot.check_integrity()

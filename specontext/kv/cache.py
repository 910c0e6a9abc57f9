"""The owner of KV over two tiers: device arena and host pool.

A resident layer keeps pages of all its tokens in the arena. An offloaded layer keeps them in the host pool, which is the
truth, and in the arena only slots: sinks, a ring of the recent tokens, and hot slots that cache host rows. Attention reads
arena rows by index in both cases; only the index differs, and where a layer lives is a flag that kernels read. So a layer can
move between two steps, and a captured graph serves before and after.

`KVCache` alone writes page tables and flags, which stand in its `Holdings`, and slot tables. What seats hold is asserted
wherever it changes. `Transfers`, which it has, moves the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from specontext.core import Selection
from specontext.kernels.dispatch import upload
from specontext.kernels.tables import Tiers
from specontext.kv.block_state import State
from specontext.kv.blocks import Blocks
from specontext.kv.copying import copy_pages, copy_tokens, fill_slots, prepare_moves
from specontext.kv.holdings import Holdings
from specontext.kv.hot_slots import HotSlots, SlotSizes
from specontext.kv.layout import PlacedSelection, Reader
from specontext.kv.pool import PagePool
from specontext.kv.prefix_tree import Block, Tokens
from specontext.kv.rings import Rings
from specontext.kv.seats import LayerMove, ParkedKV, Seat
from specontext.kv.states import SeatStates
from specontext.kv.streams import PREFETCH, WRITE_BACK, streams_of
from specontext.kv.transfers import Transfers
from specontext.layer_sizes import repeated
from specontext.memory.tiers import Tier

UNBOUNDED = 1 << 62  # bytes


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
        rings: KV of layers with a window, which take no part in anything else here; None where there are none.
        states: what layers keep instead of KV, likewise.
        read_order: the layers as a step reads them one after another, some perhaps more than once; by default each once.

    Attributes:
        resident: for every layer whether its KV is on the device.
        transfers: what moves rows.
        hot: what the slots hold; None where no layer can need one.
        seats: those that are open.
        move: the layer that is on its way.
        parked: requests without a seat.
        read_again: layers that are read more than once.
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
        rings: Rings | None = None,
        states: SeatStates | None = None,
        read_order: Sequence[int] | None = None,
    ) -> None:
        layout, device = arena.layout, arena.rows.device
        assert len(layout.full) == len(layout.layers) == len(resident), "layers with a window lie in rings"
        self.layout, self.page_size, self.device = layout, layout.page_size, device
        self.arena, self.host, self.reader, self.adaptive = arena, host, reader, adaptive
        self.num_seats, self.rings, self.states = seats, rings, states
        self.read_order = tuple(range(len(resident)) if read_order is None else read_order)
        self.read_again = repeated(self.read_order)
        slot_pages = layout.pages_of(slots.count) if slots is not None else 0
        sizes = {"slot_pages": slot_pages, "seats": seats, "width": layout.pages_of(max_tokens)}
        self._held = held = Holdings(arena, host, resident, **sizes, adaptive=adaptive)
        self.seats, self.hot, of_slots = held.seats, None, None
        if slots is not None and (adaptive or not all(resident)):
            self.hot = HotSlots(slots, seats=seats + 1, max_tokens=max_tokens, device=device)
            of_slots = arena.slots(held.slots.table, slots.sink, slots.recent)
        self.transfers = Transfers(
            Tiers(arena.paged(held.tokens.table), of_slots, host.paged(held.on_host.table), held.flags),
            layout.layer_blocks,
            held.resident,
            streams_of(device),
            adaptive=adaptive,
            write_through=write_through or (slots is not None and slots.tables > 1),
            verify=verify_loads,
        )
        self.parked: list[ParkedKV] = []
        self.blocks = Blocks(self.transfers, host, state, rings, states)
        if adaptive:
            prepare_moves(self.transfers)

    # Where layers live ------------------------------------------------------------------------------------------------

    @property
    def resident(self) -> tuple[bool, ...]:
        return tuple(self._held.resident)

    @property
    def offloaded(self) -> list[int]:
        """Layers whose KV lives on the host."""
        return self._held.offloaded

    @property
    def next_to_leave(self) -> int | None:
        """The last resident layer."""
        return self._held.next_to_leave

    @property
    def next_block_to_return(self) -> list[int]:
        """Layers of the first block on the host: its pages are given back when all of them are on the device."""
        first = min(self.offloaded, default=None)
        if first is None:
            return []
        members = self.layout.layer_blocks.members[self.layout.layer_blocks.home[first][0]]
        return [layer for layer in members if not self._held.resident[layer]]

    def fits_on_device(self, layers: int) -> bool:
        """Whether the device has room for the tokens of all seats in so many layers more."""
        layer = sum(self.layout.pages_of(one.room) for one in self.seats.values())
        return layers * layer <= self.arena.pages.num_free

    @property
    def move(self) -> LayerMove | None:
        return self._held.move

    def host_pages_for(self, tokens: int) -> int:
        """Host pages of a seat with so many tokens."""
        return sum(self._held.host_pages(self._held.layers_in(Tier.HOST), tokens).values())

    # Seats ------------------------------------------------------------------------------------------------------------

    def open(self, seat: int, tokens: int, reader: Reader | None = None) -> Tier | None:
        """Give a seat its slots, and pages for the first `tokens` tokens in every layer."""
        assert seat not in self.seats, f"seat {seat} is taken"
        short = self._held.take(seat, tokens, slots=True)
        if short is None:
            self.seats[seat] = Seat(reader or self.reader, self._held.room_of(tokens))
            if self.hot is not None:
                self.hot.reset(seat)
            if self.states is not None:
                self.states.reset(seat)
            self._held.assert_pages(seat)
        return short

    def grow(self, seat: int, tokens: int) -> Tier | None:
        """Make room for `tokens` tokens of an open seat."""
        if tokens <= self.seats[seat].room:
            return None
        short = self._held.take(seat, tokens)
        if short is None:
            self.seats[seat].room = self._held.room_of(tokens)
            self._held.assert_pages(seat)
        return short

    def close(self, seat: int) -> None:
        """Give back everything a seat holds."""
        self._held.unclaim(seat)
        for pages in (self._held.tokens, self._held.slots, self._held.on_host):
            pages.release_all(seat)
        self.transfers.join_copies()
        if self.move is not None and self.move.copied.pop(seat, None) is not None:
            self.transfers.join(PREFETCH, WRITE_BACK)  # rows may be on their way to pages that others get next
        del self.seats[seat]

    # The step ---------------------------------------------------------------------------------------------------------

    def read(
        self, seats: Tensor, selection: Selection, layer: int | None = None, reader: Reader | None = None
    ) -> PlacedSelection:
        """Plan a selection's loads and start them, for every offloaded layer, or for the one that selected.

        Args:
            seats: int64 [R].
            reader: how these requests read it; by default the one that all have which say nothing else.
        """
        reader, plan = reader or self.reader, None
        needed = self.transfers.planned if layer is None else not self._held.resident[layer]
        if self.hot is not None and needed:
            selection, plan = self.hot.plan(layer or 0, seats, selection)
        reading = PlacedSelection(seats, selection, reader, plan)
        if plan is not None:
            self.transfers.load(reading, layer)
        return reading

    # Waiting ----------------------------------------------------------------------------------------------------------

    def park(self, seat: int, tokens: int) -> ParkedKV | None:
        """Take a seat's KV to the host and leave the seat; None where the host has too little room, and nothing has changed."""
        if not self.can_park(seat, tokens):
            return None
        on_host, whole = self._held.on_host, self._held.host_pages(self._held.layers, tokens)
        with self._held.free_of_claims(seat):
            rings, states = self.host.allocate(self._ring_pages(tokens)), []
            try:
                states = self.host.allocate(self._state_pages)
                on_host.extend(whole, seat)
            except BaseException:  # the host's memory was refused
                self.host.pages.free(rings)
                self.host.pages.free(states)
                raise
        self._copy_states(seat, states, to_host=True)
        self._copy_ring(seat, tokens, rings, to_host=True)
        self._copy_seat(seat, tokens, to_host=True)
        held = [on_host.detach(block, seat) for block in whole]
        for block, count in whole.items():  # room for tokens that never came
            self.host.pages.free(held[block][count:])
        parked = ParkedKV(tokens, [held[block][:count] for block, count in whole.items()], self.seats[seat].reader, rings, states)
        self.parked.append(parked)
        self.close(seat)
        return parked

    def can_park(self, seat: int, tokens: int) -> bool:
        """Whether the host has room for all KV of a seat, and rows of every layer's kind."""
        if self.transfers.converts and any(self._held.resident):
            return False  # rows of layers on the device would come back in 8 bits
        on_host, whole = self._held.on_host, self._held.host_pages(self._held.layers, tokens)
        free = self.host.pages.num_free + self._held.claimed_on_host(seat)
        return on_host.lacking(whole, seat) + self._ring_pages(tokens) + self._state_pages <= free

    def unpark(self, seat: int, parked: ParkedKV) -> Tier | None:
        """Give parked KV a seat: resident layers get their pages back, and the slots of offloaded ones start empty."""
        held = self._held
        on_device = held.pages(held.layers_in(Tier.DEVICE), parked.tokens)
        if sum(on_device.values()) + sum(held.slotted().values()) > self.arena.pages.num_free:
            return Tier.DEVICE
        assert self.open(seat, 0, parked.reader) is None
        held.tokens.extend(on_device, seat)
        for block, pages in enumerate(parked.pages):
            held.on_host.attach(block, seat, pages)
        self.parked = [other for other in self.parked if other is not parked]
        self._copy_ring(seat, parked.tokens, parked.rings, to_host=False)
        self.host.pages.free(parked.rings)
        self._copy_states(seat, parked.states, to_host=False)
        self.host.pages.free(parked.states)
        self.seats[seat].room = held.room_of(parked.tokens)
        self._copy_seat(seat, parked.tokens, to_host=False)
        held.leave_host(seat)
        for layer in self.offloaded:
            self._fill_slots(layer, {seat: parked.tokens}, from_host=True)
        held.assert_pages(seat)
        return None

    def discard(self, parked: ParkedKV) -> None:
        """Give back what parked KV holds."""
        for pages in parked.held:
            self.host.pages.free(pages)
        self.parked = [other for other in self.parked if other is not parked]

    def _ring_pages(self, tokens: int) -> int:
        """Pages of the host that hold the ring of a seat with so many tokens."""
        return 0 if self.rings is None else self.rings.pages_of(min(tokens, self.rings.entries), self.host.page_bytes)

    def _copy_ring(self, seat: int, tokens: int, pages: list[int], *, to_host: bool) -> None:
        """A seat's ring, from one tier to the other; what is computed next finds it there."""
        if self.rings is None or not tokens:
            return
        table, width = torch.tensor(pages, dtype=torch.int64)[:, None].to(self.device), min(tokens, self.rings.entries)
        self.rings.copy(self.transfers, seat, [0], width, table, to_host=to_host)
        self.transfers.join(WRITE_BACK if to_host else PREFETCH)

    @property
    def _state_pages(self) -> int:
        """Pages of the host that hold what layers of a seat keep instead of KV."""
        return 0 if self.states is None else self.states.pages_of_seat(self.host.page_bytes)

    def _copy_states(self, seat: int, pages: list[int], *, to_host: bool) -> None:
        """A seat's states, from one tier to the other; what is computed next finds them there."""
        if self.states is None:
            return
        table = torch.tensor(pages, dtype=torch.int64)[:, None].to(self.device)
        (self.states.store if to_host else self.states.load)(self.transfers, seat, table)
        self.transfers.join(WRITE_BACK if to_host else PREFETCH)

    def _copy_seat(self, seat: int, tokens: int, *, to_host: bool) -> None:
        """All rows of a seat in its resident layers, from one tier to the other; what is computed next finds them there."""
        if not any(self._held.resident) or not tokens:
            return
        part, side = slice(0, self.layout.pages_of(tokens)), WRITE_BACK if to_host else PREFETCH
        here = self.arena.paged(self._held.tokens.table[:, seat : seat + 1, part].contiguous())
        there = self.host.paged(self._held.on_host.table[:, seat : seat + 1, part].contiguous())
        source, target = (here, there) if to_host else (there, here)
        copy_pages(self.transfers, source, target, tokens, skipped=~self._held.flags, side=side)
        self.transfers.join(side)

    def _fill_slots(self, layer: int, stored: Mapping[int, int], *, from_host: bool) -> None:
        """Copy sinks, recent tokens and hot entries of seats, with so many tokens stored, into a layer's slots."""
        if self.hot is None:
            return
        for reader in {id(self.seats[seat].reader): self.seats[seat].reader for seat in stored}.values():
            alike = {seat: tokens for seat, tokens in stored.items() if self.seats[seat].reader is reader}
            seats, lengths = upload([list(alike), list(alike.values())], torch.int64, self.device)
            tokens = self.hot.tokens_of(reader.table(layer), seats, lengths)
            fill_slots(self.transfers, layer, seats, tokens, reader, from_host=from_host)

    # Moving -----------------------------------------------------------------------------------------------------------

    # A layer moves in portions between steps, while decoding goes on. Pages are claimed at first, and taken with the rows that
    # need them, in the order of the tokens. New tokens go where the layer lives until its flag is turned, so what came meanwhile
    # is copied last. Nothing that attention reads moves. So what one step pays for a move does not grow with what is moved: a
    # portion's pages and rows, a fixed number of operations on the device, and a little for each seat.

    def begin_move(self, layer: int, *, to_host: bool) -> bool:
        """Claim pages in the other tier for all that is stored; False where it has too few, and nothing has changed."""
        if not self._held.begin(layer, to_host=to_host):
            return False
        self._held.assert_pages(*self.seats, layers=[layer])
        return True

    def remaining_bytes(self, stored: Mapping[int, int]) -> int:
        """Bytes of the moving layer that are not copied yet.

        Args:
            stored: tokens stored by seat, of all open seats.
        """
        move = self._moving
        return sum(tokens - move.copied.get(seat, 0) for seat, tokens in stored.items()) * self._entry_bytes(move.layer)

    def move_is_copied(self, stored: Mapping[int, int]) -> bool:
        """Whether the moving layer has all its pages, and all its rows are on their way."""
        return not self._moving.claimed and not self.remaining_bytes(stored)

    def advance_move(self, stored: Mapping[int, int], max_bytes: int, *, patient: bool = False) -> int:
        """Copy up to `max_bytes` (and at least a token) more, and take the pages for them; the bytes copied, 0 when all is there.

        Args:
            patient: no more than can be had without waiting for the host's memory, which is made ready meanwhile.

        Raises:
            HostMemoryError: the host's memory is refused; nothing has changed.
        """
        move, held = self._moving, self._held
        entry = self._entry_bytes(move.layer)
        left = max(1, max_bytes // entry)
        spare = sum(move.claimed.values())  # pages that may be taken
        spare = min(spare, held.target_pages(left) + len(self.seats))
        spare = held.target[0].pool.at_once(spare) if patient else spare
        parts, new = [], {}
        for seat in self.seats:
            start = move.copied.get(seat, 0)
            stop, claimed = min(stored[seat], start + left), move.claimed.get(seat, 0)
            if stop <= start and not claimed:
                continue
            there = held.target_pages(self.seats[seat].room) - claimed
            # Room for tokens that are still to come, too, once those that there are have theirs.
            wanted = held.target_pages(self.seats[seat].room if stop == stored[seat] else stop)
            count = max(0, min(wanted - there, claimed, spare))
            stop = min(stop, (there + count) * self.page_size)
            spare -= count
            if count:
                new[seat] = count
            if stop > start:
                parts.append((seat, start, stop))
                left -= stop - start
        held.take_claimed(new)
        if parts:
            copy_tokens(self.transfers, move.layer, parts, to_host=move.to_host)
            for seat, _, stop in parts:
                move.copied[seat] = stop
        copied = sum(stop - start for _, start, stop in parts) * entry
        move.bytes += copied
        return copied

    @property
    def room_after_move(self) -> int:
        """Free device pages once the layer has arrived; negative where the slots of the next layer to leave find too few."""
        move, free, held = self._moving, self.arena.pages.num_free, self._held
        if not move.to_host:
            return free
        others = any(held.resident[layer] for layer in held.layers if layer != move.layer)
        slots = held.slot_pages * len(self.seats) if self.adaptive and others else 0
        return free + sum(len(held.tokens.of(move.layer, seat)) for seat in self.seats) - slots

    def finish_move(self, stored: Mapping[int, int]) -> bool:
        """Copy what is left and turn the flag, between two steps; a leaving layer's slots are filled from its own pages.

        False where there is no room for the slots of the next layer to leave; the move goes on.
        """
        if self.room_after_move < 0:
            return False
        self.advance_move(stored, UNBOUNDED)
        move = self._moving
        self.transfers.join(move.side)
        self.transfers.join_copies()  # they read the pages that are given back
        if move.to_host:
            self._fill_slots(move.layer, {seat: stored[seat] for seat in self.seats}, from_host=False)
        self._held.turn(move.layer)
        self._held.assert_pages(*self.seats, layers=range(max(0, move.layer - 1), min(move.layer + 2, len(self.resident))))
        return True

    def cancel_move(self) -> None:
        """The layer stays where it was."""
        move = self._moving
        self.transfers.join(move.side)
        self._held.stay()
        self._held.assert_pages(*self.seats, layers=[move.layer])

    @property
    def _moving(self) -> LayerMove:
        assert self._held.move is not None, "no layer is moving"
        return self._held.move

    def _entry_bytes(self, layer: int) -> int:
        return self.layout.layers[layer].entry_bytes

    # Known prompts ----------------------------------------------------------------------------------------------------

    def keep(self, chain: list[Block], pages: Sequence[Tokens], seat: int, state: State, stored: int) -> None:
        """Keep the next pages of a seat behind a chain of blocks; see `Blocks.keep`."""
        self.blocks.keep(chain, pages, seat, state, stored)

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

    def check_integrity(self, others: Sequence[list[int]] = ()) -> None:
        """Raises AssertionError when a page is lost or held twice, or tables contradict each other or what layers need.

        Args:
            others: pages of the arena that others hold.
        """
        self._held.check_integrity(others, [pages for parked in self.parked for pages in parked.held])
        if self.hot is not None:
            self.hot.check_integrity()

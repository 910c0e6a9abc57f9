"""The owner of KV over two tiers: device arena and host pool.

A resident layer keeps pages of all its tokens in the arena. An offloaded layer keeps them in the host pool, which is the
truth, and in the arena only slots: sinks, a ring of the recent tokens, and hot slots that cache host rows. Attention reads
arena rows by index in both cases; only the index differs, and where a layer lives is a flag that kernels read. So a layer can
move between two steps, and a captured graph serves before and after.

`KVCache` alone writes page tables and flags, which stand in its `Holdings`, and slot tables. What seats hold is asserted
wherever it changes. `Transfers`, which it has, moves the rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from specontext.core import Selection
from specontext.kernels.tables import Tiers
from specontext.kv.block_state import State
from specontext.kv.blocks import Blocks
from specontext.kv.copying import copy_tokens, prepare_moves
from specontext.kv.holdings import Holdings
from specontext.kv.hot_slots import HotSlots, SlotSizes
from specontext.kv.layout import PlacedSelection, Reader
from specontext.kv.pool import PagePool
from specontext.kv.portions import next_portion
from specontext.kv.prefix_tree import Block, Tokens
from specontext.kv.rings import Rings
from specontext.kv.seat_copies import SeatCopies
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
        self._copies = SeatCopies(self.transfers, self.seats, self.hot, host, rings, states)
        self.parked: list[ParkedKV] = []
        self.blocks = Blocks(self.transfers, host, held.on_host, state, rings, states)
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

    def host_pages_for(self, tokens: int, known: int = 0) -> int:
        """Host pages of a seat with so many tokens, but for those that `known` blocks lend it."""
        pages = sum(self._held.host_pages(self._held.layers_in(Tier.HOST), tokens).values())
        return pages - known * len(self._held.on_host.lendable)

    # Seats ------------------------------------------------------------------------------------------------------------

    def open(self, seat: int, tokens: int, reader: Reader | None = None, known: Sequence[Block] = ()) -> Tier | None:
        """Give a seat its slots, and pages for the first `tokens` tokens in every layer.

        Args:
            known: the blocks that `bring` is to put into it, which lend it what it can read where it is.
        """
        assert seat not in self.seats, f"seat {seat} is taken"
        assert len(known) * self.page_size <= tokens
        lent = known if self._held.on_host.lendable else ()
        short = self._held.take(seat, tokens, slots=True, known=lent)
        if short is None:
            self.blocks.tree.lend(lent)
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
            self._take_back(pages.release_all(seat))
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
        beside = self._held.take_to_park(seat, tokens, self._copies.pages_beside(tokens))
        self._copies.copy(seat, tokens, beside, to_host=True)
        lent = self._held.on_host.detach_lent(seat)
        parked = ParkedKV(tokens, self._held.detach(seat, tokens), self.seats[seat].reader, beside, lent)
        self.parked.append(parked)
        self.close(seat)
        return parked

    def can_park(self, seat: int, tokens: int) -> bool:
        """Whether the host has room for all KV of a seat, and rows of every layer's kind."""
        if self.transfers.converts and any(self._held.resident):
            return False  # rows of layers on the device would come back in 8 bits
        return self._held.can_park(seat, tokens, self._copies.pages_beside(tokens))

    def unpark(self, seat: int, parked: ParkedKV) -> Tier | None:
        """Give parked KV a seat: resident layers get their pages back, and the slots of offloaded ones start empty."""
        held = self._held
        if not held.can_return(parked.tokens):
            return Tier.DEVICE
        assert self.open(seat, 0, parked.reader) is None
        held.attach(seat, parked)
        self.parked = [other for other in self.parked if other is not parked]
        self._copies.copy(seat, parked.tokens, parked.beside, to_host=False)
        self.host.pages.free(parked.beside)
        held.leave_host(seat)
        for layer in self.offloaded:
            self._copies.fill_slots(layer, {seat: parked.tokens}, from_host=True)
        held.assert_pages(seat)
        return None

    def discard(self, parked: ParkedKV) -> None:
        """Give back what parked KV holds."""
        for pages in parked.held(self._held.on_host.lendable):
            self.host.pages.free(pages)
        self._take_back(parked.lent.values())
        self.parked = [other for other in self.parked if other is not parked]

    def _take_back(self, blocks: Iterable[Block]) -> None:
        """A request has lent blocks no longer."""
        self.host.pages.free(self.blocks.tree.take_back(blocks))

    # Moving -----------------------------------------------------------------------------------------------------------

    # A layer moves in portions between steps, while decoding goes on. Pages are claimed at first, and taken with the rows that
    # need them, in the order of the tokens. New tokens go where the layer lives until its flag is turned, so what came meanwhile
    # is copied last. Nothing that attention reads moves. So what one step pays for a move does not grow with what is moved: a
    # portion's pages and rows, a fixed number of operations on the device, and a little for each seat.

    def begin_move(self, layer: int, *, to_host: bool) -> bool:
        """Claim pages in the other tier for all that is stored; False where it has too few, and nothing has changed."""
        assert self.adaptive, "layers stay where they are"
        if not self._held.begin(layer, to_host=to_host):
            return False
        self._held.assert_pages(*self.seats, layers=[layer])
        return True

    def remaining_bytes(self, stored: Mapping[int, int]) -> int:
        """Bytes of the moving layer that are not copied yet.

        Args:
            stored: tokens stored by seat, of all open seats.
        """
        move = self._held.moving
        return sum(tokens - move.copied.get(seat, 0) for seat, tokens in stored.items()) * self._entry_bytes(move.layer)

    def move_is_copied(self, stored: Mapping[int, int]) -> bool:
        """Whether the moving layer has all its pages, and all its rows are on their way."""
        return not self._held.moving.claimed and not self.remaining_bytes(stored)

    def advance_move(self, stored: Mapping[int, int], max_bytes: int, *, patient: bool = False) -> int:
        """Copy up to `max_bytes` (and at least a token) more, and take the pages for them; the bytes copied, 0 when all is there.

        Args:
            patient: no more than can be had without waiting for the host's memory, which is made ready meanwhile.

        Raises:
            HostMemoryError: the host's memory is refused; nothing has changed.
        """
        move, held = self._held.moving, self._held
        entry = self._entry_bytes(move.layer)
        most = max(1, max_bytes // entry)
        spare = min(sum(move.claimed.values()), held.target_pages(most) + len(self.seats))  # pages that may be taken
        spare = held.target[0].pool.at_once(spare) if patient else spare
        portion = next_portion(held, stored, most, spare)
        held.take_claimed(portion.pages)
        if portion.parts:
            copy_tokens(self.transfers, move.layer, portion.parts, to_host=move.to_host)
            move.copied.update((seat, stop) for seat, _, stop in portion.parts)
        copied = portion.tokens * entry
        move.bytes += copied
        return copied

    @property
    def room_after_move(self) -> int:
        """Free device pages once the layer has arrived; negative where the slots of the next layer to leave find too few."""
        move, free, held = self._held.moving, self.arena.pages.num_free, self._held
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
        move = self._held.moving
        self.transfers.join(move.side)
        self.transfers.join_copies()  # they read the pages that are given back
        if move.to_host:
            self._copies.fill_slots(move.layer, {seat: stored[seat] for seat in self.seats}, from_host=False)
        self._held.turn(move.layer)
        self._held.assert_pages(*self.seats, layers=range(max(0, move.layer - 1), min(move.layer + 2, len(self.resident))))
        return True

    def cancel_move(self) -> None:
        """The layer stays where it was."""
        move = self._held.moving
        self.transfers.join(move.side)
        self._held.stay()
        self._held.assert_pages(*self.seats, layers=[move.layer])

    def _entry_bytes(self, layer: int) -> int:
        return self.layout.layers[layer].entry_bytes

    # Known prompts ----------------------------------------------------------------------------------------------------

    def keep(self, chain: list[Block], pages: Sequence[Tokens], seat: int, state: State, stored: int) -> None:
        """Keep the next pages of a seat behind a chain of blocks; see `Blocks.keep`."""
        self.blocks.keep(chain, pages, seat, state, stored)

    def expect_blocks(self, growing: Mapping[int, tuple[int, int]]) -> None:
        """Have host memory made ready for prompts that are computed from now on, and for their blocks; see `Blocks.expect`.

        Args:
            growing: by seat the tokens of its prompt, and its pages that will be kept.
        """
        layers = self._held.layers_in(Tier.HOST)
        of_seats = sum(
            self._held.on_host.lacking(self._held.host_pages(layers, tokens), seat) for seat, (tokens, _) in growing.items()
        )
        self.blocks.expect(sum(pages for _, pages in growing.values()), of_seats)

    def bring(self, chain: Sequence[Block], seat: int) -> State:
        """Put the rows of a chain into a seat that was opened for it; what is computed next finds them there.

        Returns:
            The state of its tokens.
        """
        state = self.blocks.bring(chain, seat)
        for layer in self.offloaded:
            self._copies.fill_slots(layer, {seat: len(chain) * self.page_size}, from_host=True)
        return state

    # Accounts ---------------------------------------------------------------------------------------------------------

    def check_integrity(self, others: Sequence[list[int]] = ()) -> None:
        """Raises AssertionError when a page is lost or held twice, or tables contradict each other or what layers need.

        Args:
            others: pages of the arena that others hold.
        """
        lendable = self._held.on_host.lendable
        self._held.check_integrity(others, [pages for parked in self.parked for pages in parked.held(lendable)])
        users = Counter([*self._held.on_host.lent(), *(block for one in self.parked for block in one.lent.values())])
        self.blocks.tree.check_users(users)
        if self.hot is not None:
            self.hot.check_integrity()

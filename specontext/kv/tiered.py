"""KV of all requests over two tiers: device arena and host pool.

A resident layer keeps pages of all its tokens in the arena. An offloaded layer keeps them in the host pool, which is the
truth, and in the arena only slots: sinks, a ring of the recent tokens, and hot slots that cache host rows. Attention reads
arena rows by index in both cases; only the index differs, and where a layer lives is a flag that kernels read. So a layer can
move between two steps (`moves.py`), and a captured graph serves before and after.

One decode step:  begin_step(selection) -> append(layer) -> wait(layer) -> rows(layer) -> attention, layer after layer.

Pages of a seat:

                       token pages (arena)    slot pages (arena)    host pages
    resident layer     its tokens             -                     -
      next to leave    its tokens             reserved              -
    leaving            its tokens             reserved              filling up
    offloaded layer    -                      its slots             its tokens
    returning          filling up             its slots             its tokens
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specontext.core import LoadPlan, ModelShape, Selection
from specontext.errors import LoadError
from specontext.kernels.row_index import selected_rows
from specontext.kernels.rows import append_layer, append_tokens, gather_rows_layers, ring_slots
from specontext.kv.hot_slots import HotSlots
from specontext.kv.pool import PagePool
from specontext.kv.reading import Reader, Reading, with_groups
from specontext.kv.seat_pages import SeatPages
from specontext.kv.streams import COMPUTE, PREFETCH, WRITE_BACK, Mark, Streams, streams_of
from specontext.kv.write_back import write_back

GROUPS = (1, 1, 2, 4)  # layers of the first launches of a load, so that the first layer waits little; 8 for all others


class TieredKV:
    """Pages, slots and transfers of all layers.

    Args:
        resident: for every layer whether its KV is on the device at first.
        reader: how requests read their selections, unless they are opened with another way.
        tables: 1 when one selection serves all layers, L when layers may select for themselves.
        groups: sets of a selection, at most.
        slots: device slots for each KV head of an offloaded layer; 0 when the method streams offloaded layers instead.
        arena, host: the pools of both tiers; other things may hold pages of the arena, too.
        adaptive: layers may move: slot space for the next one to leave is always reserved.
        streams: what orders transfers; by default the device's own.
    """

    def __init__(
        self,
        shape: ModelShape,
        *,
        resident: tuple[bool, ...],
        reader: Reader,
        tables: int,
        groups: int,
        slots: int,
        sink: int,
        recent: int,
        seats: int,
        max_tokens: int,
        arena: PagePool,
        host: PagePool,
        adaptive: bool = False,
        verify_loads: bool = False,
        streams: Streams | None = None,
    ) -> None:
        device, page_size = arena.rows.device, arena.page_size
        self.shape, self.reader, self.page_size = shape, reader, page_size
        self.arena, self.host = arena, host
        self.adaptive, self.verify_loads, self.device = adaptive, verify_loads, device
        self.resident = list(resident)
        self.resident_flags = torch.tensor(resident, device=device)
        self.streams = streams or streams_of(device)
        width, slot_width = -(-max_tokens // page_size), -(-slots // page_size)
        self.token_pages = SeatPages(self.arena, shape.layers, seats, width, device)
        self.slot_pages = SeatPages(self.arena, shape.layers, seats, slot_width, device)
        self.host_pages = SeatPages(self.host, shape.layers, seats, width, device)
        self.layers = torch.arange(shape.layers, device=device)
        self.slot_count = slots
        self.hot: HotSlots | None = None
        if slots and (adaptive or not all(resident)):
            self.hot = HotSlots(
                tables=tables,
                seats=seats + 1,
                groups=groups,
                slots=slots,
                sink=sink,
                recent=recent,
                max_tokens=max_tokens,
                device=device,
            )
        self.moving: int | None = None  # the layer that is on its way
        self.moved: dict[int, int] = {}  # tokens of open seats that this layer has in both tiers
        self.room: dict[int, int] = {}  # tokens that the pages of an open seat hold
        self.readers: dict[int, Reader] = {}  # of the open seats
        self.parked: list[list[list[int]]] = []  # host pages of requests without a seat, by layer
        self._loaded: list[Mark] = [None] * shape.layers
        self._written: Mark = None
        self.copies: Mark = None  # of pages that are being copied from seats for others to keep
        # Whether an offloaded layer's new decode rows are on the host within the step, for those who read them there; else they
        # follow for all layers at once, from the ring, while the last layer computes.
        self.write_through = verify_loads or tables > 1

    # Space ------------------------------------------------------------------------------------------------------------

    @property
    def offloaded(self) -> list[int]:
        """Layers whose KV lives on the host."""
        return [layer for layer, here in enumerate(self.resident) if not here]

    @property
    def planned(self) -> bool:
        """Whether steps plan slots: where a layer is offloaded; and always where a captured step must serve before and after a
        layer moves, since kernels pass over the layers that are resident."""
        return not all(self.resident) or (self.adaptive and self.streams.asynchronous)

    @property
    def next_to_leave(self) -> int | None:
        """The last resident layer."""
        return max((layer for layer, here in enumerate(self.resident) if here), default=None)

    def pages_for(self, tokens: int) -> int:
        """Pages of that many tokens in one layer."""
        return -(-tokens // self.page_size)

    def pages_needed(self, tokens: int, resident: int | None = None) -> tuple[int, int]:
        """Device and host pages of a request of `tokens` tokens when `resident` layers (default: as now) are on the device."""
        residents = sum(self.resident) if resident is None else resident
        offloaded = self.shape.layers - residents
        with_slots = offloaded + (1 if self.adaptive and residents else 0)
        device = residents * self.pages_for(tokens) + with_slots * self.pages_for(self.slot_count)
        return device, offloaded * self.pages_for(tokens)

    def open(self, seat: int, tokens: int, reader: Reader | None = None) -> None:
        """Give a seat its slots, and pages for the first `tokens` tokens in every layer.

        Raises:
            OutOfPagesError: a tier has too few free pages; nothing is taken.
        """
        assert seat not in self.room, f"seat {seat} is taken"
        self.room[seat], self.readers[seat] = 0, reader or self.reader
        try:
            self.reserve_slots(seat)
            self.grow(seat, tokens)
        except BaseException:
            self.close(seat)
            raise
        if self.hot is not None:
            self.hot.reset(seat)

    def grow(self, seat: int, tokens: int) -> None:
        """Make room for `tokens` tokens of an open seat.

        Raises:
            OutOfPagesError: a tier has too few free pages; nothing is taken.
        """
        if tokens <= self.room[seat]:
            return
        count = self.pages_for(tokens)
        on_device = [layer for layer, here in enumerate(self.resident) if here or layer == self.moving]
        on_host = [layer for layer, here in enumerate(self.resident) if not here or layer == self.moving]
        self.arena.pages.require(self.token_pages.lacking(on_device, seat, count))
        self.host_pages.extend(on_host, seat, count)  # may also fail because its memory is refused
        self.token_pages.extend(on_device, seat, count)
        self.room[seat] = count * self.page_size

    def reserve_slots(self, seat: int) -> None:
        """Slot pages for the layers that need them, and for no others: the offloaded ones, and the next to leave."""
        wanted = self.offloaded
        if self.adaptive and self.next_to_leave is not None:
            wanted.append(self.next_to_leave)
        self.slot_pages.extend(sorted(wanted), seat, self.pages_for(self.slot_count))
        self.slot_pages.release(set(range(self.shape.layers)) - set(wanted), seat)

    def close(self, seat: int) -> None:
        """Give back everything a seat holds."""
        for pages in (self.token_pages, self.slot_pages, self.host_pages):
            pages.release(range(self.shape.layers), seat)
        self.join_copies()
        if self.moved.pop(seat, None) is not None:  # rows may be on their way to pages that others get next
            for side in (PREFETCH, WRITE_BACK):
                self.streams.wait(COMPUTE, self.streams.record(side))
        del self.room[seat], self.readers[seat]

    # Writing ----------------------------------------------------------------------------------------------------------

    def append(self, layer: int, seats: Tensor, positions: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> None:
        """Store K and V of new decode tokens, one a request, where the layer lives; negative positions are skipped.

        Args:
            seats, positions: int64 [T].
            key, value: [T, Hkv, D], the key after RoPE.
            lengths: int64 [T], tokens in context of the token's request once this step is stored.
        """
        if self.hot is None:
            self.append_chunk(layer, seats, positions, key, value, lengths)
            return
        append_layer(
            self.host.rows,
            self.host_pages.table[layer],
            self.arena.rows,
            self.token_pages.table[layer],
            self.slot_pages.table[layer],
            self.resident_flags[layer : layer + 1],
            seats,
            positions,
            lengths,
            key,
            value,
            self.page_size,
            self.hot.sink,
            self.hot.recent,
            to_host=self.write_through,
        )
        if layer == self.shape.layers - 1 and not self.write_through and self.planned:
            streams = self.streams
            streams.wait(WRITE_BACK, streams.record(COMPUTE))
            with streams.on(WRITE_BACK):
                write_back(self, seats, positions)
            streams.keep(WRITE_BACK, seats, positions)
            self._written = streams.record(WRITE_BACK)

    def append_chunk(self, layer: int, seats: Tensor, positions: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> None:
        """The same for many tokens of prompts: what goes to the host is written while later layers compute."""
        tokens = (seats, positions)
        if self.resident[layer]:
            append_tokens(self.arena.rows, self.token_pages.table[layer], *tokens, key, value, self.page_size)
            return
        if self.hot is not None:
            slots = ring_slots(positions, lengths, self.hot.sink, self.hot.recent)
            append_tokens(self.arena.rows, self.slot_pages.table[layer], seats, slots, key, value, self.page_size)
        streams = self.streams
        streams.wait(WRITE_BACK, streams.record(COMPUTE))
        with streams.on(WRITE_BACK):
            append_tokens(self.host.rows, self.host_pages.table[layer], *tokens, key, value, self.page_size)
        streams.keep(WRITE_BACK, *tokens, key, value)
        self._written = streams.record(WRITE_BACK)

    def end_step(self) -> None:
        """What follows, compute and loads alike, sees all that this step wrote back."""
        self.streams.wait(COMPUTE, self._written)
        self._written = None

    def join_copies(self) -> None:
        """What is computed from now on may write to pages that are being copied, or are copied to."""
        self.streams.wait(COMPUTE, self.copies)
        self.copies = None

    # Sparse reading ---------------------------------------------------------------------------------------------------

    def begin_step(self, seats: Tensor, selection: Selection, layer: int | None = None, reader: Reader | None = None) -> Reading:
        """Plan a selection's loads and start them, for every offloaded layer, or for the one that selected.

        Args:
            reader: how these requests read it; by default the one that all have which say nothing else.
        """
        reading = Reading(seats, selection, reader or self.reader)
        if self.hot is None or not (self.planned if layer is None else not self.resident[layer]):
            return reading
        reading.selection = selection = with_groups(selection, self.hot.groups)
        reading.plan = plan = self.hot.plan(0 if layer is None else layer, seats, selection)
        streams = self.streams
        # Compute has read last step's slots, and has written all rows, before it comes to this mark.
        streams.wait(PREFETCH, streams.record(COMPUTE))
        with streams.on(PREFETCH):
            for first, last in self._load_groups(layer):
                self._load(self.layers[first:last], reading, plan)
                self._loaded[first:last] = [streams.record(PREFETCH)] * (last - first)
        streams.keep(PREFETCH, seats, selection.tokens, plan.slots, plan.missing)
        return reading

    def _load_groups(self, layer: int | None) -> list[tuple[int, int]]:
        """Runs first .. last - 1 of layers that are loaded together: all at once where nothing runs beside it."""
        if layer is not None:
            return [(layer, layer + 1)]
        layers, first = self.shape.layers, 0
        if not self.streams.asynchronous:
            return [(0, layers)]
        groups: list[tuple[int, int]] = []
        while first < layers:
            last = min(layers, first + (GROUPS[len(groups)] if len(groups) < len(GROUPS) else 8))
            groups.append((first, last))
            first = last
        return groups

    def _load(self, layers: Tensor, reading: Reading, plan: LoadPlan) -> None:
        gather_rows_layers(
            self.host.rows,
            self.arena.rows,
            self.host_pages.table,
            self.slot_pages.table,
            layers,
            reading.seats,
            reading.reader.head_map,
            self.resident_flags,
            reading.selection.tokens,
            plan.slots,
            plan.missing,
            self.page_size,
        )

    def wait(self, layer: int) -> None:
        """What is computed from now on finds the layer's loads in their slots."""
        self.streams.wait(COMPUTE, self._loaded[layer])
        self._loaded[layer] = None

    def rows(self, layer: int, reading: Reading) -> Tensor:
        """Arena rows of a selection for every KV head of a layer, in the selection's order: integers [R, Hkv, B]."""
        if reading.reader.in_layer or not self.streams.asynchronous:
            rows = self._rows_of(slice(layer, layer + 1), reading)[0]
        else:
            if reading.rows is None:
                reading.rows = self._rows_of(slice(None), reading)
            rows = reading.rows[layer]
        if self.verify_loads and not self.resident[layer]:
            self._verify(layer, reading.seats, reading.selection.tokens[:, reading.reader.head_map[layer]], rows)
        return rows

    def _rows_of(self, layers: slice, reading: Reading) -> Tensor:
        tokens, plan = reading.selection.tokens, reading.plan
        slots = tokens if plan is None else plan.slots
        tables = (self.token_pages.table[layers], self.slot_pages.table[layers])
        flags, head_map = self.resident_flags[layers], reading.reader.head_map[layers]
        return selected_rows(tokens, slots, *tables, flags, reading.seats, head_map, self.page_size)

    def _verify(self, layer: int, seats: Tensor, tokens: Tensor, rows: Tensor) -> None:
        truth = self.host.rows_of(self.host_pages.table[layer].index_select(0, seats), tokens)
        read = truth >= 0
        same = torch.equal(self.arena.rows[rows[read].long()].cpu(), self.host.rows[truth[read].cpu()])
        if not same:
            raise LoadError(f"layer {layer}: a slot holds a row that differs from the host's copy")

    # Accounts ---------------------------------------------------------------------------------------------------------

    def check_integrity(self, others: Sequence[list[int]] = ()) -> None:
        """Raises AssertionError when a page is lost or held twice, or tables contradict each other or what layers need.

        Args:
            others: pages of the arena that others hold.
        """
        self.arena.pages.check_integrity([*self.token_pages.all_held(), *self.slot_pages.all_held(), *others])
        self.host.pages.check_integrity(self.host_pages.all_held() + [pages for parked in self.parked for pages in parked])
        for layer, here in enumerate(self.resident):
            for seat, room in self.room.items():
                count, both = self.pages_for(room), layer == self.moving
                assert len(self.token_pages.of(layer, seat)) == (count if here or both else 0), f"token pages of layer {layer}"
                assert len(self.host_pages.of(layer, seat)) == (count if not here or both else 0), f"host pages of layer {layer}"
                slots = self.pages_for(self.slot_count) if not here or (self.adaptive and layer == self.next_to_leave) else 0
                assert len(self.slot_pages.of(layer, seat)) == slots, f"slot pages of layer {layer}"
        for pages in (self.token_pages, self.slot_pages, self.host_pages):
            pages.check_integrity()
        assert self.resident_flags.tolist() == self.resident
        if self.hot is not None:
            self.hot.check_integrity()

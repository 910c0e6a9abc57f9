"""What seats hold in both tiers, and where layers live: the ledger of `KVCache`, which alone changes it.

Pages of a seat:

                       token pages (arena)    slot pages (arena)    in the host pages of its block
    resident layer     its tokens             -                     -
      next to leave    its tokens             reserved              -
    leaving            its tokens             reserved              filling up
    offloaded layer    -                      its slots             its tokens
    returning          filling up             its slots             its tokens

On the host neighbouring layers lie side by side (`Layout.layer_blocks`): a seat has pages of a block as soon as one of its
layers is there or on its way, and they have room for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from specontext.kv.pool import PagePool
from specontext.kv.seats import LayerMove, Seat, SeatPages
from specontext.memory.tiers import Tier


class Holdings:
    """Page tables, residency flags and open seats.

    Args:
        resident: for every layer whether its KV is on the device at first.
        slot_pages: of a seat in a layer that has slots.
        adaptive: slot space for the next layer to leave is always reserved.

    Attributes:
        tokens, slots: device pages by (layer, seat), and the tables that kernels read.
        on_host: the same on the host, by (block, seat).
        resident, flags: where layers live, for the host and for kernels.
        move: the layer that is on its way.
    """

    def __init__(
        self,
        arena: PagePool,
        host: PagePool,
        resident: Sequence[bool],
        *,
        slot_pages: int,
        seats: int,
        width: int,
        adaptive: bool,
    ) -> None:
        device, layers = arena.rows.device, len(resident)
        self.layout, self.arena, self.host = arena.layout, arena.pages, host.pages
        self.slot_pages, self.adaptive = slot_pages, adaptive
        self.resident, self.flags = list(resident), torch.tensor(list(resident), device=device)
        self.tokens = SeatPages(arena, layers, seats, width, device)
        self.slots = SeatPages(arena, layers, seats, slot_pages, device)
        self.on_host = SeatPages(host, len(self.layout.layer_blocks.sizes), seats, width, device)
        self.seats: dict[int, Seat] = {}
        self.move: LayerMove | None = None

    @property
    def layers(self) -> range:
        return range(len(self.resident))

    @property
    def offloaded(self) -> list[int]:
        """Layers whose KV lives on the host."""
        return [layer for layer in self.layers if not self.resident[layer]]

    @property
    def next_to_leave(self) -> int | None:
        """The last resident layer."""
        return max((layer for layer in self.layers if self.resident[layer]), default=None)

    def layers_in(self, tier: Tier) -> list[int]:
        """Layers whose tokens have pages in a tier: those that live there, and the one that is going there."""
        moving = self.move.layer if self.move is not None else None
        return [layer for layer in self.layers if self.resident[layer] == (tier is Tier.DEVICE) or layer == moving]

    def slotted(self) -> dict[int, int]:
        """Pages of slots by layer: of the offloaded ones, and of the next to leave where layers may move."""
        last = self.next_to_leave if self.adaptive else None
        layers = sorted([*self.offloaded, *([last] if last is not None else [])])
        return dict.fromkeys(layers, self.slot_pages) if self.slot_pages else {}

    def pages(self, layers: Iterable[int], tokens: int) -> dict[int, int]:
        """Device pages of so many tokens by layer."""
        return {layer: self.layout.pages_for(layer, tokens) for layer in layers}

    def host_pages(self, layers: Sequence[int], tokens: int) -> dict[int, int]:
        """Host pages of so many tokens by block, in the blocks of some layers."""
        return dict.fromkeys(self.layout.layer_blocks.of(layers), self.layout.pages_of(tokens))

    def room_of(self, tokens: int) -> int:
        """Tokens that the pages of so many tokens hold."""
        return self.layout.pages_of(tokens) * self.layout.page_size

    def take(self, seat: int, tokens: int, *, slots: bool = False) -> Tier | None:
        """Pages of tokens in both tiers, and of slots; the tier that has too few, and nothing is taken.

        Raises:
            HostMemoryError: the host's memory is refused; nothing is taken.
        """
        device = self.pages(self.layers_in(Tier.DEVICE), tokens)
        host = self.host_pages(self.layers_in(Tier.HOST), tokens)
        of_slots = self.slotted() if slots else {}
        if self.tokens.lacking(device, seat) + self.slots.lacking(of_slots, seat) > self.arena.num_free:
            return Tier.DEVICE
        if self.on_host.lacking(host, seat) > self.host.num_free:
            return Tier.HOST
        self.on_host.extend(host, seat)  # first: its memory may be refused
        self.slots.extend(of_slots, seat)
        self.tokens.extend(device, seat)
        return None

    def turn(self, layer: int) -> None:
        """A layer has moved: it lives in the other tier, gives back what it had in this one, and slots are where they belong."""
        here = self.resident[layer]
        self.resident[layer] = not here
        self.flags[layer] = not here
        self.move = None
        self.leave(layer, Tier.DEVICE if here else Tier.HOST)
        slotted = self.slotted()
        for seat in self.seats:
            self.slots.extend(slotted, seat)
            self.slots.release(set(self.layers) - set(slotted), seat)

    def leave(self, layer: int, tier: Tier) -> None:
        """A layer that is in a tier no more gives back what seats had there for it alone."""
        for seat in self.seats:
            if tier is Tier.DEVICE:
                self.tokens.release([layer], seat)
            else:
                self.leave_host(seat)

    def leave_host(self, seat: int) -> None:
        """Give back the host pages of a seat in blocks of which no layer is there."""
        away = self.layout.layer_blocks.of(self.layers_in(Tier.HOST))
        self.on_host.release([block for block in range(len(self.layout.layer_blocks.sizes)) if block not in away], seat)

    def assert_pages(self, *seats: int) -> None:
        """What seats hold in each layer is what the table at the top of this file says."""
        slotted, device, host = self.slotted(), self.layers_in(Tier.DEVICE), self.layers_in(Tier.HOST)
        for seat in seats:
            room = self.seats[seat].room
            tokens, on_host = self.pages(device, room), self.host_pages(host, room)
            for layer in self.layers:
                assert len(self.tokens.of(layer, seat)) == tokens.get(layer, 0), f"token pages of layer {layer}"
                assert len(self.slots.of(layer, seat)) == slotted.get(layer, 0), f"slot pages of layer {layer}"
            for block in range(len(self.layout.layer_blocks.sizes)):
                assert len(self.on_host.of(block, seat)) == on_host.get(block, 0), f"host pages of block {block}"

    def check_integrity(self, in_arena: Iterable[list[int]], on_host: Iterable[list[int]]) -> None:
        """Raises AssertionError when a page is lost or held twice, or tables contradict each other or what layers need.

        Args:
            in_arena, on_host: pages of both pools that others hold.
        """
        self.arena.check_integrity([*self.tokens.all_held(), *self.slots.all_held(), *in_arena])
        self.host.check_integrity([*self.on_host.all_held(), *on_host])
        self.assert_pages(*self.seats)
        for pages in (self.tokens, self.slots, self.on_host):
            pages.check_integrity()
        assert self.flags.tolist() == self.resident

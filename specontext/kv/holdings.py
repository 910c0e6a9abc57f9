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

In blocks of layers of which all are on the host for good (`lendable`), the first pages of a seat may be those of a known prompt,
lent from blocks of `PrefixTree`, and its own become theirs when they are kept: rows of whole pages of a prompt never change.

What fills up is claimed when a layer begins to move and taken little by little, with the rows that are copied: each seat holds as
many pages as its tokens need, less those that are claimed for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from specontext.kv.pool import PagePool
from specontext.kv.prefix_tree import Block
from specontext.kv.seats import LayerMove, ParkedKV, Seat, SeatPages
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
        blocks = self.layout.layer_blocks.members
        lendable = [] if adaptive else [b for b in range(len(blocks)) if not any(resident[layer] for layer in blocks[b])]
        self.on_host = SeatPages(host, len(blocks), seats, width, device, lendable)
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

    def _living_in(self, tier: Tier) -> list[int]:
        """Layers that live in a tier."""
        return [layer for layer in self.layers if self.resident[layer] == (tier is Tier.DEVICE)]

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

    def take(self, seat: int, tokens: int, *, slots: bool = False, known: Sequence[Block] = ()) -> Tier | None:
        """Pages of tokens in both tiers, and of slots; the tier that has too few, and nothing is taken.

        Args:
            known: blocks of the first tokens of a seat that has none, which are lent to it.

        Raises:
            HostMemoryError: the host's memory is refused; nothing is taken.
        """
        device = self.pages(self._living_in(Tier.DEVICE), tokens)
        host = self.host_pages(self._living_in(Tier.HOST), tokens)
        of_slots = self.slotted() if slots else {}
        more = self._unclaimed(seat, tokens)
        for_move = {Tier.HOST: 0, Tier.DEVICE: 0} | ({} if self.move is None else {self.move.tier: more})
        lacking = self.tokens.lacking(device, seat) + self.slots.lacking(of_slots, seat)
        if lacking + for_move[Tier.DEVICE] > self.arena.num_free:
            return Tier.DEVICE
        if self.on_host.lacking(host, seat) - len(known) * len(self.on_host.lendable) + for_move[Tier.HOST] > self.host.num_free:
            return Tier.HOST
        if known:
            self.on_host.borrow(seat, known)
        try:
            self.on_host.extend(host, seat)  # first: its memory may be refused
        except BaseException:
            if known:
                self.on_host.release_all(seat)
            raise
        self.slots.extend(of_slots, seat)
        self.tokens.extend(device, seat)
        self.claim(seat, more)
        return None

    # Waiting: all that a seat has stored lies in pages of the host, which it leaves behind.

    def can_park(self, seat: int, tokens: int, beside: int) -> bool:
        """Whether the host has pages for all layers of a seat that has so many tokens, and so many pages beside them."""
        free = self.host.num_free + self._claimed_on_host(seat)
        return self.on_host.lacking(self.host_pages(self.layers, tokens), seat) + beside <= free

    def take_to_park(self, seat: int, tokens: int, beside: int) -> list[int]:
        """Pages of the host for all layers of a seat, which is closed next; those beside them.

        Raises:
            HostMemoryError: the host's memory is refused; nothing is taken.
        """
        with self._free_of_claims(seat):
            pages = self.on_host.pool.allocate(beside)
            try:
                self.on_host.extend(self.host_pages(self.layers, tokens), seat)
            except BaseException:
                self.host.free(pages)
                raise
        return pages

    def detach(self, seat: int, tokens: int) -> list[list[int]]:
        """Take the pages of so many tokens out of a seat, by block, and give back those for tokens that never came."""
        parked = []
        for block, count in self.host_pages(self.layers, tokens).items():
            pages = self.on_host.detach(block, seat)
            self.host.free(pages[count:])
            parked.append(pages[:count])
        return parked

    def can_return(self, tokens: int) -> bool:
        """Whether the device has pages for a seat of so many tokens."""
        return sum(self._on_device(tokens).values()) + sum(self.slotted().values()) <= self.arena.num_free

    def attach(self, seat: int, parked: ParkedKV) -> None:
        """Put parked pages into a seat that has none but its slots, and give it those of resident layers."""
        self.tokens.extend(self._on_device(parked.tokens), seat)
        self.on_host.attach_lent(seat, parked.lent)
        for block, pages in enumerate(parked.pages):
            self.on_host.attach(block, seat, pages)
        self.seats[seat].room = self.room_of(parked.tokens)

    def _on_device(self, tokens: int) -> dict[int, int]:
        return self.pages(self.layers_in(Tier.DEVICE), tokens)

    # Moving: pages are claimed, taken little by little, and given back as whole lists.

    def begin(self, layer: int, *, to_host: bool) -> bool:
        """Claim pages in the other tier for all that seats have room for; False where it has too few, and nothing has changed."""
        assert self.move is None and self.resident[layer] == to_host
        self.move = LayerMove(layer, to_host)
        wanted = {seat: self._unclaimed(seat, one.room) for seat, one in self.seats.items()}
        if sum(wanted.values()) > self.target[0].pool.pages.num_free:
            self.move = None
            return False
        for seat, count in wanted.items():
            self.claim(seat, count)
        return True

    @property
    def moving(self) -> LayerMove:
        """The layer that is on its way; there must be one."""
        assert self.move is not None, "no layer is moving"
        return self.move

    @property
    def target(self) -> tuple[SeatPages, int]:
        """Pages and line that the moving layer is going to."""
        layer = self.moving.layer
        return (self.on_host, self.layout.layer_blocks.home[layer][0]) if self.moving.to_host else (self.tokens, layer)

    def target_pages(self, tokens: int) -> int:
        """Pages of so many tokens there."""
        return self.layout.pages_of(tokens) if self.moving.to_host else self.layout.pages_for(self.moving.layer, tokens)

    def _unclaimed(self, seat: int, tokens: int) -> int:
        """Pages that a seat of so many tokens needs where the moving layer is going, and neither has nor has claimed; none where
        they are those of other layers, too."""
        if self.move is None:
            return 0
        pages, line = self.target
        if self.move.to_host and line in self.layout.layer_blocks.of(self.offloaded):
            return 0
        return max(0, self.target_pages(tokens) - len(pages.of(line, seat)) - self.move.claimed.get(seat, 0))

    def claim(self, seat: int, count: int) -> None:
        """Promise the moving layer so many pages more for a seat."""
        if count:
            self.target[0].pool.pages.claimed += count
            self.moving.claimed[seat] = self.moving.claimed.get(seat, 0) + count

    def _claimed_on_host(self, seat: int) -> int:
        """Pages of the host that are promised to a seat."""
        return self.move.claimed.get(seat, 0) if self.move is not None and self.move.to_host else 0

    def unclaim(self, seat: int) -> int:
        """Promise a seat nothing any more; how many pages that were."""
        count = self.move.claimed.pop(seat, 0) if self.move is not None else 0
        if count:
            self.target[0].pool.pages.claimed -= count
        return count

    @contextmanager
    def _free_of_claims(self, seat: int) -> Iterator[None]:
        """What is done inside may take what was promised to a seat, which is closed behind it, or nothing has changed."""
        count = self.unclaim(seat)
        try:
            yield
        except BaseException:
            self.claim(seat, count)
            raise

    def take_claimed(self, new: dict[int, int]) -> None:
        """Pages for the moving layer, by seat, of those that are claimed."""
        (pages, line), claimed = self.target, self.moving.claimed
        pages.extend_line(line, new, claimed=True)
        for seat, count in new.items():
            claimed[seat] -= count
            if not claimed[seat]:
                del claimed[seat]

    def stay(self) -> None:
        """The moving layer stays where it is."""
        for seat in self.seats:
            self.unclaim(seat)
        move, self.move = self.moving, None
        self._leave(move.layer, move.tier)

    def turn(self, layer: int) -> None:
        """A layer has moved: it lives in the other tier, gives back what it had in this one, and slots are where they belong."""
        here, slotted = self.resident[layer], set(self.slotted())
        assert not self.moving.claimed
        self.resident[layer] = not here
        self.flags[layer].fill_(not here)
        self.move = None
        self._leave(layer, Tier.DEVICE if here else Tier.HOST)
        now = set(self.slotted())
        for other in slotted - now:
            self.slots.release_line(other)
        for other in now - slotted:
            self.slots.extend_line(other, dict.fromkeys(self.seats, self.slot_pages))

    def _leave(self, layer: int, tier: Tier) -> None:
        """A layer that is in a tier no more gives back what seats had there for it alone."""
        if tier is Tier.DEVICE:
            self.tokens.release_line(layer)
        elif (block := self.layout.layer_blocks.home[layer][0]) not in self.layout.layer_blocks.of(self.layers_in(Tier.HOST)):
            self.on_host.release_line(block)

    def leave_host(self, seat: int) -> None:
        """Give back the host pages of a seat in blocks of which no layer is there."""
        away = self.layout.layer_blocks.of(self.layers_in(Tier.HOST))
        self.on_host.release([block for block in range(len(self.layout.layer_blocks.sizes)) if block not in away], seat)

    def assert_pages(self, *seats: int, layers: Iterable[int] | None = None) -> None:
        """What seats hold in each layer, or in some, is what the table at the top of this file says."""
        slotted, device, host = self.slotted(), self.layers_in(Tier.DEVICE), self.layers_in(Tier.HOST)
        layers = list(self.layers if layers is None else layers)
        device = [layer for layer in layers if layer in device]
        blocks = self.layout.layer_blocks.of(layers)
        for seat in seats:
            room, claimed = self.seats[seat].room, 0 if self.move is None else self.move.claimed.get(seat, 0)
            tokens, on_host = self.pages(device, room), self.host_pages(host, room)
            if claimed and self.move is not None:
                (on_host if self.move.to_host else tokens)[self.target[1]] -= claimed
            for layer in layers:
                assert len(self.tokens.of(layer, seat)) == tokens.get(layer, 0), f"token pages of layer {layer}"
                assert len(self.slots.of(layer, seat)) == slotted.get(layer, 0), f"slot pages of layer {layer}"
            for block in blocks:
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
        claimed = {pool: 0 for pool in (self.arena, self.host)}
        if self.move is not None:
            claimed[self.target[0].pool.pages] = sum(self.move.claimed.values())
        assert all(pool.claimed == count for pool, count in claimed.items()), "claimed pages and their claims differ"

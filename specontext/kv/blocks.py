"""Pages of prompts on the host, kept of a seat when they are complete and put into a seat that begins with the same tokens.

A page of a block holds its rows of some layers as every page of the host does; behind those of all layers come pages with what
else is known of its tokens (`State`). Where neighbouring layers are all on the host for good, a block's page *is* the seat's, and
is lent to all that begin with its tokens (`PrefixTree`): nobody writes to it any more. All else is a copy, which no seat reads
and which is free to all others:

    keep    arena, host -> blocks     on the write-back stream, beside the next step
    bring   blocks -> arena, host     on the prefetch stream, before the seat's first step

Pages for copies are taken from what is free on the host and ready to be used. The few that a block has beside a seat's own are
waited for: the seat has waited for its own already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from weakref import WeakMethod

import torch
from torch import Tensor

from specontext.kernels.tables import Pages
from specontext.kv.block_state import BlockState, State
from specontext.kv.copying import copy_pages
from specontext.kv.pool import PagePool
from specontext.kv.prefix_tree import Block, PrefixTree, Tokens
from specontext.kv.rings import Rings
from specontext.kv.seats import SeatPages
from specontext.kv.states import SeatStates
from specontext.kv.streams import PREFETCH, WRITE_BACK
from specontext.kv.transfers import Transfers


class Blocks:
    """Blocks of one engine and their copies.

    Where layers have windows, a block has pages for its tokens in these layers too. Of a very long chunk only the last tokens
    are still there when it has been computed: earlier blocks stay without them, and no request begins where its windows would
    miss some (`usable`). Where layers keep states, a block with which a chunk has ended has pages for these, as they were then,
    and requests begin after such a block only.

    Args:
        seats: pages of seats on the host, of which blocks have some in common with them.
        state: numbers of a block's state: of each page, and of its last token.

    Attributes:
        tree: which blocks there are.
    """

    def __init__(
        self,
        transfers: Transfers,
        host: PagePool,
        seats: SeatPages,
        state: tuple[int, int],
        rings: Rings | None = None,
        states: SeatStates | None = None,
    ) -> None:
        self._rings, self._states, self._page_bytes = rings, states, host.page_bytes
        self._transfers, self._free, self._seats = transfers, host.pages, seats
        self._prepare, self._make_ready = host.prepare, host.make_ready
        self._lines = len(transfers.layer_blocks.sizes)
        members, resident = transfers.layer_blocks.members, transfers.tiers.resident
        lent = [layer for line in seats.lendable for layer in members[line]]
        self._in_place = torch.tensor([layer in lent for layer in range(len(resident))], device=resident.device)
        self._all_in_place = len(lent) == len(resident)
        self._state = BlockState(transfers, self._lines, host.page_rows, host.layout.others, each=state[0], last=state[1])
        self._ring_pages = 0 if rings is None else rings.pages_of(host.layout.page_size, host.page_bytes)
        # The pool of the host holds the tree: with a weak reference the tables of an engine that is dropped go at once.
        self.tree = PrefixTree(
            host.layout.page_size,
            self._lines + self._state.pages + self._ring_pages,
            _weak(transfers.join_copies),
            seats.lendable,
        )
        host.pages.cache = self.tree

    @property
    def _own_pages(self) -> int:
        """Pages of a block beside those that it has in common with a seat."""
        return self.tree.block_pages - len(self.tree.lendable)

    def expect(self, blocks: int, of_seats: int) -> None:
        """Have memory made ready for blocks that will soon be kept, beside those that are: a GPU pins it meanwhile.

        Args:
            of_seats: pages that their prompts will take before.
        """
        self._prepare(of_seats + blocks * self._own_pages)

    def usable(self, chain: Sequence[Block]) -> int:
        """The most blocks of a chain after which a request can begin: all that its windows reach is kept, and states."""
        size, count = self.tree.page_size, len(chain)
        while count:
            if self._states is not None and not chain[count - 1].states:
                count -= 1
                continue
            if self._rings is None:
                break
            reached = range(self._reached(count * size) // size, count)
            lacking = next((page for page in reversed(reached) if not chain[page].windowed), None)
            if lacking is None:
                break
            count = lacking
        return count

    def _reached(self, position: int) -> int:
        """The first token that the token at a position reads in any layer with a window."""
        assert self._rings is not None
        return max(0, min(window.first(position) for window in self._rings.windows))

    def keep(self, chain: list[Block], pages: Sequence[Tokens], seat: int, state: State, stored: int) -> None:
        """Add blocks behind a chain for the next pages of a seat, as many as there is room for without taking it from anyone.

        Args:
            chain: of all pages before them; it grows.
            pages: tokens of the pages.
            state: of these pages.
            stored: tokens that the seat has stored.
        """
        free, size = self._free, self._own_pages
        with self.tree.using(chain):
            self._have_ready(len(pages) * size)
            count = min(len(pages), free.num_ready // size) if size else len(pages)
            taken = free.allocate(count * size)
        first = len(chain)
        for i in range(count):
            in_block = self._in_block(seat, first + i, taken[i * size : (i + 1) * size])
            chain.append(self.tree.add(chain[-1] if chain else None, pages[i], in_block))
        if count:
            if self.tree.lendable:
                self._seats.hand_over(seat, first, chain[first:])
                self.tree.lend(chain[first:])
            of_blocks = self._pages(chain[first:])
            self._copy(of_blocks, seat, first, to_seat=False)
            self._state.keep(of_blocks, State(state.each[:count], state.last[:count]))
            self._transfers.keep_copies()
        self.keep_rings(chain, seat, stored)
        self.tree.touch(chain)

    def _in_block(self, seat: int, number: int, own: Sequence[int]) -> list[int]:
        """All pages of the block of a seat's page, in their order: those that the seat has, and others."""
        rest, lendable = iter(own), self.tree.lendable
        return [
            self._seats.of(place, seat)[number] if place in lendable else next(rest) for place in range(self.tree.block_pages)
        ]

    def _have_ready(self, count: int) -> None:
        """See to it that so many pages can be taken, as far as that takes none from anyone."""
        lacking = count - self._free.num_ready
        if lacking > 0:
            self._free.free(self.tree.give_up(min(lacking, self.tree.num_idle)))
        if self._all_in_place:
            self._make_ready(count)

    def keep_rings(self, chain: Sequence[Block], seat: int, stored: int) -> None:
        """Keep what a seat's rings still hold of blocks that lack it.

        Args:
            chain: of its first pages.
            stored: tokens that the seat has stored.
        """
        if self._rings is None:
            return
        size, kept = self.tree.page_size, self._rings.kept.pop(seat, None)
        if kept is not None and (there := self._without_rings(chain, kept.first // size)):
            table = self._ring_table([chain[page] for page in there])
            self._rings.copy_kept(self._transfers, kept, [page * size for page in there], size, table)
            self._transfers.keep_copies()
            self._have_rings(chain, there)
        still = -(-max(0, stored - self._rings.entries) // size)  # the first page of which nothing has been pushed out
        if there := self._without_rings(chain, still):
            self._copy_rings([chain[page] for page in there], seat, there, to_host=True)
            self._transfers.keep_copies()
            self._have_rings(chain, there)

    def keep_states(self, chain: Sequence[Block], seat: int, stored: int) -> None:
        """Keep a seat's states, if a chain ends with its last token, where there is room for them without taking it from anyone.

        Args:
            chain: of its first pages.
            stored: tokens that the seat has stored.
        """
        if self._states is None or not chain or stored != len(chain) * self.tree.page_size:
            return
        block, free, count = chain[-1], self._free, self._states.pages_of_seat(self._page_bytes)
        if block.states or block not in self.tree:
            return
        with self.tree.using(chain):
            self._have_ready(count)
            if free.num_ready < count:
                return
            pages = free.allocate(count)
        self.tree.add_states(block, pages)
        self._states.store(self._transfers, seat, self._table(pages))
        self._transfers.keep_copies()

    def _table(self, pages: Sequence[int]) -> Tensor:
        """int64 [pages, 1] on the device."""
        return torch.tensor(pages, dtype=torch.int64)[:, None].to(self._transfers.every.heads.device)

    def _without_rings(self, chain: Sequence[Block], first: int) -> list[int]:
        """Numbers of a chain's blocks, from one on, that are kept without what layers with a window have."""
        return [page for page in range(first, len(chain)) if not chain[page].windowed and chain[page] in self.tree]

    def _have_rings(self, chain: Sequence[Block], pages: Sequence[int]) -> None:
        for page in pages:
            chain[page].windowed = True

    def _ring_table(self, blocks: Sequence[Block]) -> Tensor:
        """Pages of blocks for layers with a window: int64 [pages of a block, blocks]."""
        return self._pages(blocks)[-self._ring_pages :]

    def _copy_rings(self, blocks: Sequence[Block], seat: int, numbers: Sequence[int], *, to_host: bool) -> None:
        assert self._rings is not None
        size = self.tree.page_size
        first = [page * size for page in numbers]
        self._rings.copy(self._transfers, seat, first, size, self._ring_table(blocks), to_host=to_host)

    def bring(self, chain: Sequence[Block], seat: int) -> State:
        """Copy the rows of a chain into a seat that was opened for it; what is computed next finds them there.

        Returns:
            The state of its tokens.
        """
        assert not self.tree.lendable or self._seats.has_lent(seat, chain), "the seat was opened for other blocks"
        self._transfers.join_copies()
        of_blocks = self._pages(chain)
        self._copy(of_blocks, seat, 0, to_seat=True)
        if self._rings is not None:
            first = self._reached(len(chain) * self.tree.page_size) // self.tree.page_size
            if first < len(chain):
                self._copy_rings(chain[first:], seat, range(first, len(chain)), to_host=False)
        if self._states is not None:
            self._states.load(self._transfers, seat, self._table(chain[-1].states))
        state = self._state.bring(of_blocks)
        self._transfers.join(PREFETCH)
        return state

    def _pages(self, blocks: Sequence[Block]) -> Tensor:
        """Pages of some blocks: int64 [pages of a block, blocks] on the device."""
        pages, device = torch.tensor([block.pages for block in blocks], dtype=torch.int64), self._transfers.every.heads.device
        if device.type == "cuda":
            pages = pages.pin_memory()  # so that the host does not wait for the step that is being computed
        return pages.to(device, non_blocking=True).T

    def _copy(self, pages: Tensor, seat: int, first: int, *, to_seat: bool) -> None:
        """Rows of all layers between blocks and a seat's pages from number `first` on, where each layer lives; not of those that
        both have in common."""
        transfers, tiers, count = self._transfers, self._transfers.tiers, pages.shape[1]
        of_blocks = replace(tiers.host, table=pages[: self._lines, None].contiguous())
        homes: list[tuple[bool, Pages, Tensor]] = [
            (any(transfers.resident), tiers.tokens, ~tiers.resident),
            (not (all(transfers.resident) or self._all_in_place), tiers.host, tiers.resident | self._in_place),
        ]
        for used, home, skipped in homes:
            if used:
                of_seat = replace(home, table=home.table[:, seat : seat + 1, first : first + count].contiguous())
                source, target = (of_blocks, of_seat) if to_seat else (of_seat, of_blocks)
                side = PREFETCH if to_seat else WRITE_BACK
                copy_pages(transfers, source, target, count * home.size, skipped=skipped, side=side)


def _weak(method: Callable[[], None]) -> Callable[[], None]:
    """Calls a method of an object as long as there is the object."""
    reference = WeakMethod(method)

    def call() -> None:
        if (alive := reference()) is not None:
            alive()

    return call

"""Pages of prompts on the host, copied from a seat when they are complete and into a seat that begins with the same tokens.

Blocks are copies: no seat reads them, and none waits for them to be given back. A page of a block holds its rows of some
layers as every page of the host does; behind those of all layers come pages with what else is known of its tokens (`State`). All
of them are taken from what is free on the host and ready to be used, and are free to all others.

    keep    arena, host -> blocks     on the write-back stream, beside the next step
    bring   blocks -> arena, host     on the prefetch stream, before the seat's first step
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
from specontext.kv.streams import PREFETCH, WRITE_BACK
from specontext.kv.transfers import Transfers


class Blocks:
    """Blocks of one engine and their copies.

    Args:
        state: numbers of a block's state: of each page, and of its last token.

    Attributes:
        tree: which blocks there are.
    """

    def __init__(self, transfers: Transfers, host: PagePool, state: tuple[int, int]) -> None:
        self._transfers, self._free, self._prepare = transfers, host.pages, host.prepare
        self._lines = len(transfers.layer_blocks.sizes)
        self._state = BlockState(transfers, self._lines, host.page_rows, host.layout.others, each=state[0], last=state[1])
        # The pool of the host holds the tree: with a weak reference the tables of an engine that is dropped go at once.
        self.tree = PrefixTree(host.layout.page_size, self._lines + self._state.pages, _weak(transfers.join_copies))
        host.pages.cache = self.tree

    def expect(self, blocks: int) -> None:
        """Have memory made ready for blocks that will soon be kept, beside those that are: a GPU pins it meanwhile."""
        self._prepare(blocks * self.tree.block_pages)

    def keep(self, chain: list[Block], pages: Sequence[Tokens], seat: int, state: State) -> None:
        """Add blocks behind a chain for the next pages of a seat, as many as there is room for without taking it from anyone.

        Args:
            chain: of all pages before them; it grows.
            pages: tokens of the pages.
            state: of these pages.
        """
        free, size = self._free, self.tree.block_pages
        with self.tree.using(chain):
            lacking = len(pages) * size - free.num_ready
            if lacking > 0:
                free.free(self.tree.give_up(min(lacking, self.tree.num_spare)))
            count = min(len(pages), free.num_ready // size)
            taken = free.allocate(count * size)
        first = len(chain)
        for i in range(count):
            chain.append(self.tree.add(chain[-1] if chain else None, pages[i], taken[i * size : (i + 1) * size]))
        if count:
            of_blocks = self._pages(chain[first:])
            self._copy(of_blocks, seat, first, to_seat=False)
            self._state.keep(of_blocks, State(state.each[:count], state.last[:count]))
            self._transfers.keep_copies()
        self.tree.touch(chain)

    def bring(self, chain: Sequence[Block], seat: int) -> State:
        """Copy the rows of a chain into a seat; what is computed next finds them there.

        Returns:
            The state of its tokens.
        """
        self._transfers.join_copies()
        of_blocks = self._pages(chain)
        self._copy(of_blocks, seat, 0, to_seat=True)
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
        """Rows of all layers between blocks and a seat's pages from number `first` on, where each layer lives."""
        transfers, tiers, count = self._transfers, self._transfers.tiers, pages.shape[1]
        of_blocks = replace(tiers.host, table=pages[: self._lines, None].contiguous())
        homes: list[tuple[bool, Pages, Tensor]] = [
            (any(transfers.resident), tiers.tokens, ~tiers.resident),
            (not all(transfers.resident), tiers.host, tiers.resident),
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

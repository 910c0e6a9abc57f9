"""Pages of prompts on the host, copied from a seat when they are complete and into a seat that begins with the same tokens.

Blocks are copies: no seat reads them, and none waits for them to be given back. A page of a block holds its rows of one layer as
every page of KV does; behind those of the layers come pages with what else is known of its tokens (`State`). All of them
are taken from what is free on the host and ready to be used, and are free to all others.

    keep    arena, host -> blocks     on the write-back stream, beside the next step
    bring   blocks -> arena, host     on the prefetch stream, before the seat's first step
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakMethod

import torch
from torch import Tensor

from specontext.kernels.rows import gather_rows
from specontext.kv.copying import copy_pages
from specontext.kv.pool import PagePool
from specontext.kv.prefix_tree import Block, PrefixTree, Tokens
from specontext.kv.slot_fill import fill_slots
from specontext.kv.streams import COMPUTE, PREFETCH, WRITE_BACK
from specontext.kv.tiered import TieredKV


def weak(method: Callable[[], None]) -> Callable[[], None]:
    """Calls a method of an object as long as there is the object."""
    reference = WeakMethod(method)

    def call() -> None:
        if (alive := reference()) is not None:
            alive()

    return call


@dataclass(frozen=True)
class State:
    """What is known of pages of tokens besides KV, in the number format of KV.

    Attributes:
        each: [n, numbers], of every page.
        last: [n, numbers] of the last token of every page; of the very last page only where it comes back.
    """

    each: Tensor
    last: Tensor


class PrefixStore:
    """Blocks of one engine and their copies.

    Args:
        each, last: numbers of a block's state; see `State`.
    """

    def __init__(self, kv: TieredKV, *, each: int, last: int) -> None:
        self.kv = kv
        row = kv.arena.rows[0].numel()
        self._sizes = each, last
        self._each_rows, self._last_rows = -(-each // row), -(-last // row)
        self._page_rows = kv.page_size * kv.shape.kv_heads
        state_pages = -(-(self._each_rows + self._last_rows) // self._page_rows)
        # The pool of the host holds the tree: with a weak reference the tables of an engine that is dropped go at once.
        self.tree = PrefixTree(kv.page_size, kv.shape.layers + state_pages, weak(kv.join_copies))
        kv.host.pages.cache = self.tree

    def expect(self, blocks: int) -> None:
        """Have memory made ready for blocks that will soon be kept, beside those that are: a GPU pins it meanwhile."""
        self.kv.host.prepare(blocks * self.tree.block_pages)

    def keep(self, chain: list[Block], pages: Sequence[Tokens], seat: int, state: State) -> None:
        """Add blocks behind a chain for the next pages of a seat, as many as there is room for without taking it from anyone.

        Args:
            chain: of all pages before them; it grows.
            pages: tokens of the pages.
            state: of these pages.
        """
        free, size = self.kv.host.pages, self.tree.block_pages
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
            self._keep_state(of_blocks, State(state.each[:count], state.last[:count]))
            self.kv.copies = self.kv.streams.record(WRITE_BACK)
        self.tree.touch(chain)

    def bring(self, chain: Sequence[Block], seat: int) -> State:
        """Put the rows of a chain into an open seat that has nothing stored yet; what is computed next finds them there.

        Returns:
            The state of its tokens.
        """
        kv, tokens = self.kv, len(chain) * self.kv.page_size
        kv.join_copies()
        of_blocks = self._pages(chain)
        self._copy(of_blocks, seat, 0, to_seat=True)
        state = self._bring_state(of_blocks)
        kv.streams.wait(COMPUTE, kv.streams.record(PREFETCH))
        for layer in kv.offloaded:
            fill_slots(kv, layer, {seat: tokens}, from_host=True)
        return state

    def _pages(self, blocks: Sequence[Block]) -> Tensor:
        """Pages of some blocks: int64 [pages of a block, blocks] on the device."""
        pages = torch.tensor([block.pages for block in blocks], dtype=torch.int64)
        if self.kv.device.type == "cuda":
            pages = pages.pin_memory()  # so that the host does not wait for the step that is being computed
        return pages.to(self.kv.device, non_blocking=True).T

    def _copy(self, pages: Tensor, seat: int, first: int, *, to_seat: bool) -> None:
        """Rows of all layers between blocks and a seat's pages from number `first` on, where each layer lives."""
        kv, count = self.kv, pages.shape[1]
        of_blocks = kv.host, pages[: kv.shape.layers]
        homes: list[tuple[bool, PagePool, Tensor, Tensor]] = [
            (any(kv.resident), kv.arena, kv.token_pages.table, ~kv.resident_flags),
            (not all(kv.resident), kv.host, kv.host_pages.table, kv.resident_flags),
        ]
        for used, pool, table, skipped in homes:
            if used:
                of_seat = pool, table[:, seat, first : first + count]
                source, target = (of_blocks, of_seat) if to_seat else (of_seat, of_blocks)
                side = PREFETCH if to_seat else WRITE_BACK
                copy_pages(kv, source, target, count * kv.page_size, skipped=skipped, side=side)

    # State ------------------------------------------------------------------------------------------------------------

    def _keep_state(self, pages: Tensor, state: State) -> None:
        kv, count = self.kv, pages.shape[1]
        row_numbers = self._each_rows + self._last_rows
        if not row_numbers:
            return
        width = kv.arena.rows[0].numel()
        numbers = kv.arena.rows.new_zeros((count, row_numbers * width))
        numbers[:, : self._sizes[0]] = state.each
        numbers[:, self._each_rows * width :][:, : self._sizes[1]] = state.last
        rows = numbers.view(-1, *kv.arena.rows.shape[1:])
        here, there = torch.arange(len(rows), device=kv.device), self._state_rows(pages, 0, row_numbers)
        kv.streams.wait(WRITE_BACK, kv.streams.record(COMPUTE))
        with kv.streams.on(WRITE_BACK):
            gather_rows(rows, here, kv.host.rows, there)
        kv.streams.keep(WRITE_BACK, rows, here, there)

    def _bring_state(self, pages: Tensor) -> State:
        kv, count = self.kv, pages.shape[1]
        of_each = self._state_rows(pages, 0, self._each_rows)
        of_last = self._state_rows(pages[:, -1:], self._each_rows, self._each_rows + self._last_rows)
        there = torch.cat((of_each, of_last))
        here = torch.arange(len(there), device=kv.device)
        rows = kv.arena.rows.new_empty((len(there), *kv.arena.rows.shape[1:]))
        kv.streams.wait(PREFETCH, kv.streams.record(COMPUTE))
        with kv.streams.on(PREFETCH):
            gather_rows(kv.host.rows, there, rows, here)
        kv.streams.keep(PREFETCH, there, here, rows)
        each, last = rows.split([len(of_each), len(of_last)])
        width = kv.arena.rows[0].numel()
        return State(
            each.view(count, self._each_rows * width)[:, : self._sizes[0]],
            last.view(1, self._last_rows * width)[:, : self._sizes[1]],
        )

    def _state_rows(self, pages: Tensor, start: int, stop: int) -> Tensor:
        """Host rows of the rows start .. stop - 1 of state, of one block after the other: int64 [blocks * rows]."""
        at = torch.arange(start, stop, device=self.kv.device)
        found = pages[self.kv.shape.layers + at // self._page_rows] * self._page_rows + at[:, None] % self._page_rows
        return found.T.reshape(-1)

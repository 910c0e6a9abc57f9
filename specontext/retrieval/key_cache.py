"""The retrieval head's own key cache, in pages that it is given."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.key_rows import append_keys
from specontext.memory.pages import PageAllocator


class KeyCache:
    """Keys of the retrieval head for all tokens of all seats.

    Args:
        keys: [pages, page_size, key heads, D] on the device, page 0 zero; strides may leave gaps.
        pages: which of the pages are free; others may take some, too.

    Attributes:
        table: int64 [seats + 1, P], pages of every seat; the last row belongs to no seat.
    """

    def __init__(self, keys: Tensor, pages: PageAllocator, *, seats: int, max_tokens: int) -> None:
        self.keys, self.pages, self.page_size = keys, pages, keys.shape[1]
        self.table = torch.zeros((seats + 1, -(-max_tokens // self.page_size)), dtype=torch.int64, device=keys.device)
        self.held: list[list[int]] = [[] for _ in range(seats)]

    def grow(self, seat: int, tokens: int) -> bool:
        """Make room for `tokens` tokens of a seat; False where there are too few pages, and nothing is taken."""
        before = len(self.held[seat])
        new = -(-tokens // self.page_size) - before
        if new <= 0:
            return True
        if new > self.pages.num_free:
            return False
        pages = self.pages.allocate(new)
        self.held[seat] += pages
        numbers = torch.tensor(pages, dtype=torch.int64).to(self.keys.device)
        # Zeroed, so that a page that is not full yet never brings in values that are not numbers.
        self.keys.index_fill_(0, numbers, 0)
        self.table[seat, before : before + new] = numbers
        return True

    def close(self, seat: int) -> None:
        self.pages.free(self.held[seat])
        self.held[seat] = []
        self.table[seat] = 0

    def append(self, seats: Tensor, positions: Tensor, keys: Tensor) -> None:
        """Store keys [T, key heads, D] of tokens at `positions` [T] of `seats` [T]; those at negative positions are dropped."""
        append_keys(self.keys, self.table, seats, positions, keys)

    def pages_of(self, seats: Tensor, span: int) -> Tensor:
        """Pages of the positions 0 .. span - 1 of some seats: int64 [R, P]."""
        return self.table[:, : -(-span // self.page_size)].index_select(0, seats)

    def keys_of(self, seat: int, tokens: int, start: int = 0) -> Tensor:
        """A copy of the keys of a seat's tokens start .. tokens - 1: [tokens - start, key heads, D]."""
        first = start // self.page_size
        pages = self.table[seat, first : -(-tokens // self.page_size)]
        return self.keys[pages].flatten(0, 1)[start - first * self.page_size :][: tokens - start]

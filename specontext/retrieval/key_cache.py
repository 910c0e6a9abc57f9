"""The retrieval head's own key cache, in pages."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.memory.pages import PageAllocator


class KeyCache:
    """Keys of the retrieval head for all tokens of all seats.

    Attributes:
        keys: [pages, page_size, G, D].
    """

    def __init__(
        self,
        *,
        seats: int,
        max_tokens: int,
        num_pages: int,
        page_size: int,
        groups: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.page_size = page_size
        self.pages = PageAllocator(num_pages, "retrieval head's key cache")
        self.keys = torch.empty((num_pages, page_size, groups, head_dim), dtype=dtype, device=device)
        self.keys[0] = 0
        self.table = torch.zeros((seats, -(-max_tokens // page_size)), dtype=torch.int64, device=device)
        self._owned: list[list[int]] = [[] for _ in range(seats)]

    def open(self, seat: int, tokens: int) -> None:
        """Give a seat pages for `tokens` tokens; raises OutOfPagesError and takes nothing when there are too few."""
        assert not self._owned[seat], f"seat {seat} is taken"
        pages = self.pages.allocate(-(-tokens // self.page_size))
        self._owned[seat] = pages
        # Zeroed, so that a page that is not full yet never brings in values that are not numbers.
        self.keys[pages] = 0
        self.table[seat, : len(pages)] = torch.tensor(pages, dtype=torch.int64)

    def close(self, seat: int) -> None:
        self.pages.free(self._owned[seat])
        self._owned[seat] = []
        self.table[seat] = 0

    def append(self, seats: Tensor, positions: Tensor, keys: Tensor) -> None:
        """Store keys [T, G, D] of the tokens at `positions` [T] of `seats` [T]."""
        self.keys[self.table[seats, positions // self.page_size], positions % self.page_size] = keys

    @property
    def most_positions(self) -> int:
        """Positions that the pages of an open seat reach to, at most: a bound that the host knows without asking the device."""
        return self.page_size * max(map(len, self._owned))

    def pages_of(self, seats: Tensor, span: int) -> Tensor:
        """Pages of the positions 0 .. span - 1 of some seats: int64 [R, P]."""
        return self.table[:, : -(-span // self.page_size)].index_select(0, seats)

    def gather(self, seats: Tensor, span: int) -> Tensor:
        """A copy of the keys of positions 0 .. span - 1 (rounded up to a page) of some seats: [R, S, G, D]."""
        return self.keys[self.pages_of(seats, span)].flatten(1, 2)

    def check_integrity(self) -> None:
        """Raises AssertionError when a page is lost or held twice."""
        self.pages.check_integrity(self._owned)

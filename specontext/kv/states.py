"""States that layers keep instead of KV, or beside it: of fixed size, for every seat, on the device.

    [mixers alike, seat, ...]   one tensor for each shape and number format

They are part of what an engine allocates at its start, as rings are. What a request that waits has of them, and what is known
of prompts, lies in pages of the host. A state cannot be taken back: what has once been stored holds all tokens up to there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from specontext.kv.host_bytes import load_bytes, store_bytes
from specontext.kv.transfers import Transfers
from specontext.layer_sizes import StateTensor


class SeatStates:
    """The states of all seats.

    Args:
        states: of one request, as measured.
    """

    def __init__(self, states: Sequence[StateTensor], *, seats: int, device: torch.device) -> None:
        alike: dict[tuple[tuple[int, ...], torch.dtype], list[StateTensor]] = {}
        for state in states:
            alike.setdefault((state.shape, state.dtype), []).append(state)
        # The last row belongs to no seat: the padding of a batch points at it.
        self._all = [
            torch.zeros((len(group), seats + 1, *shape), dtype=dtype, device=device) for (shape, dtype), group in alike.items()
        ]
        self._of: dict[int, dict[tuple[bool, int], Tensor]] = {}  # by mixer, of all seats
        for tensor, group in zip(self._all, alike.values(), strict=True):
            for row, state in enumerate(group):
                self._of.setdefault(state.mixer, {})[state.recurrent, state.index] = tensor[row]
        self.seat_bytes = sum(state.num_bytes for state in states)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._all)

    def of(self, mixer: int, seats: Tensor) -> dict[tuple[bool, int], Tensor]:
        """Copies of the states of some seats [R] in a mixer."""
        return {kind: states.index_select(0, seats) for kind, states in self._of[mixer].items()}

    def put(self, mixer: int, seats: Tensor, states: Mapping[tuple[bool, int], Tensor]) -> None:
        """Store the states of some seats [R] in a mixer."""
        for kind, state in states.items():
            stored = self._of[mixer][kind]
            stored.index_copy_(0, seats, state.to(stored.dtype))

    def reset(self, seat: int) -> None:
        """A request begins: no token came before."""
        for tensor in self._all:
            tensor[:, seat].zero_()

    def clear_padding(self) -> None:
        """Forget what padding has left, so that it never grows beyond numbers."""
        self.reset(-1)

    # Copies on the host -------------------------------------------------------------------------------------------------

    def pages_of_seat(self, page_bytes: int) -> int:
        """Pages of the host, each of so many bytes, that hold a request's states."""
        return -(-self.seat_bytes // page_bytes)

    def store(self, transfers: Transfers, seat: int, pages: Tensor) -> None:
        """Copy a seat's states to pages int64 [pages, 1] of the host; the next step need not wait to write to them."""
        parts = [tensor[:, seat].contiguous().view(-1).view(torch.uint8) for tensor in self._all]
        store_bytes(transfers, torch.cat(parts)[None], pages)

    def load(self, transfers: Transfers, seat: int, pages: Tensor) -> None:
        """Copy them back; what is computed next finds them there."""
        sizes = [tensor[:, 0].nbytes for tensor in self._all]
        numbers = load_bytes(transfers, self.seat_bytes, pages)[0]
        for tensor, part in zip(self._all, numbers.split(sizes), strict=True):
            tensor[:, seat] = part.clone().view(tensor.dtype).view(tensor[:, seat].shape)  # at an address that fits the format

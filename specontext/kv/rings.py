"""KV of layers with a window: a ring of the last tokens for every seat, on the device, and nothing else.

    rows [K|V, D]:  layer, seat, entry (position % entries), KV head

Rings are part of what an engine allocates at its start. They do not grow with a context, nothing in them is selected, and they
have no place on the host while their request has a seat. What waits, and what is known of prompts, lies in pages of the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specontext.core import Segment
from specontext.kernels.tables import NewTokens
from specontext.kv.host_bytes import load_bytes, store_bytes
from specontext.kv.transfers import Transfers
from specontext.layer_sizes import Window, repeated
from specontext.memory.windows import kept_tokens, ring_entries
from specontext.model_shape import ModelShape


@dataclass(frozen=True, eq=False)
class Kept:
    """Rows of the last tokens of a prompt's chunk, of which rings hold fewer, until known pages have been copied from them.

    Attributes:
        first: the first of these tokens, where a page begins.
        rows: [layers, tokens, Hkv, 2, D].
    """

    first: int
    rows: Tensor


class Rings:
    """The rings of all seats.

    Args:
        page_size: tokens of a page of known prompts.
        max_tokens: longest context.

    Attributes:
        windows: of the layers, numbered among themselves.
        read_again: layers whose KV others read too.
        entries: tokens that a ring holds, whole pages.
        followed: seats of prompts whose pages are to be known.
        kept: what the last step's chunks of these have left, by seat.
    """

    def __init__(self, shape: ModelShape, *, seats: int, page_size: int, max_tokens: int, device: torch.device) -> None:
        self.windows, self.page_size = shape.windowed, page_size
        self.read_again = repeated(shape.window_read_order)
        self.entries = ring_entries(shape, max_tokens=max_tokens, page_size=page_size)
        self.heads, width = shape.window_heads or (shape.kv_heads, shape.head_dim)
        self._seats = seats + 1  # the last row belongs to no seat: the padding of a batch points at it
        size = (len(self.windows), self._seats, self.entries, self.heads, 2, width)
        self.followed: set[int] = set()
        self.kept: dict[int, Kept] = {}
        self._most_kept = kept_tokens(shape)
        self._kv = torch.zeros(size, dtype=shape.dtype, device=device)

    @property
    def num_bytes(self) -> int:
        return self._kv.numel() * self._kv.itemsize

    def rows(self, layer: int) -> Tensor:
        """The rows of a layer, [N, 2, D]."""
        return self._kv[layer].view(-1, *self._kv.shape[-2:])

    def rows_of(self, window: Window, seats: Tensor, positions: Tensor) -> Tensor:
        """Rows of what the tokens at these positions read, the same in every layer with this window: int64 [R, Hkv, B], -1 for
        none.

        Args:
            seats, positions: int64 [R]; a negative position is padding and reads nothing.
        """
        back = torch.arange(min(window.size, self.entries) - 1, -1, -1, device=seats.device)
        tokens = positions[:, None] - back  # ascending
        place = seats[:, None] * self.entries + tokens % self.entries
        rows = place[:, None] * self.heads + torch.arange(self.heads, device=seats.device)[:, None]
        read = (tokens >= 0) & (tokens >= window.first(positions)[:, None])
        return rows.masked_fill_(~read[:, None], -1)

    def append(self, layer: int, new: NewTokens) -> None:
        """Store K and V of new tokens, one a request."""
        self._write(layer, new.seats, new.positions, new.key, new.value)

    def append_chunk(self, layer: int, seat: int, start: int, key: Tensor, value: Tensor) -> None:
        """Store the last tokens of a chunk [C, Hkv, D] that begins at position `start`; what they push out is lost."""
        kept = min(len(key), self.entries)
        positions = torch.arange(start + len(key) - kept, start + len(key), device=key.device)
        self._write(layer, torch.full_like(positions, seat), positions, key[-kept:], value[-kept:])

    def _write(self, layer: int, seats: Tensor, positions: Tensor, key: Tensor, value: Tensor) -> None:
        self._kv[layer].index_put_((seats, positions % self.entries), torch.stack((key, value), dim=2).to(self._kv.dtype))

    def before(self, layer: int, seat: int, start: int) -> tuple[Tensor, int]:
        """K and V [P, Hkv, 2, D] of the stored tokens that the windows of a chunk reach that begins at position `start`, and the
        position of the first of them."""
        first = max(0, self.windows[layer].first(start))
        return self._stored(layer, seat, first, start), first

    def _stored(self, layer: int, seat: int, start: int, stop: int) -> Tensor:
        """K and V [T, Hkv, 2, D] of the tokens start .. stop - 1, which a ring still holds."""
        tokens = torch.arange(start, stop, device=self._kv.device) % self.entries
        return self._kv[layer, seat].index_select(0, tokens)

    # Known prompts ------------------------------------------------------------------------------------------------------

    def begin_keeping(self, segments: Sequence[Segment]) -> None:
        """Make room for the last tokens of the chunks of a step whose pages are to be known."""
        self.kept.clear()
        left = self._most_kept
        for segment in segments:
            stop = segment.start + segment.length
            first = max(segment.start // self.page_size * self.page_size, -(-(stop - left) // self.page_size) * self.page_size)
            if segment.seat in self.followed and first < stop:
                rows = self._kv.new_empty((len(self.windows), stop - first, *self._kv.shape[-3:]))
                self.kept[segment.seat] = Kept(first, rows)
                left -= stop - first

    def keep(self, layer: int, segment: Segment, key: Tensor, value: Tensor) -> None:
        """Keep the last tokens of a chunk [C, Hkv, D] in a layer, before the ring gets them."""
        if (kept := self.kept.get(segment.seat)) is None:
            return
        begun = max(0, segment.start - kept.first)  # tokens of the first page that came before the chunk
        if begun:
            kept.rows[layer, :begun] = self._stored(layer, segment.seat, kept.first, segment.start)
        tail = kept.rows.shape[1] - begun
        kept.rows[layer, begun:, :, 0], kept.rows[layer, begun:, :, 1] = key[-tail:], value[-tail:]

    # Copies on the host -------------------------------------------------------------------------------------------------

    def pages_of(self, tokens: int, page_bytes: int) -> int:
        """Pages of the host, each of so many bytes, that hold so many tokens of all layers."""
        return -(-len(self.windows) * tokens * self._kv[0, 0, 0].nbytes // page_bytes)

    def copy(self, transfers: Transfers, seat: int, first: Sequence[int], width: int, pages: Tensor, *, to_host: bool) -> None:
        """Copy tokens of a seat in all layers to the host, which nothing waits for yet, or back.

        Args:
            first: tokens from each of which on `width` tokens are copied, which lie one after another in the ring.
            pages: int64 [pages of as many tokens, len(first)], pages of the host.
        """
        begin = torch.tensor([token % self.entries for token in first]).to(self._kv.device)
        entries = begin[:, None] + torch.arange(width, device=begin.device)  # [places, width]
        if to_host:
            self._store(transfers, self._kv[:, seat, entries], pages)
            return
        shape = (len(first), len(self.windows), width, *self._kv.shape[-3:])
        self._kv[:, seat, entries] = self._load(transfers, shape, pages).transpose(0, 1)

    def copy_kept(self, transfers: Transfers, kept: Kept, first: Sequence[int], width: int, pages: Tensor) -> None:
        """The same to the host, from what has been kept of a chunk."""
        begin = torch.tensor([token - kept.first for token in first]).to(self._kv.device)
        self._store(transfers, kept.rows[:, begin[:, None] + torch.arange(width, device=begin.device)], pages)

    def _store(self, transfers: Transfers, numbers: Tensor, pages: Tensor) -> None:
        """Copy numbers [layers, places, width, Hkv, 2, D] to each place's pages, beside what is computed."""
        store_bytes(transfers, numbers.transpose(0, 1).flatten(1).view(torch.uint8), pages)

    def _load(self, transfers: Transfers, shape: tuple[int, ...], pages: Tensor) -> Tensor:
        """Numbers [places, ...] from each place's pages; what is computed next finds them there."""
        numbers = load_bytes(transfers, math.prod(shape[1:]) * self._kv.itemsize, pages)
        return numbers.view(self._kv.dtype).view(shape)

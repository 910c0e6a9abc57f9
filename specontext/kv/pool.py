"""A pool of KV pages in one tier, the arena of a device or the pool of its host. How rows lie in pages, `layout.py` says."""

from __future__ import annotations

import math
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from specontext.errors import HostMemoryError, MemoryPlanError
from specontext.kernels.spans import CODES
from specontext.kernels.tables import Pages, Slots
from specontext.kv.host_memory import HostMemory
from specontext.kv.layout import Layout, places_of
from specontext.memory.layer_blocks import LayerBlocks
from specontext.memory.pages import PageAllocator


class PagePool:
    """Rows of one tier and the allocator of its pages.

    Args:
        blocks: layers whose rows lie side by side in its pages.
        device: where page tables are.

    Attributes:
        rows: [pages * page_size * Hkv * places of a block, *row], a row being [2, D]; in 8 bits [pages, rows of a page, row].
        memory: where the rows lie, for the host tier; None for the device's.
    """

    def __init__(
        self, layout: Layout, blocks: LayerBlocks, num_pages: int, name: str, device: torch.device, home: HostMemory | None = None
    ) -> None:
        self.layout, self.blocks, self.places = layout, blocks, places_of(blocks, device)
        self.page_rows = layout.page_size * layout.heads * blocks.places
        self.page_bytes = layout.page_bytes * blocks.places
        row = layout.row_size()
        # Rows in 8 bits lie in spans, codes and scales apart: each page is one.
        size = (num_pages, self.page_rows, *row) if layout.dtype in CODES else (num_pages * self.page_rows, *row)
        self.memory = home
        ready = None if self.memory is None else partial(_ready_pages, self.memory, num_pages, self.page_bytes)
        self.pages = PageAllocator(num_pages, name, ready)
        if home is not None:
            self.rows = home.bytes[: num_pages * self.page_bytes].view(layout.dtype).view(size)
            home.reach(self.page_bytes)
        else:
            self.rows = _empty(size, layout.dtype, device, name)
        self.rows[: 1 if layout.dtype in CODES else self.page_rows] = 0

    def paged(self, table: Tensor) -> Pages:
        """The rows with a page table int64 [blocks, seats, P], as kernels are handed them."""
        return Pages(self.rows, table, self.layout.page_size, self.layout.heads, self.places)

    def slots(self, table: Tensor, sink: int, recent: int) -> Slots:
        """The same of slots."""
        return Slots(self.rows, table, self.layout.page_size, self.layout.heads, self.places, sink, recent)

    def allocate(self, count: int, *, claimed: bool = False) -> list[int]:
        """`count` pages whose memory is there; raises OutOfPagesError or HostMemoryError, and nothing is taken.

        Args:
            claimed: they are of those that were claimed.
        """
        if claimed:
            self.pages.claimed -= count
        try:
            return self._allocate(count)
        except BaseException:
            if claimed:
                self.pages.claimed += count
            raise

    def at_once(self, count: int) -> int:
        """How many of so many claimed pages can be had without waiting for their memory; it is made ready meanwhile."""
        if self.memory is None or self.memory.ready_bytes >= self.num_bytes:
            return count
        here = self.pages.num_ready + self.pages.claimed
        here += self.pages.cache.num_idle if self.pages.cache is not None else 0
        if here < count:
            self.prepare(count)
        return max(0, min(count, here))

    def _allocate(self, count: int) -> list[int]:
        pages = self.pages.allocate(count)
        if self.memory is not None and pages:
            end = max(pages) + 1
            # Memory is made ready ahead of what is in use. A page of the cache may lie far behind that, and is ready.
            ready = _ready_pages(self.memory, self.pages.num_pages, self.page_bytes)
            wanted = end if end > ready else self.pages.num_held + 1
            try:
                self.memory.reach(wanted * self.page_bytes)
            except BaseException:
                self.pages.free(pages[::-1])  # as they were, those that are not ready at the bottom
                raise
        return pages

    def reserve(self, num_bytes: int) -> None:
        """Make so much memory usable now, or all there is; raises HostMemoryError where it cannot be had."""
        if self.memory is not None:
            self.memory.reach(min(num_bytes, self.num_bytes))

    def expect(self, num_bytes: int) -> None:
        """Have so much memory, or all there is, made usable meanwhile, for `reserve` to find."""
        if self.memory is not None:
            self.memory.prepare(min(num_bytes, self.num_bytes))

    def prepare(self, count: int) -> None:
        """Have memory made ready meanwhile for `count` more pages than are in use or kept, as far as there are so many."""
        if self.memory is not None and (end := self._end_of(count)) is not None:
            self.memory.prepare(end)

    def make_ready(self, count: int) -> None:
        """Make it ready now, as far as it can be had."""
        if self.memory is not None and (end := self._end_of(count)) is not None:
            with suppress(HostMemoryError):
                self.memory.reach(end)

    def _end_of(self, count: int) -> int | None:
        """The bytes from the start in which `count` more pages than are in use or kept lie, or as many as there are; None where
        they are ready."""
        assert self.memory is not None
        short = count - self.pages.num_ready
        ready = _ready_pages(self.memory, self.pages.num_pages, self.page_bytes)
        return min((ready + short) * self.page_bytes, self.num_bytes) if short > 0 else None

    def as_keys(self, heads: int, head_dim: int) -> Tensor:
        """The same pages as pages of the retrieval head's keys: [pages, tokens of a page, heads, head_dim].

        A page has room for the keys of as many tokens as fit whole; what is left over at its end is not used.
        """
        numbers = self.page_bytes // self.layout.others.itemsize
        entry = heads * head_dim
        assert entry <= numbers, "a page has no room for the keys of a token"
        shape = (self.pages.num_pages, numbers // entry, heads, head_dim)
        return self.rows.view(-1).view(self.layout.others).as_strided(shape, (numbers, entry, head_dim, 1))

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages."""
        return self.pages.num_pages * self.page_bytes


def _ready_pages(memory: HostMemory, num_pages: int, page_bytes: int) -> int:
    """The first pages, whose memory is there; no method, so that pool and allocator do not keep each other alive."""
    return min(memory.ready_bytes // page_bytes, num_pages)


def _empty(size: tuple[int, ...], dtype: torch.dtype, device: torch.device, name: str) -> Tensor:
    try:
        return torch.empty(size, dtype=dtype, device=device)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise MemoryPlanError(
            f"the {name} asks for {math.prod(size) * dtype.itemsize} bytes and the {device.type} refuses them: lower --gpu-memory"
        ) from error


def make_pools(
    layout: Layout,
    *,
    device_pages: int,
    host_pages: int,
    device: torch.device,
    directory: Path | None = None,
    on_host: Layout | None = None,
) -> tuple[PagePool, PagePool]:
    """The arena of a device, and the pool of its host; the host's rows are pinned for a GPU, or lie in a file in `directory`.

    Args:
        on_host: where rows of the host are of other numbers than those of the device.

    Raises:
        HostMemoryError, MemoryPlanError: host or device refuse the memory.
    """
    arena = PagePool(layout, layout.by_layer, device_pages, "device tier of KV", device)
    on_host = on_host or layout
    host_bytes = host_pages * on_host.page_bytes * on_host.layer_blocks.places
    memory = HostMemory(host_bytes, pinned=device.type == "cuda", directory=directory, near=device)
    return arena, PagePool(on_host, on_host.layer_blocks, host_pages, "host tier of KV", device, memory)

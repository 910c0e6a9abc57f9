"""A pool of KV pages in one tier.

A page holds `page_size` consecutive tokens (or slots) of one layer, all KV heads, as rows [K|V, D]:

    page p, token t of the page, KV head h  ->  row (p * page_size + t) * Hkv + h

so one token of one head is one contiguous read of 2 * D numbers, in the device arena and in the host pool alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.core import ModelShape
from specontext.memory.pages import PageAllocator


class PagePool:
    """Rows of one tier and the allocator of its pages.

    Attributes:
        rows: [pages * page_size * Hkv, 2, D]. On a CPU the operating system commits them as they are first written.
    """

    def __init__(self, shape: ModelShape, num_pages: int, page_size: int, device: torch.device, name: str) -> None:
        self.page_size, self.kv_heads = page_size, shape.kv_heads
        self.pages = PageAllocator(num_pages, name)
        self.rows = torch.empty((num_pages * page_size * shape.kv_heads, 2, shape.head_dim), dtype=shape.dtype, device=device)
        self.rows[: page_size * shape.kv_heads] = 0

    def rows_of(self, pages: Tensor, index: Tensor) -> Tensor:
        """Row numbers of entries.

        Args:
            pages: int64 [R, P], page tables of R requests in one layer.
            index: int64 [R, H, B], token or slot numbers for each KV head (H is Hkv, or 1 when all heads want the same),
                negative where there is none.

        Returns:
            int64 [R, Hkv, B], -1 where there is none.
        """
        present = index >= 0
        entry = index.clamp(min=0)
        page = pages.gather(1, (entry // self.page_size).flatten(1)).view_as(entry)
        heads = torch.arange(self.kv_heads, device=index.device)[None, :, None]
        rows = (page * self.page_size + entry % self.page_size) * self.kv_heads + heads
        return torch.where(present, rows, -1)

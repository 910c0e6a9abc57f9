"""Split-K decode attention over pages: the kernel of `sparse_attention`, with row numbers computed from a page table.

The splits of a request share its own length evenly, so the grid does not depend on lengths, and nothing waits for the host.
"""

from __future__ import annotations

from torch import Tensor

from specontext.kernels.triton.coded_attention import Tile
from specontext.kernels.triton.sparse_attention import launch


def paged_attention(
    query: Tensor,
    arena: Tensor,
    pages: Tensor,
    lengths: Tensor,
    scale: float,
    cap: float | None = None,
    *,
    page_size: int,
    kv_heads: int,
    splits: int | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.paged_attention`.

    Args:
        splits: programs that share the tokens of a (request, KV head); chosen by `choose_splits` when None.
        tile: of a program for rows in 8 bits; see `coded_attention.attend`.
    """
    pages = pages if pages.stride(-1) == 1 else pages.contiguous()
    width = pages.shape[1] * page_size
    return launch(query, arena, pages, (pages.stride(0), 0), lengths, width, kv_heads, scale, page_size, splits, cap, tile)

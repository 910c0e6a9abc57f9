# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Arena rows of a selection for all layers in one launch: per entry 8 bytes are read for a group, and 4 written for a KV head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def selected_rows(
    tokens: Tensor,
    slots: Tensor,
    token_pages: Tensor,
    slot_pages: Tensor,
    resident: Tensor,
    seats: Tensor,
    head_map: Tensor,
    page_size: int,
) -> Tensor:
    """See `specontext.kernels.row_index.selected_rows`; int32, which every arena of fewer than 2 ** 31 rows fits."""
    layers, kv_heads = head_map.shape
    requests, groups, width = tokens.shape
    assert token_pages.is_contiguous() and slot_pages.is_contiguous()
    rows = torch.empty((layers, requests, kv_heads, width), dtype=torch.int32, device=tokens.device)
    if rows.numel():
        _rows[(layers * requests * kv_heads, triton.cdiv(width, BLOCK))](
            tokens.contiguous(),
            slots.contiguous(),
            token_pages,
            slot_pages,
            resident.view(torch.uint8),
            seats.contiguous(),
            head_map.contiguous(),
            rows,
            requests,
            groups,
            width,
            token_pages.shape[1],
            token_pages.shape[2],
            slot_pages.shape[2],
            PAGE=page_size,
            HEADS=kv_heads,
            BLOCK=BLOCK,
        )
    return rows


@triton.jit(do_not_specialize=["requests", "seat_count", "token_width", "slot_width"])
def _rows(
    tokens, slots, token_pages, slot_pages, resident, seats, head_map, rows,
    requests, groups, width, seat_count, token_width, slot_width,
    PAGE: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    reader = tl.program_id(0)
    head = reader % HEADS
    request = reader // HEADS % requests
    layer = (reader // HEADS // requests).to(tl.int64)
    pair = (request * groups + tl.load(head_map + layer * HEADS + head)).to(tl.int64)
    seat = layer * seat_count + tl.load(seats + request)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    if tl.load(resident + layer) != 0:
        entry = tl.load(tokens + pair * width + column, mask=inside, other=-1)
        page = tl.load(token_pages + seat * token_width + entry // PAGE, mask=entry >= 0, other=0)
    else:
        entry = tl.load(slots + pair * width + column, mask=inside, other=-1)
        page = tl.load(slot_pages + seat * slot_width + entry // PAGE, mask=entry >= 0, other=0)
    row = tl.where(entry >= 0, (page * PAGE + entry % PAGE) * HEADS + head, -1)
    tl.store(rows + reader.to(tl.int64) * width + column, row.to(tl.int32), mask=inside)

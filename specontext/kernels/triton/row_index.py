# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Arena rows of a selection for all layers in one launch: per entry 8 bytes are read for a group, and 4 written for a KV head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specontext.kernels.tables import Tiers
from specontext.kernels.triton.rows import piece_of

BLOCK = 1024


def selected_rows(tiers: Tiers, layers: range, seats: Tensor, head_map: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
    """See `specontext.kernels.row_index.selected_rows`; int32, which every arena of fewer than 2 ** 31 rows fits."""
    requests, groups, width = tokens.shape
    here, part = tiers.tokens, slice(layers.start, layers.stop)
    there = tiers.slots if tiers.slots is not None else here  # without slots all layers are resident
    tables = [pages.table[part] for pages in (here, there)]
    assert layers.step == 1 and all(table.is_contiguous() for table in tables)
    rows = torch.empty((len(layers), requests, here.heads, width), dtype=torch.int32, device=tokens.device)
    if rows.numel():
        _rows[(len(layers) * requests * here.heads, triton.cdiv(width, BLOCK))](
            tokens.contiguous(),
            slots.contiguous(),
            *tables,
            tiers.resident[part].view(torch.uint8),
            seats.contiguous(),
            head_map[part].contiguous(),
            rows,
            requests,
            groups,
            width,
            *tables[0].shape[1:],
            tables[1].shape[2],
            PAGE=here.size,
            HEADS=here.heads,
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
        row = piece_of(token_pages + seat * token_width, entry, head, entry >= 0, PAGE, HEADS)
    else:
        entry = tl.load(slots + pair * width + column, mask=inside, other=-1)
        row = piece_of(slot_pages + seat * slot_width, entry, head, entry >= 0, PAGE, HEADS)
    row = tl.where(entry >= 0, row, -1)
    tl.store(rows + reader.to(tl.int64) * width + column, row.to(tl.int32), mask=inside)

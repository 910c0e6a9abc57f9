"""Arena rows of a selection: where attention finds the entries that were chosen, in whichever tier their layer lives."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.dispatch import use_triton


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
    """Arena rows of the entries that every KV head of every layer reads, in the selection's order.

    A resident layer finds an entry by its token in its token pages, an offloaded one by its slot in its slot pages:
    row = (page * page_size + entry % page_size) * Hkv + head.

    Args:
        tokens, slots: int64 [R, G, B], -1 is no entry in either. Slots are not looked at where all layers are resident.
        token_pages, slot_pages: int64 [L, seats, P], page tables of the layers.
        resident: bool [L], where each layer lives; on a GPU it is read there, so that a captured graph serves both.
        seats: int64 [R], rows of the page tables.
        head_map: int64 [L, Hkv], the group whose entries a KV head reads.

    Returns:
        int64 or int32 [L, R, Hkv, B], -1 where there is no entry.
    """
    if use_triton(tokens):
        from specontext.kernels.triton.row_index import selected_rows as kernel

        return kernel(tokens, slots, token_pages, slot_pages, resident, seats, head_map, page_size)
    return selected_rows_reference(tokens, slots, token_pages, slot_pages, resident, seats, head_map, page_size)


def selected_rows_reference(
    tokens: Tensor,
    slots: Tensor,
    token_pages: Tensor,
    slot_pages: Tensor,
    resident: Tensor,
    seats: Tensor,
    head_map: Tensor,
    page_size: int,
) -> Tensor:
    """See `selected_rows`: layer by layer, so that what is worked on stays in the cache."""
    layers, kv_heads = head_map.shape
    heads = torch.arange(kv_heads, device=tokens.device)[:, None]
    rows = tokens.new_empty((layers, len(seats), kv_heads, tokens.shape[-1]))
    for layer, on_device in enumerate(resident.tolist()):
        entries, pages = (tokens, token_pages) if on_device else (slots, slot_pages)
        entry = entries[:, head_map[layer]]  # [R, Hkv, B]
        page = pages[layer].index_select(0, seats).gather(1, (entry.clamp(min=0) // page_size).flatten(1)).view_as(entry)
        found = page.mul_(page_size * kv_heads).add_(entry % page_size * kv_heads).add_(heads)
        rows[layer] = found.masked_fill_(entry < 0, -1)
    return rows

"""Arena rows of a selection: where attention finds the entries that were chosen, in whichever tier their layer lives."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.dispatch import operation
from specontext.kernels.tables import Tiers


@operation(decided_by="tokens")
def selected_rows(tiers: Tiers, layers: range, seats: Tensor, head_map: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
    """Arena rows of the entries that every KV head of some layers reads, in the selection's order.

    A resident layer finds an entry by its token in its token pages, an offloaded one by its slot in its slot pages. On a CPU it
    goes layer by layer, so that what is worked on stays in the cache.

    Args:
        layers: neighbouring layers. Where they live is read on the device, so that a captured graph serves whichever it is.
        seats: int64 [R].
        head_map: int64 [L, Hkv] of all layers, the group whose entries a KV head reads.
        tokens, slots: int64 [R, G, B], -1 is no entry in either. Slots are not looked at where all layers are resident.

    Returns:
        int64 or int32 [layers, R, Hkv, B], -1 where there is no entry.
    """
    heads = torch.arange(tiers.tokens.heads, device=tokens.device)[:, None]
    rows = tokens.new_empty((len(layers), len(seats), tiers.tokens.heads, tokens.shape[-1]))
    for found, layer in zip(rows, layers, strict=True):
        entries, pages = (tokens, tiers.tokens) if tiers.slots is None or bool(tiers.resident[layer]) else (slots, tiers.slots)
        entry = entries[:, head_map[layer]]  # [R, Hkv, B]
        table = pages.table_of(layer).index_select(0, seats)
        page = table.gather(1, (entry.clamp(min=0) // pages.size).flatten(1)).view_as(entry)
        found.copy_(pages.pieces(page, entry).add_(heads).masked_fill_(entry < 0, -1))
    return rows

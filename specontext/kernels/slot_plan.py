"""Where a selection is: the set difference between it and what the slots hold, slots for what is missing, and arena rows; and
what is counted of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.dispatch import operation
from specontext.kernels.tables import Copies, Tiers

NOTHING = torch.iinfo(torch.int32).max  # where no token was chosen, behind all that were


@operation(decided_by="tokens")
def plan_slots(
    tokens: Tensor, seats: Tensor, slot_of_token: Tensor, token_of_slot: Tensor, last_used: Tensor, step: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Find a slot for every selected token: hits stay where they are, misses take the least recently used slots.

    Misses, in their order in `tokens`, take the slots in order of (last_used, slot). The three tables, contiguous, are
    updated in place. Every (request, group) pair is independent of the others. On a CPU only entries of the selection and N
    numbers a pair are touched, nothing of size S.

    Args:
        tokens: int64 [R, G, B] distinct tokens of each pair, -1 is skipped. B must not exceed N.
        seats: int64 [R], rows of the tables that the requests have, distinct where a request has tokens.
        slot_of_token: int32 [seats, G, S], slot that holds a token, -1 for none.
        token_of_slot: int32 [seats, G, N], token that a slot holds, -1 for none.
        last_used: int32 [seats, G, N], step in which a slot was last read.
        step: number of this step, greater than any in `last_used`: an int, or an int32 scalar on the tables' device, which a
            captured CUDA graph reads anew in every replay.

    Returns:
        slots: int64 [R, G, B], -1 where skipped; missing: bool [R, G, B], tokens that were in no slot before.
    """
    groups, width = tokens.shape[1:]
    span, slot_count = slot_of_token.shape[-1], token_of_slot.shape[-1]
    pairs = (seats[:, None] * groups + torch.arange(groups, device=tokens.device)).view(-1, 1)  # rows of the tables [R * G, 1]
    slot_of, token_of, used = slot_of_token.view(-1), token_of_slot.view(-1), last_used.view(-1)
    wanted = tokens.reshape(-1, width)
    present = wanted >= 0
    slots = (
        slot_of.index_select(0, (pairs * span + wanted.clamp(min=0)).view(-1)).long().view_as(wanted).masked_fill_(~present, -1)
    )
    hit = slots >= 0
    missing = present ^ hit
    used.index_fill_(0, (pairs * slot_count + slots).masked_select(hit), step)
    counts = missing.sum(-1, keepdim=True)
    most = int(counts.max()) if counts.numel() else 0
    if most:
        # One number orders by last use and then by slot. Slots that were hit carry this step and come last; there are enough
        # before them because B <= N.
        order = torch.arange(slot_count, device=tokens.device)
        age = last_used.view(-1, slot_count).index_select(0, pairs[:, 0]).long() * slot_count + order
        victims = age.topk(most, dim=-1, largest=False, sorted=True).indices
        pair, entry = missing.nonzero(as_tuple=True)
        slot = victims.masked_select(order[:most] < counts)  # in the order of the misses, pair after pair
        token, row = wanted[pair, entry], pairs[pair, 0]
        place = row * slot_count + slot
        evicted = token_of.index_select(0, place)
        slot_of.index_fill_(0, (row * span + evicted).masked_select(evicted >= 0), -1)
        slot_of.index_copy_(0, row * span + token, slot.to(slot_of.dtype))
        token_of.index_copy_(0, place, token.to(token_of.dtype))
        used.index_fill_(0, place, step)
        slots.view(-1).index_copy_(0, pair * width + entry, slot)
    return slots.view_as(tokens), missing.view_as(tokens)


@operation(decided_by="wanted")
def listed(seats: Tensor, source: Tensor, target: Tensor, wanted: Tensor) -> Copies:
    """The entries that are wanted, in their order.

    Args:
        seats: int64 [R].
        source, target: integers [R, G, N].
        wanted: bool [R, G, N].
    """
    counts = wanted.sum(-1, dtype=torch.int32)
    width = int(counts.max()) if counts.numel() else 0
    kept = torch.arange(width, device=wanted.device) < counts[..., None]
    lists = []
    for entries in (source, target):
        packed = torch.zeros(kept.shape, dtype=torch.int32, device=wanted.device)
        lists.append(packed.masked_scatter_(kept, entries.masked_select(wanted).int()))
    return Copies(seats, lists[0], lists[1], counts)


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
        table = pages.table[pages.layers.homes[layer][0]].index_select(0, seats)
        page = table.gather(1, (entry.clamp(min=0) // pages.size).flatten(1)).view_as(entry)
        found.copy_(pages.pieces(page, entry).add_(heads).masked_fill_(entry < 0, -1))
    return rows


@operation(decided_by="tokens")
def count_selection(
    counts: Tensor,
    before: Tensor,
    seats: Tensor,
    tokens: Tensor,
    scored: Tensor,
    missing: Tensor | None,
    readers: Tensor,
    resident: Tensor,
    *,
    sink: int,
    row_bytes: int,
) -> None:
    """Add what a selection reads, and replace what the seats of its requests chose before by what they choose now.

    Where layers live is read on the device, so that a captured graph serves whichever it is.

    Args:
        counts: float64 [seats, 5], added to: entries read by all KV heads, those of them that were on the device, bytes loaded,
            the share of the chosen tokens that the seat had chosen before, and 1 where there is such a share: something was
            chosen in both steps.
        before: int32 [seats, G', W], contiguous: the tokens that a seat chose, ascending, then `NOTHING`. Replaced.
        seats: int64 [R]; rows of padding may share one, if they select nothing.
        tokens, scored: int64 and bool [R, G, B], G at most G', as in `specontext.core.Selection`. The first W that were chosen
            are kept in `before`.
        missing: bool [R, G, B], entries that are loaded by layers that are not resident; None where nothing is.
        readers: int64 [L, G'], KV heads of each layer that read a group.
        resident: bool [L], layers that load nothing.
        sink: entries before those that were chosen; the others follow these.
        row_bytes: of an entry of one KV head of one layer.
    """
    groups, width = tokens.shape[1], before.shape[-1]
    readers = readers[:, :groups]
    read = ((tokens >= 0).sum(-1) * readers.sum(0)).sum(-1)  # [R]
    loaders = (readers * ~resident[:, None]).sum(0)
    loaded = (missing.sum(-1) * loaders).sum(-1) if missing is not None else torch.zeros_like(read)
    then = before.index_select(0, seats)[:, :groups].contiguous()  # [R, G, W]
    # Chosen entries are ascending: with the sinks before them at the end, all are.
    now = torch.where(scored, tokens, NOTHING).to(torch.int32).roll(-sink, -1)[..., :width].contiguous()
    place = torch.searchsorted(then, now).clamp_(max=width - 1)
    again = ((then.gather(-1, place) == now) & (now != NOTHING)).sum((1, 2))
    total = scored.sum((1, 2))
    both = (then[..., 0] != NOTHING).any(-1) & (total > 0)
    share = torch.where(both, again.float() / total.clamp(min=1).float(), 0.0)
    counts.index_add_(0, seats, torch.stack([x.double() for x in (read, read - loaded, loaded * row_bytes, share, both)], dim=-1))
    whole = torch.nn.functional.pad(now, (0, width - now.shape[-1], 0, before.shape[1] - groups), value=NOTHING)
    before.index_copy_(0, seats, whole)

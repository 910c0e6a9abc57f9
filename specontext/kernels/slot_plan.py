"""Set difference between a selection and what the slots hold, and the choice of slots for what is missing."""

from __future__ import annotations

import torch
from torch import Tensor


def plan_slots(
    tokens: Tensor, seats: Tensor, slot_of_token: Tensor, token_of_slot: Tensor, last_used: Tensor, step: int
) -> tuple[Tensor, Tensor]:
    """Find a slot for every selected token: hits stay where they are, misses take the least recently used slots.

    The three tables are updated in place. Every (request, group) pair is independent of the others.

    Args:
        tokens: int64 [R, G, B] distinct tokens of each pair, -1 is skipped. B must not exceed N.
        seats: int64 [R], distinct rows of the tables that the requests have.
        slot_of_token: int32 [seats, G, S], slot that holds a token, -1 for none.
        token_of_slot: int32 [seats, G, N], token that a slot holds, -1 for none.
        last_used: int32 [seats, G, N], step in which a slot was last read.
        step: number of this step, greater than any in `last_used`.

    Returns:
        slots: int64 [R, G, B], -1 where skipped; missing: bool [R, G, B], tokens that were in no slot before.
    """
    wanted = tokens >= 0
    seat = seats[:, None, None].expand_as(tokens)
    group = torch.arange(tokens.shape[1], device=tokens.device)[None, :, None].expand_as(tokens)
    slots = torch.where(wanted, slot_of_token[seat, group, tokens.clamp(min=0)].long(), -1)
    hit, missing = slots >= 0, wanted & (slots < 0)
    last_used[seat[hit], group[hit], slots[hit]] = step
    # Slots that were hit carry this step and come last; there are enough before them because B <= N.
    victims = last_used.index_select(0, seats).argsort(dim=-1, stable=True)
    chosen = victims.gather(-1, (missing.cumsum(-1) - 1).clamp(min=0))
    slots = torch.where(missing, chosen, slots)
    seat, group, slot, token = seat[missing], group[missing], slots[missing], tokens[missing]
    evicted = token_of_slot[seat, group, slot].long()
    held = evicted >= 0
    slot_of_token[seat[held], group[held], evicted[held]] = -1
    slot_of_token[seat, group, token] = slot.to(slot_of_token.dtype)
    token_of_slot[seat, group, slot] = token.to(token_of_slot.dtype)
    last_used[seat, group, slot] = step
    return slots, missing

"""What the device slots of offloaded layers hold: a cache of host rows, managed for all layers at once.

One table serves every layer that reads the same selection, so slot s of (layer, KV head h) holds h's own row of the token
in slot s of the retrieval group that h reads. Methods that select inside the layer have one table a layer.

Slots of one KV head:   [ sinks | ring of recent tokens | hot slots, least recently used is replaced ]
"""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.core import LoadPlan, Selection
from specontext.kernels.rows import fixed_slots
from specontext.kernels.slot_plan import plan_slots


class HotSlots:
    """Slot tables of all seats.

    Attributes:
        token_of_slot: int32 [tables, seats, G, hot], -1 for an empty slot.
        slot_of_token: int32 [tables, seats, G, max_tokens], its inverse.
        last_used: int32 [tables, seats, G, hot], step of the last read.
        steps: int32 [tables], steps planned so far; on the device, so that a captured graph counts on.
    """

    def __init__(
        self, *, tables: int, seats: int, groups: int, slots: int, sink: int, recent: int, max_tokens: int, device: torch.device
    ) -> None:
        self.tables, self.groups, self.slots, self.sink, self.recent = tables, groups, slots, sink, recent
        hot = slots - sink - recent
        self.token_of_slot = torch.full((tables, seats, groups, hot), -1, dtype=torch.int32, device=device)
        self.slot_of_token = torch.full((tables, seats, groups, max_tokens), -1, dtype=torch.int32, device=device)
        self.last_used = torch.zeros((tables, seats, groups, hot), dtype=torch.int32, device=device)
        self.steps = torch.zeros(tables, dtype=torch.int32, device=device)

    def reset(self, seat: int) -> None:
        """Forget what the slots of a seat hold."""
        self.token_of_slot[:, seat] = -1
        self.slot_of_token[:, seat] = -1
        self.last_used[:, seat] = 0

    def plan(self, table: int, seats: Tensor, selection: Selection) -> LoadPlan:
        """Slots of a selection and what must be loaded into them; the tables then say what will be there.

        Args:
            seats: int64 [R].
        """
        step = self.steps[table].add_(1)
        hot = torch.where(selection.scored, selection.tokens, -1)
        hot_slots, missing = plan_slots(
            hot, seats, self.slot_of_token[table], self.token_of_slot[table], self.last_used[table], step
        )
        fixed = fixed_slots(selection.tokens, self.sink, self.recent)
        return LoadPlan(torch.where(selection.scored, hot_slots + self.sink + self.recent, fixed), missing)

    def tokens_of(self, table: int, seats: Tensor, lengths: Tensor) -> Tensor:
        """Tokens that belong into the slots of seats that have `lengths` [R] tokens stored: int64 [R, G, slots], -1 for none."""
        groups = self.token_of_slot.shape[2]
        sinks = torch.arange(self.sink, device=seats.device)
        last = lengths[:, None] - 1
        ring = last - (last - torch.arange(self.recent, device=seats.device)) % self.recent  # the last token of each remainder
        fixed = torch.cat((sinks.expand(len(seats), -1), torch.where(ring >= self.sink, ring, -1)), dim=1)
        fixed = torch.where(fixed < lengths[:, None], fixed, -1)[:, None].expand(-1, groups, -1)
        return torch.cat((fixed, self.token_of_slot[table, seats].long()), dim=2)

    def check_integrity(self) -> None:
        """Raises AssertionError unless the two tables are each other's inverse."""
        table, seat, group, slot = (self.token_of_slot >= 0).nonzero(as_tuple=True)
        tokens = self.token_of_slot[table, seat, group, slot].long()
        assert (self.slot_of_token[table, seat, group, tokens] == slot).all(), "a slot's token does not point back at it"
        assert (self.slot_of_token >= 0).sum() == len(slot), "a token points at a slot that does not hold it"

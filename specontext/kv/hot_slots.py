"""What the device slots of offloaded layers hold: a cache of host rows, managed for all layers at once.

One table serves every layer that reads the same selection, so slot s of (layer, KV head h) holds h's own row of the token
in slot s of the retrieval group that h reads. Methods that select inside the layer have one table a layer.

Slots of one KV head:   [ sinks | ring of recent tokens | hot slots, least recently used is replaced ]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specontext.core import Selection, SlotPlan
from specontext.kernels.rows import fixed_slots
from specontext.kernels.slot_plan import plan_slots


@dataclass(frozen=True)
class SlotSizes:
    """Slots of each KV head of an offloaded layer.

    Attributes:
        count: of all of them, those of the `sink` first and the `recent` last tokens among them.
        tables: 1 when one selection serves all layers, L when layers may select for themselves.
        groups: sets of a selection, at most.
    """

    count: int
    sink: int
    recent: int
    tables: int = 1
    groups: int = 1


class HotSlots:
    """Slot tables of all seats.

    Attributes:
        token_of_slot: int32 [tables, seats, G, hot], -1 for an empty slot.
        slot_of_token: int32 [tables, seats, G, max_tokens], its inverse.
        last_used: int32 [tables, seats, G, hot], step of the last read.
        steps: int32 [tables], steps planned so far; on the device, so that a captured graph counts on.
    """

    def __init__(self, sizes: SlotSizes, *, seats: int, max_tokens: int, device: torch.device) -> None:
        self.sizes, self.sink, self.recent = sizes, sizes.sink, sizes.recent
        pairs, hot = (sizes.tables, seats, sizes.groups), sizes.count - sizes.sink - sizes.recent
        self.token_of_slot = torch.full((*pairs, hot), -1, dtype=torch.int32, device=device)
        self.slot_of_token = torch.full((*pairs, max_tokens), -1, dtype=torch.int32, device=device)
        self.last_used = torch.zeros((*pairs, hot), dtype=torch.int32, device=device)
        self.steps = torch.zeros(sizes.tables, dtype=torch.int32, device=device)

    def reset(self, seat: int) -> None:
        """Forget what the slots of a seat hold."""
        self.token_of_slot[:, seat] = -1
        self.slot_of_token[:, seat] = -1
        self.last_used[:, seat] = 0

    def plan(self, table: int, seats: Tensor, selection: Selection) -> tuple[Selection, SlotPlan]:
        """Slots of a selection and what must be loaded into them; the tables then say what will be there.

        Args:
            seats: int64 [R].

        Returns:
            The selection too, with empty sets behind its own, so that it has as many as the tables.
        """
        step = self.steps[table].add_(1)
        tokens, scored = selection.tokens, selection.scored
        if (short := self.sizes.groups - tokens.shape[1]) > 0:
            tokens = torch.nn.functional.pad(tokens, (0, 0, 0, short), value=-1)
            scored = torch.nn.functional.pad(scored, (0, 0, 0, short), value=False)
            selection = Selection(tokens, scored)
        tables = (self.slot_of_token[table], self.token_of_slot[table], self.last_used[table])
        hot_slots, missing = plan_slots(torch.where(scored, tokens, -1), seats, *tables, step)
        slots = torch.where(scored, hot_slots + self.sink + self.recent, fixed_slots(tokens, self.sink, self.recent))
        return selection, SlotPlan(slots, missing)

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

"""What moves rows in a step: loads before attention, new rows to their tier, and what waits for what. All streams are used here.

Everything that runs beside what is computed begins after all that compute has been given (`beside`), and compute waits for it
where it needs it (`after`, `join`). On a CPU there are no streams, and both change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from specontext.errors import LoadError
from specontext.kernels.quantised_rows import dequantised
from specontext.kernels.rows import append_layer, append_pieces, append_tokens, as_stored, copy_pieces, fixed_slots, row_of
from specontext.kernels.slot_plan import listed, selected_rows
from specontext.kernels.spans import read_rows, row_size
from specontext.kernels.tables import Copies, NewTokens, Pages, Tiers, is_quantised
from specontext.kv.layout import BlockParts, PlacedSelection
from specontext.kv.streams import COMPUTE, PREFETCH, WRITE_BACK, Mark, Streams
from specontext.memory.layer_blocks import LayerBlocks, one_by_one

FIRST_PROGRAMS = 32  # that share the first copy of a step on a GPU


class Transfers:
    """Moves rows between the tiers of a cache, whose tables it reads and never writes.

    Args:
        layer_blocks: the layers that lie side by side on the host.
        resident: for every layer whether its KV is on the device; its owner keeps it up to date.
        adaptive: layers may move.
        write_through: an offloaded layer's new decode rows are on the host within the step, for those who read them there; else
            they follow for all layers at once, from the ring, while the last layer computes.
        verify: every row that attention reads from a slot is compared with the host's.

    Attributes:
        asynchronous: work runs beside the host, and rows of the host are out of attention's reach.
        every, by_layer: what is copied where all KV heads want the same entries, of all blocks of layers and of single layers.
        programs: that share a copy on a GPU; None for the kernel's own number.
        converts: the host's rows are in 8 bits and the device's are not. Rows of a layer on the host are quantised once, when
            they are appended, and slots hold the numbers that the codes stand for: so it makes no difference where attention
            reads them.
    """

    def __init__(
        self,
        tiers: Tiers,
        layer_blocks: LayerBlocks,
        resident: Sequence[bool],
        streams: Streams | None,
        *,
        adaptive: bool,
        write_through: bool,
        verify: bool,
    ) -> None:
        self.tiers, self.layer_blocks, self.resident = tiers, layer_blocks, resident
        self.converts = is_quantised(tiers.host.rows) and not is_quantised(tiers.tokens.rows)
        self.run_on(streams)
        self.adaptive, self.write_through, self.verify = adaptive, write_through or verify, verify
        alike = [[0] * tiers.host.heads] * len(resident)
        device = tiers.resident.device
        self.every = BlockParts.of_map(layer_blocks, alike, device).all
        self.by_layer = BlockParts.of_map(one_by_one(len(resident)), alike, device)
        self.programs: int | None = None
        # New rows on the device, [T, Hkv, places, *row], until all layers of their block have computed them.
        self._staged: dict[str, Tensor] = {}
        members = [[*layers, *[-1] * (layer_blocks.places - len(layers))] for layers in layer_blocks.members]
        self._members = torch.tensor(members, dtype=torch.int64).to(tiers.resident.device)
        self._loaded: list[Mark] = [None] * len(resident)
        self._written: Mark = None
        self._kept: Mark = None  # pages are being copied from seats for others to keep

    # Streams ----------------------------------------------------------------------------------------------------------

    def run_on(self, streams: Streams | None) -> None:
        """Order work by these streams; None for work that happens in the order in which it is said."""
        self._streams, self.asynchronous = streams, streams is not None

    @contextmanager
    def beside(self, side: str, *used: Tensor) -> Iterator[None]:
        """Work that is started inside runs beside what is computed, after all that compute has been given.

        Args:
            used: tensors made elsewhere that it needs until it is done.
        """
        if (streams := self._streams) is None:
            yield
            return
        streams.wait(side, streams.record(COMPUTE))
        with streams.on(side):
            yield
        streams.keep(side, *used)

    def mark(self, side: str) -> Mark:
        """What the side has been given so far; None where it has happened."""
        return self._streams.record(side) if self._streams is not None else None

    def after(self, mark: Mark) -> None:
        """What is computed from now on waits for a mark."""
        if self._streams is not None and mark is not None:
            self._streams.wait(COMPUTE, mark)

    def join(self, *sides: str) -> None:
        """What is computed from now on waits for all that these sides have been given."""
        for side in sides:
            self.after(self.mark(side))

    # The step ---------------------------------------------------------------------------------------------------------

    @property
    def planned(self) -> bool:
        """Whether steps plan slots: where a layer is offloaded; and always where a captured step must serve before and after a
        layer moves, since kernels pass over the layers that are resident."""
        return self.tiers.slots is not None and (not all(self.resident) or (self.adaptive and self.asynchronous))

    def load(self, reading: PlacedSelection, layer: int | None) -> None:
        """Start copying what a plan misses into its slots, for all offloaded layers or for one."""
        plan, slots, tokens = reading.plan, self.tiers.slots, reading.selection.tokens
        assert plan is not None and slots is not None
        parts = reading.reader.blocks
        if layer is not None:
            loads = [(reading.reader.layers.of(layer), [layer])]
        elif self.asynchronous:  # block by block, so that the first layer waits little
            loads = [(parts.of(block), list(self.layer_blocks.members[block])) for block in self._loading]
        else:
            loads = [(parts.all, list(self.layer_blocks.layers))]
        # Compute has read last step's slots, and has written all rows, before it comes to this.
        with self.beside(PREFETCH, reading.seats, tokens, plan.slots, plan.missing):
            copies = listed(reading.seats, tokens, plan.slots, plan.missing)
            for number, (part, layers) in enumerate(loads):
                # Compute soon waits for the first one, and leaves the device idle then.
                programs = self.programs or (FIRST_PROGRAMS if number == 0 and self.asynchronous else None)
                copy_pieces(self.tiers.host, slots, part, self.tiers.resident, copies, programs=programs)
                mark = self.mark(PREFETCH)
                for one in layers:
                    self._loaded[one] = mark

    @property
    def _loading(self) -> list[int]:
        """Blocks that are loaded: where layers move all of them, since a captured step must serve before and after a move."""
        blocks = range(len(self.layer_blocks.sizes))
        return list(blocks) if self.adaptive else self.layer_blocks.of([i for i, here in enumerate(self.resident) if not here])

    def wait(self, layer: int) -> None:
        """What is computed from now on finds the layer's loads in their slots."""
        if self._loaded[layer] is not None:
            self.after(self._loaded[layer])
            self._loaded[layer] = None

    def rows(self, layers: range, reading: PlacedSelection) -> Tensor:
        """Arena rows of a selection for every KV head of some layers, in its order: integers [layers, R, Hkv, B]."""
        tokens, plan = reading.selection.tokens, reading.plan
        slots = tokens if plan is None else plan.slots
        return selected_rows(self.tiers, layers, reading.seats, reading.reader.head_map, tokens, slots)

    def check_rows(self, layer: int, reading: PlacedSelection, rows: Tensor) -> None:
        """Raises LoadError where rows [R, Hkv, B] of an offloaded layer differ from the host's, where that is checked."""
        if not self.verify or self.resident[layer]:
            return
        host, tokens = self.tiers.host, reading.selection.tokens[:, reading.reader.head_map[layer]]
        truth = host.rows_of(layer, reading.seats, tokens)
        read = truth >= 0
        there, stored = read_rows(self.tiers.tokens.rows, rows[read].long()).cpu(), read_rows(host.rows, truth[read].cpu())
        if self.converts:
            stored = dequantised(stored, there)
        if not torch.equal(there.view(torch.uint8), stored.view(torch.uint8)):
            raise LoadError(f"layer {layer}: a slot holds a row that differs from the host's copy")

    def as_stored(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """New K and V [T, Hkv, D] of a layer as attention reads them once they are stored."""
        return as_stored(key, value, self.home(layer).rows)

    def append(self, layer: int, new: NewTokens) -> None:
        """Store K and V of new decode tokens, one a request, where the layer lives."""
        if self.tiers.slots is None or self.converts:  # of what slots hold, codes that were the same could not be made again
            self._append_all(layer, new, "decode")
            return
        append_layer(self.tiers, layer, new, to_host=self.write_through)
        if layer == len(self.resident) - 1 and not self.write_through and self.planned:
            self._write_back(new.seats, new.positions)

    def _write_back(self, seats: Tensor, positions: Tensor) -> None:
        """Copy the rows of one token a request, a sink or the newest in the ring, from all slots to the host at once."""
        slots = self.tiers.slots
        assert slots is not None
        with self.beside(WRITE_BACK, seats, positions):
            tokens = positions.int()[:, None, None]  # [R, 1, 1]: one group, which all heads read
            copies = Copies(seats, fixed_slots(tokens, slots.sink, slots.recent), tokens, (tokens[..., 0] >= 0).int())
            copy_pieces(slots, self.tiers.host, self.every, self.tiers.resident, copies, programs=self.programs)
        self._written = self.mark(WRITE_BACK)

    def append_chunk(self, layer: int, new: NewTokens) -> None:
        """The same for many tokens of prompts: what goes to the host is written while later layers compute."""
        self._append_all(layer, new, "prompt")

    def _append_all(self, layer: int, new: NewTokens, kind: str) -> None:
        tiers, slots = self.tiers, self.tiers.slots
        if self.resident[layer]:
            append_tokens(tiers.tokens, layer, new)
            return
        staged = self.asynchronous and not (kind == "decode" and self.write_through)
        if slots is not None:
            append_layer(tiers, layer, new, to_host=not staged)
        elif not staged:
            append_tokens(tiers.host, layer, new)
        if staged:
            self._stage(layer, new, kind)

    def _stage(self, layer: int, new: NewTokens, kind: str) -> None:
        """Keep the rows of an offloaded layer until those of its whole block are there, and write them as pieces then."""
        host, (block, place) = self.tiers.host, self.layer_blocks.home[layer]
        away = [one for one in self.layer_blocks.members[block] if not self.resident[one]]
        if layer == away[0]:
            shape = (*new.key.shape[:2], host.layers.count, *row_size(host.rows))
            self._staged[kind] = torch.empty(shape, dtype=host.rows.dtype, device=new.key.device)
        rows = self._staged[kind]
        rows[:, :, place] = row_of(new.key, new.value, host.rows)
        if layer == away[-1]:
            del self._staged[kind]
            members = self._members[block]
            wanted = (members >= 0) & ~self.tiers.resident[members.clamp(min=0)]
            with self.beside(WRITE_BACK, new.seats, new.positions, rows, wanted):
                append_pieces(host, block, new.seats, new.positions, rows, wanted)
            self._written = self.mark(WRITE_BACK)

    def end_step(self) -> None:
        """What follows, compute and loads alike, sees all that this step wrote back."""
        if self._written is not None:
            self.after(self._written)
            self._written = None

    # Between steps ----------------------------------------------------------------------------------------------------

    def keep_copies(self) -> None:
        """Copies for others to keep, from pages of seats, are on their way to the host."""
        self._kept = self.mark(WRITE_BACK)

    def join_copies(self) -> None:
        """What is computed from now on may write to pages that are being copied, or are copied to."""
        self.after(self._kept)
        self._kept = None

    # Dense reading ----------------------------------------------------------------------------------------------------

    def home(self, layer: int) -> Pages:
        """The pages that hold all tokens of a layer."""
        return self.tiers.tokens if self.resident[layer] else self.tiers.host

    def in_reach(self, layer: int) -> bool:
        """Whether attention can read a layer's tokens in place: on a CPU both tiers, on a GPU the device's."""
        return self.resident[layer] or not self.asynchronous

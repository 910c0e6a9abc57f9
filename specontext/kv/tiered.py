"""KV of all requests over two tiers: device arena and host pool.

A resident layer keeps pages of all its tokens in the arena. An offloaded layer keeps them in the host pool, which is the
truth, and in the arena only slots: sinks, a ring of the recent tokens, and hot slots that cache host rows. Attention reads
arena rows by index in both cases; only the index table differs.

One decode step:  begin_step(selection) -> append(layer) -> rows(layer) -> attention, layer after layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.core import LoadPlan, ModelShape, Selection, SpeContextError
from specontext.kernels.rows import append_tiers, append_tokens, gather_rows_layers
from specontext.kv.hot_slots import HotSlots
from specontext.kv.pool import PagePool


class LoadError(SpeContextError):
    """A row in a slot differs from the host's (only found with `verify_loads`)."""


class TieredKV:
    """Pages, slots and transfers of all layers.

    Args:
        resident: for every layer whether its KV stays on the device.
        head_map: int64 [L, Hkv], retrieval group that each KV head of each layer reads.
        tables: 1 when one selection serves all layers, L when each layer selects for itself.
        slots: device slots for each KV head of an offloaded layer; 0 when the method streams offloaded layers instead.
        device_pages, host_pages: sizes of the pools, the null page included.
    """

    def __init__(
        self,
        shape: ModelShape,
        *,
        resident: tuple[bool, ...],
        head_map: Tensor,
        tables: int,
        groups: int,
        slots: int,
        sink: int,
        recent: int,
        seats: int,
        max_tokens: int,
        page_size: int,
        device_pages: int,
        host_pages: int,
        device: torch.device,
        verify_loads: bool = False,
    ) -> None:
        self.shape, self.resident, self.head_map, self.page_size = shape, resident, head_map.to(device), page_size
        self.verify_loads, self.device = verify_loads, device
        self.arena = PagePool(shape, device_pages, page_size, device, "device tier of KV")
        self.host = PagePool(shape, host_pages, page_size, torch.device("cpu"), "host tier of KV")
        most = -(-max(max_tokens, slots) // page_size)
        self.device_table = torch.zeros((shape.layers, seats, most), dtype=torch.int64, device=device)
        self.host_table = torch.zeros((shape.layers, seats, most), dtype=torch.int64, device=device)
        self._layers = torch.arange(shape.layers, device=device)
        self._offloaded = self._layers[~torch.tensor(resident, device=device)]
        self.slot_count = slots
        self.hot = (
            HotSlots(
                tables=tables,
                seats=seats,
                groups=groups,
                slots=slots,
                sink=sink,
                recent=recent,
                max_tokens=max_tokens,
                device=device,
            )
            if slots and not all(resident)
            else None
        )
        self._owned: list[tuple[list[int], list[int]]] = [([], []) for _ in range(seats)]
        self._plans: list[LoadPlan | None] = [None] * tables

    # Space ------------------------------------------------------------------------------------------------------------

    def pages_needed(self, tokens: int) -> tuple[int, int]:
        """Device and host pages that a request of `tokens` tokens takes."""
        token_pages = -(-tokens // self.page_size)
        residents = sum(self.resident)
        offloaded = self.shape.layers - residents
        return residents * token_pages + offloaded * -(-self.slot_count // self.page_size), offloaded * token_pages

    def open(self, seat: int, tokens: int) -> None:
        """Give a seat the pages for `tokens` tokens in every layer.

        Raises:
            OutOfPagesError: a tier has too few free pages; nothing is taken.
        """
        assert self._owned[seat] == ([], []), f"seat {seat} is taken"
        device_count, host_count = self.pages_needed(tokens)
        device_pages = self.arena.pages.allocate(device_count)
        try:
            host_pages = self.host.pages.allocate(host_count)
        except SpeContextError:
            self.arena.pages.free(device_pages)
            raise
        self._owned[seat] = (list(device_pages), list(host_pages))
        for layer, resident in enumerate(self.resident):
            on_device = -(-(tokens if resident else self.slot_count) // self.page_size)
            self._fill(self.device_table[layer, seat], device_pages, on_device)
            if not resident:
                self._fill(self.host_table[layer, seat], host_pages, -(-tokens // self.page_size))
        if self.hot is not None:
            self.hot.reset(seat)

    @staticmethod
    def _fill(table: Tensor, pages: list[int], count: int) -> None:
        table[:count] = torch.tensor([pages.pop() for _ in range(count)], dtype=torch.int64)

    def close(self, seat: int) -> None:
        """Give back everything a seat holds."""
        device_pages, host_pages = self._owned[seat]
        self.arena.pages.free(device_pages)
        self.host.pages.free(host_pages)
        self._owned[seat] = ([], [])
        self.device_table[:, seat] = 0
        self.host_table[:, seat] = 0

    # Writing ----------------------------------------------------------------------------------------------------------

    def append(self, layer: int, seats: Tensor, positions: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> None:
        """Store K and V of new tokens where the layer keeps them.

        Args:
            seats, positions: int64 [T].
            key, value: [T, Hkv, D], the key after RoPE.
            lengths: int64 [T], tokens in context of the token's request once this step is stored.
        """
        if self.resident[layer]:
            append_tokens(self.arena.rows, self.device_table[layer], seats, positions, key, value, self.page_size)
            return
        host = (self.host.rows, self.host_table[layer])
        if self.hot is None:
            append_tokens(*host, seats, positions, key, value, self.page_size)
            return
        slots = (self.arena.rows, self.device_table[layer])
        fixed = (self.hot.sink, self.hot.recent)
        append_tiers(*host, *slots, seats, positions, lengths, key, value, self.page_size, *fixed)

    # Sparse reading ---------------------------------------------------------------------------------------------------

    def begin_step(self, seats: Tensor, selection: Selection, layer: int | None = None) -> LoadPlan | None:
        """Plan a selection's loads and carry them out, for every offloaded layer, or for the one that selected.

        Returns:
            The plan, None when no layer of it is offloaded.
        """
        offloaded = not self.resident[layer] if layer is not None else not all(self.resident)
        if not offloaded or self.hot is None:
            return None
        table = 0 if layer is None else layer
        plan = self.hot.plan(table, seats, selection)
        self._plans[table] = plan
        gather_rows_layers(
            self.host.rows,
            self.arena.rows,
            self.host_table,
            self.device_table,
            self._offloaded if layer is None else self._layers[layer : layer + 1],
            seats,
            self.head_map,
            selection.tokens,
            plan.slots,
            plan.missing,
            self.page_size,
        )
        return plan

    def rows(self, layer: int, seats: Tensor, selection: Selection, *, in_layer: bool) -> Tensor:
        """Arena rows of a selection for every KV head of a layer, in the selection's order: int64 [R, Hkv, B]."""
        groups = self.head_map[layer]
        tables = self.device_table[layer].index_select(0, seats)
        if self.resident[layer]:
            return self.arena.rows_of(tables, selection.tokens[:, groups])
        plan = self._plans[layer if in_layer else 0]
        assert plan is not None
        rows = self.arena.rows_of(tables, plan.slots[:, groups])
        if self.verify_loads:
            self._verify(layer, seats, selection.tokens[:, groups], rows)
        return rows

    def _verify(self, layer: int, seats: Tensor, tokens: Tensor, rows: Tensor) -> None:
        truth = self.host.rows_of(self.host_table[layer].index_select(0, seats), tokens)
        read = truth >= 0
        same = torch.equal(self.arena.rows[rows[read]].cpu(), self.host.rows[truth[read].cpu()])
        if not same:
            raise LoadError(f"layer {layer}: a slot holds a row that differs from the host's copy")

    # Dense reading ----------------------------------------------------------------------------------------------------

    def tile(self, layer: int, seats: Tensor, start: int, stop: Tensor | int) -> tuple[Tensor, Tensor]:
        """Rows of the tokens start .. stop - 1 of some requests, streamed in from the host for an offloaded layer.

        Args:
            stop: one end for all, or int64 [R]; the tile is as wide as the furthest one and -1 pads the others.

        Returns:
            buffer [N, 2, D] on the device and int64 rows [R, Hkv, T] into it.
        """
        ends = torch.as_tensor(stop, device=self.device).expand(len(seats))
        tokens = torch.arange(start, int(ends.max()), device=self.device)
        index = torch.where(tokens < ends[:, None], tokens, -1)[:, None]  # [R, 1, T]
        if self.resident[layer]:
            return self.arena.rows, self.arena.rows_of(self.device_table[layer].index_select(0, seats), index)
        source = self.host.rows_of(self.host_table[layer].index_select(0, seats), index)
        staging = self.host.rows.index_select(0, source.clamp(min=0).flatten().cpu()).to(self.device)
        rows = torch.arange(source.numel(), device=self.device).view_as(source)
        return staging, torch.where(source >= 0, rows, -1)

    def check_integrity(self) -> None:
        """Raises AssertionError when a page is lost or held twice, or the slot tables contradict each other."""
        self.arena.pages.check_integrity([device for device, _ in self._owned])
        self.host.pages.check_integrity([host for _, host in self._owned])
        if self.hot is not None:
            self.hot.check_integrity()

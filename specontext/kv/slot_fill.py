"""Fill the slots of a layer with what the slot tables say they hold: when a layer leaves the device, or a request comes back."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from specontext.kernels.rows import gather_rows_layers
from specontext.kv.reading import Reader
from specontext.kv.tiered import TieredKV


def fill_slots(kv: TieredKV, layer: int, stored: Mapping[int, int], *, from_host: bool) -> None:
    """Copy sinks, recent tokens and hot entries of some seats into a layer's slots.

    Args:
        stored: tokens stored, by seat.
        from_host: copy the host's rows; else those of the layer's own token pages.
    """
    if kv.hot is None:
        return
    readers = {id(kv.readers[seat]): kv.readers[seat] for seat in stored}
    for reader in readers.values():
        _fill(kv, layer, reader, {seat: n for seat, n in stored.items() if kv.readers[seat] is reader}, from_host=from_host)


def _fill(kv: TieredKV, layer: int, reader: Reader, stored: Mapping[int, int], *, from_host: bool) -> None:
    """The same for seats that read alike."""
    assert kv.hot is not None
    device, here = kv.device, slice(layer, layer + 1)
    seats = torch.tensor(list(stored), dtype=torch.int64).to(device)
    lengths = torch.tensor(list(stored.values()), dtype=torch.int64).to(device)
    tokens = kv.hot.tokens_of(reader.table(layer), seats, lengths)  # [R, G, slots]
    source = kv.host.rows if from_host else kv.arena.rows
    gather_rows_layers(
        source,
        kv.arena.rows,
        (kv.host_pages if from_host else kv.token_pages).table[here],
        kv.slot_pages.table[here],
        torch.zeros(1, dtype=torch.int64, device=device),
        seats,
        reader.head_map[here],
        torch.zeros(1, dtype=torch.bool, device=device),
        tokens,
        torch.arange(kv.slot_count, device=device).expand_as(tokens),
        tokens >= 0,
        kv.page_size,
    )

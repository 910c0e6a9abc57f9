"""Rows copied between steps: whole pages, tokens of a layer that moves, and the slots of a layer that leaves or a request that
comes back. Tables are read here and never written."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext.kernels.rows import gather_rows, gather_rows_layers
from specontext.kernels.tables import Copies, Pages
from specontext.kv.layout import Reader
from specontext.kv.streams import PREFETCH, WRITE_BACK
from specontext.kv.transfers import Transfers


def copy_pages(transfers: Transfers, source: Pages, target: Pages, tokens: int, *, skipped: Tensor, side: str) -> None:
    """Copy the first `tokens` tokens that lie in some pages of every layer into other pages.

    It happens on the stream `side`, after all that compute has been given; nothing waits for it yet.

    Args:
        source, target: with page tables [L, 1, P] of these pages alone.
        skipped: bool [L], layers that are passed over.
    """
    if not transfers.asynchronous:  # whole pages, as they lie: what is behind the tokens means nothing
        rows = [pages.rows.view(-1, 2, pages.size * pages.heads * pages.rows.shape[2]) for pages in (source, target)]
        numbers = [pages.table[~skipped].flatten() for pages in (source, target)]
        gather_rows(rows[0], numbers[0], rows[1], numbers[1])
        return
    # The gather of layers leaves the device to what is computed beside it.
    device = skipped.device
    index = torch.arange(tokens, device=device)[None, None]
    seat = torch.zeros(1, dtype=torch.int64, device=device)
    head_map = torch.zeros((len(skipped), source.heads), dtype=torch.int64, device=device)
    copies = Copies(seat, index, index, torch.ones_like(index, dtype=torch.bool), head_map)
    with transfers.beside(side, source.table, target.table, seat, head_map, skipped, index, copies.wanted):
        gather_rows_layers(source, target, transfers.layers, skipped, copies)


def copy_tokens(transfers: Transfers, layer: int, seat: int, start: int, stop: int, *, to_host: bool) -> None:
    """Copy the rows of the tokens start .. stop - 1 of a seat in one layer to the other tier, beside what is computed."""
    tiers, device = transfers.tiers, transfers.tiers.resident.device
    tokens = torch.arange(start, stop, device=device)[None, None]
    seats = torch.full((1,), seat, device=device)
    here, there = tiers.tokens.rows_of(layer, seats, tokens), tiers.host.rows_of(layer, seats, tokens)
    with transfers.beside(WRITE_BACK if to_host else PREFETCH, here, there):
        if to_host:
            gather_rows(tiers.tokens.rows, here, tiers.host.rows, there)
        else:
            gather_rows(tiers.host.rows, there, tiers.tokens.rows, here)


def prepare_moves(transfers: Transfers) -> None:
    """Compile what a GPU runs when layers move, with a row that is skipped, so that no step waits for the compiler."""
    if transfers.asynchronous:
        nothing = torch.full((1,), -1, device=transfers.tiers.resident.device)
        gather_rows(transfers.tiers.tokens.rows, nothing, transfers.tiers.host.rows, nothing)


def fill_slots(transfers: Transfers, layer: int, seats: Tensor, tokens: Tensor, reader: Reader, *, from_host: bool) -> None:
    """Copy the tokens that belong into the slots of some seats, which read alike, into a layer's slots.

    Args:
        seats: int64 [R].
        tokens: int64 [R, G, slots], -1 for none.
        from_host: copy the host's rows; else those of the layer's own token pages.
    """
    tiers = transfers.tiers
    assert tiers.slots is not None
    slots = torch.arange(tokens.shape[2], device=tokens.device).expand_as(tokens)
    copies = Copies(seats, tokens, slots, tokens >= 0, reader.head_map)
    none = torch.zeros_like(tiers.resident)
    source = tiers.host if from_host else tiers.tokens
    gather_rows_layers(source, tiers.slots, transfers.layers[layer : layer + 1], none, copies)

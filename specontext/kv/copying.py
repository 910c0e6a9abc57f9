"""Rows copied between steps: whole pages, tokens of a layer that moves, and the slots of a layer that leaves or a request that
comes back. Tables are read here and never written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specontext.kernels.rows import copy_pieces, gather_rows
from specontext.kernels.slot_plan import listed
from specontext.kernels.spans import CodedPages
from specontext.kernels.tables import Copies, Pages, is_quantised
from specontext.kv.layout import Reader
from specontext.kv.seats import entries_of
from specontext.kv.streams import PREFETCH, WRITE_BACK
from specontext.kv.transfers import Transfers


def copy_pages(transfers: Transfers, source: Pages, target: Pages, tokens: int, *, skipped: Tensor, side: str) -> None:
    """Copy the first `tokens` tokens that lie in some pages of every layer into other pages.

    It happens on the stream `side`, after all that compute has been given; nothing waits for it yet.

    Args:
        source, target: with page tables [lines, 1, P] of these pages alone.
        skipped: bool [L], layers that are passed over.
    """
    if not transfers.asynchronous:  # whole pages, as they lie: what is behind the tokens means nothing
        for layer, passed in enumerate(skipped.tolist()):
            if not passed:
                for here, there in zip(_by_page(source, layer), _by_page(target, layer), strict=True):
                    taken = here.index_select(0, source.table_of(layer)[0])
                    there.index_copy_(0, target.table_of(layer)[0], taken)
        return
    device = skipped.device
    index = torch.arange(tokens, dtype=torch.int32, device=device)[None, None]
    copies = Copies.of_all(torch.zeros(1, dtype=torch.int64, device=device), index, index)
    with transfers.beside(side, source.table, target.table, skipped, *copies.tensors):
        copy_pieces(source, target, transfers.every, skipped, copies, programs=transfers.programs)


def _by_page(pages: Pages, layer: int) -> tuple[Tensor, ...]:
    """The rows of a layer in every page, word by word: [pages, size, Hkv, words], or codes and scales apart."""
    if is_quantised(pages.rows):
        rows = pages.by_page(layer)
        assert isinstance(rows, CodedPages)
        return rows.codes, rows.scales
    shape = (-1, pages.size, pages.heads, pages.layers.count, pages.words.shape[1])
    return (pages.words.view(shape)[:, :, :, pages.layers.homes[layer][1]],)


def copy_tokens(transfers: Transfers, layer: int, parts: Sequence[tuple[int, int, int]], *, to_host: bool) -> None:
    """Copy the rows of some seats' tokens in one layer to the other tier, beside what is computed.

    Args:
        parts: seat, first token and the one behind the last, at least one.
    """
    tiers = transfers.tiers
    seats, tokens = entries_of(parts, tiers.resident.device)
    # Token by token, in the order in which rows lie in both tiers.
    here, there = (pages.rows_at(layer, seats, tokens) for pages in (tiers.tokens, tiers.host))
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
    none = torch.zeros_like(tiers.resident)
    source = tiers.host if from_host else tiers.tokens
    copies = listed(seats, tokens, slots, tokens >= 0)
    copy_pieces(source, tiers.slots, reader.layers.of(layer), none, copies)

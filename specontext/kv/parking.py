"""A request that has to wait keeps its KV on the host: out of its seat, and into any seat again."""

from __future__ import annotations

from dataclasses import dataclass

from specontext.kv.copying import copy_pages
from specontext.kv.reading import Reader
from specontext.kv.slot_fill import fill_slots
from specontext.kv.streams import COMPUTE, PREFETCH, WRITE_BACK
from specontext.kv.tiered import TieredKV


@dataclass(eq=False)
class ParkedKV:
    """KV of a request without a seat.

    Attributes:
        tokens: tokens stored.
        pages: host pages of every layer.
        reader: how the request reads its selections.
    """

    tokens: int
    pages: list[list[int]]
    reader: Reader


def park(kv: TieredKV, seat: int, tokens: int) -> ParkedKV:
    """Take a seat's KV to the host and leave the seat.

    Raises:
        OutOfPagesError: the host has too little room; nothing has changed.
    """
    layers = range(kv.shape.layers)
    resident = [layer for layer in layers if kv.resident[layer]]
    kv.host_pages.extend(resident, seat, kv.pages_for(tokens))
    _copy(kv, seat, tokens, to_host=True)
    held = [kv.host_pages.detach(layer, seat) for layer in layers]
    count = kv.pages_for(tokens)
    for pages in held:  # room for tokens that never came
        kv.host.pages.free(pages[count:])
    parked = ParkedKV(tokens, [pages[:count] for pages in held], kv.readers[seat])
    kv.parked.append(parked.pages)
    kv.close(seat)
    return parked


def unpark(kv: TieredKV, seat: int, parked: ParkedKV) -> None:
    """Give parked KV a seat: resident layers get their pages back, and the slots of offloaded ones start empty.

    Raises:
        OutOfPagesError: the device has too little room; nothing has changed.
    """
    layers = range(kv.shape.layers)
    kv.open(seat, 0, parked.reader)
    resident = [layer for layer in layers if kv.resident[layer]]
    on_device = [layer for layer in layers if kv.resident[layer] or layer == kv.moving]
    try:
        kv.token_pages.extend(on_device, seat, kv.pages_for(parked.tokens))
    except BaseException:
        kv.close(seat)
        raise
    for layer in layers:
        kv.host_pages.attach(layer, seat, parked.pages[layer])
    _forget(kv, parked)
    kv.room[seat] = kv.pages_for(parked.tokens) * kv.page_size
    _copy(kv, seat, parked.tokens, to_host=False)
    kv.host_pages.release([layer for layer in resident if layer != kv.moving], seat)
    for layer in kv.offloaded:
        fill_slots(kv, layer, {seat: parked.tokens}, from_host=True)


def discard(kv: TieredKV, parked: ParkedKV) -> None:
    """Give back what parked KV holds."""
    for pages in parked.pages:
        kv.host.pages.free(pages)
    _forget(kv, parked)


def _forget(kv: TieredKV, parked: ParkedKV) -> None:
    kv.parked = [pages for pages in kv.parked if pages is not parked.pages]  # others may be equal: all that hold nothing are


def _copy(kv: TieredKV, seat: int, tokens: int, *, to_host: bool) -> None:
    """All rows of a seat in its resident layers, from one tier to the other; what is computed next finds them there."""
    if not any(kv.resident) or not tokens:
        return
    count, side = kv.pages_for(tokens), WRITE_BACK if to_host else PREFETCH
    here = (kv.arena, kv.token_pages.table[:, seat, :count])
    there = (kv.host, kv.host_pages.table[:, seat, :count])
    source, target = (here, there) if to_host else (there, here)
    copy_pages(kv, source, target, tokens, skipped=~kv.resident_flags, side=side)
    kv.streams.wait(COMPUTE, kv.streams.record(side))

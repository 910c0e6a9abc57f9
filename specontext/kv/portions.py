"""The next portion of a layer that moves: which tokens of which seats, and the pages for them. Nothing is changed here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from specontext.kv.holdings import Holdings


@dataclass(frozen=True)
class Portion:
    """What is done for a moving layer between two steps.

    Attributes:
        pages: claimed pages that are taken, by seat.
        parts: rows that are copied then: seat, first token and the one behind the last.
    """

    pages: dict[int, int]
    parts: list[tuple[int, int, int]]

    @property
    def tokens(self) -> int:
        return sum(stop - start for _, start, stop in self.parts)


def next_portion(held: Holdings, stored: Mapping[int, int], most: int, spare: int) -> Portion:
    """What comes next, seat after seat, in the order of the tokens.

    Args:
        stored: tokens stored by seat, of all open seats.
        most: tokens to copy.
        spare: pages to take.
    """
    move, left = held.moving, most
    portion = Portion({}, [])
    for seat, one in held.seats.items():
        start = move.copied.get(seat, 0)
        stop, claimed = min(stored[seat], start + left), move.claimed.get(seat, 0)
        if stop <= start and not claimed:
            continue
        there = held.target_pages(one.room) - claimed
        # Room for tokens that are still to come, too, once those that there are have theirs.
        wanted = held.target_pages(one.room if stop == stored[seat] else stop)
        count = max(0, min(wanted - there, claimed, spare))
        stop = min(stop, (there + count) * held.layout.page_size)
        spare -= count
        if count:
            portion.pages[seat] = count
        if stop > start:
            portion.parts.append((seat, start, stop))
            left -= stop - start
    return portion

"""PageAllocator: no page is handed out twice or lost, and a failed request takes nothing."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specontext.errors import OutOfPagesError
from specontext.memory.pages import PageAllocator

QUICK = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@QUICK
@given(st.integers(1, 30), st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=40))
def test_any_sequence_of_allocations_and_frees(num_pages: int, actions: list[tuple[bool, int]]) -> None:
    pages = PageAllocator(num_pages, "test pool")
    holders: list[list[int]] = []
    for allocate, number in actions:
        free = pages.num_free
        if allocate and number > free:
            with pytest.raises(OutOfPagesError, match=f"test pool has {free} free pages and {number} are needed"):
                pages.allocate(number)
            assert pages.num_free == free
        elif allocate:
            holders.append(pages.allocate(number))
            assert len(holders[-1]) == number and pages.num_free == free - number
        elif holders:
            pages.free(holders.pop(number % len(holders)))
        held = [page for holder in holders for page in holder]
        assert len(held) == len(set(held)) == pages.num_held == num_pages - 1 - pages.num_free
        assert set(held) <= set(range(1, num_pages)), "page 0 is never handed out"
        pages.check_integrity(holders)


def test_freed_pages_come_back_first() -> None:
    pages = PageAllocator(10, "pool")
    first = pages.allocate(4)
    pages.free(first)
    assert set(pages.allocate(4)) == set(first)


def test_a_page_that_is_not_held_cannot_be_freed() -> None:
    pages = PageAllocator(10, "pool")
    held = pages.allocate(2)
    pages.free(held)
    with pytest.raises(KeyError):
        pages.free(held[:1])


def test_integrity_fails_for_lost_doubled_and_foreign_pages() -> None:
    pages = PageAllocator(10, "pool")
    held = pages.allocate(3)
    pages.check_integrity([held])
    for holders in ([held[:2]], [held, held[:1]], [[*held, 9]]):
        with pytest.raises(AssertionError, match="pool"):
            pages.check_integrity(holders)

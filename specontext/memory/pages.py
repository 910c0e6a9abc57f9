"""Which pages of a pool are free, and who holds the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from specontext.errors import OutOfPagesError


class PageCache(Protocol):
    """Holds pages only as long as nobody else wants them."""

    @property
    def num_alone(self) -> int:
        """Pages that it holds, and nobody else."""
        ...

    @property
    def num_spare(self) -> int:
        """Those of them that it can do without now."""
        ...

    @property
    def num_idle(self) -> int:
        """Those of these that belong to nothing that others are using."""
        ...

    def give_up(self, count: int) -> list[int]:
        """At least `count` pages, of which there are so many to spare, that nobody holds any longer; idle ones first."""
        ...

    def held_pages(self) -> list[list[int]]:
        """The pages that it holds."""
        ...


class PageAllocator:
    """Free list over pages 1 .. num_pages - 1.

    Page 0 is never handed out: it stays zero, and every unused entry of a page table points at it, so that a masked read
    is harmless.

    Args:
        ready: how many of the first pages can be used without waiting for their memory, where that is not all; it only grows.

    Attributes:
        cache: who holds pages that count as free. It gives up idle ones before pages are taken whose memory is not ready, and
            all that it can spare before there are none.
        claimed: pages that are promised to who takes them later, little by little, and that nobody else can have.
    """

    def __init__(self, num_pages: int, name: str, ready: Callable[[], int] | None = None) -> None:
        self.num_pages, self.name = num_pages, name
        self.cache: PageCache | None = None
        self.claimed = 0
        self._ready = ready
        # A stack. Pages that are not ready have never been handed out, and lie at the bottom.
        self._free = list(range(num_pages - 1, 0, -1))
        self._held: set[int] = set()
        # What was given back as whole lists, and not counted yet: its pages stand in `_held` until they are taken again.
        self._returned: list[list[int]] = []
        self._num_returned = 0

    @property
    def num_free(self) -> int:
        """Pages that can be had, those of the cache among them."""
        return self._nobodys + (self.cache.num_spare if self.cache is not None else 0) - self.claimed

    @property
    def num_held(self) -> int:
        """Pages that are in use; those that the cache alone holds are not."""
        return len(self._held) - self._num_returned - (self.cache.num_alone if self.cache is not None else 0)

    @property
    def num_ready(self) -> int:
        """Pages that nobody holds or has claimed, the cache neither, and whose memory is there; below 0 where too few are."""
        unready = self.num_pages - self._ready() if self._ready is not None else 0
        return self._nobodys - unready - self.claimed

    @property
    def _nobodys(self) -> int:
        return len(self._free) + self._num_returned

    def allocate(self, count: int) -> list[int]:
        """`count` distinct pages, the most recently freed ones first.

        Raises:
            OutOfPagesError: fewer are free; nothing is taken.
        """
        self.require(count)
        pages = self._take_returned(count)
        if rest := count - len(pages):
            new = self._free[-rest:][::-1]
            del self._free[-rest:]
            self._held.update(new)
            pages += new
        return pages

    def _take_returned(self, count: int) -> list[int]:
        """As many pages as were given back, up to `count`."""
        pages: list[int] = []
        while self._returned and len(pages) < count:
            last, rest = self._returned[-1], count - len(pages)
            pages += last[-rest:]
            del last[-rest:]
            if not last:
                self._returned.pop()
        self._num_returned -= len(pages)
        return pages

    def require(self, count: int) -> None:
        """Raises OutOfPagesError unless `count` pages can be had; the cache gives up what it takes."""
        if count > self.num_free:
            raise OutOfPagesError(f"the {self.name} has {self.num_free} free pages and {count} are needed")
        short = count - self.num_ready
        if self.cache is not None and short > 0:
            lacking = count + self.claimed - self._nobodys
            self.free(self.cache.give_up(max(lacking, min(short, self.cache.num_idle))))

    def free(self, pages: list[int]) -> None:
        """Give pages back; each must be held."""
        for page in pages:
            self._held.remove(page)
            self._free.append(page)

    def give_back(self, pages: list[int]) -> None:
        """Give back a list of pages, however long, in no time; it is the allocator's from now on."""
        if pages:
            self._returned.append(pages)
            self._num_returned += len(pages)

    def check_integrity(self, holders: list[list[int]]) -> None:
        """Raises AssertionError unless `holders` and the cache hold exactly the pages that are not free, each once."""
        cached = self.cache.held_pages() if self.cache is not None else []
        held = [page for pages in (*holders, *cached) for page in pages]
        held += (page for pages in self._returned for page in pages)
        assert self._num_returned == sum(map(len, self._returned)) and self.claimed >= 0 <= self.num_free
        assert len(held) == len(set(held)), f"{self.name}: a page has two holders"
        assert set(held) == self._held, f"{self.name}: held pages and their holders differ"
        assert sorted([*self._free, *held]) == list(range(1, self.num_pages)), f"{self.name}: pages were lost"

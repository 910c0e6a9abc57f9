"""Which pages of a pool are free, and who holds the others."""

from __future__ import annotations

from specontext.core import SpeContextError


class OutOfPagesError(SpeContextError):
    """A pool has fewer free pages than were asked for; nothing was allocated.

    Attributes:
        pages: the allocator that has too few, where one is to blame.
    """

    def __init__(self, message: str, pages: PageAllocator | None = None) -> None:
        super().__init__(message)
        self.pages = pages


class PageAllocator:
    """Free list over pages 1 .. num_pages - 1.

    Page 0 is never handed out: it stays zero, and every unused entry of a page table points at it, so that a masked read
    is harmless.
    """

    def __init__(self, num_pages: int, name: str) -> None:
        self.num_pages, self.name = num_pages, name
        self._free = list(range(num_pages - 1, 0, -1))
        self._held: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        return len(self._held)

    def allocate(self, count: int) -> list[int]:
        """`count` distinct pages, the most recently freed ones first.

        Raises:
            OutOfPagesError: fewer are free; nothing is taken.
        """
        self.require(count)
        pages = [self._free.pop() for _ in range(count)]
        self._held.update(pages)
        return pages

    def require(self, count: int) -> None:
        """Raises OutOfPagesError unless `count` pages are free."""
        if count > len(self._free):
            raise OutOfPagesError(f"the {self.name} has {len(self._free)} free pages and {count} are needed", self)

    def free(self, pages: list[int]) -> None:
        """Give pages back; each must be held."""
        for page in pages:
            self._held.remove(page)
            self._free.append(page)

    def check_integrity(self, holders: list[list[int]]) -> None:
        """Raises AssertionError unless `holders` hold exactly the pages that are not free, each once."""
        held = [page for pages in holders for page in pages]
        assert len(held) == len(set(held)), f"{self.name}: a page has two holders"
        assert set(held) == self._held, f"{self.name}: held pages and their holders differ"
        assert sorted([*self._free, *held]) == list(range(1, self.num_pages)), f"{self.name}: pages were lost"

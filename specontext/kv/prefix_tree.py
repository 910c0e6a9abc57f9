"""Which pages of prompts are kept, as a tree, and which of them go first.

    page 0 of a system prompt - page 1 - page 2 of question A
                                       - page 2 of question B - page 3

A block is found by the tokens of its page and of all pages before it. Those that were used longest ago are dropped first, and
a block always before the one that it follows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

Tokens = tuple[int, ...]


@dataclass(eq=False)
class Block:
    """A page of tokens that is kept.

    Attributes:
        parent: the block before it; None at the beginning of a prompt.
        pages: what it lies in.
        children: blocks that follow, by their tokens.
        windowed: the rows of layers with a window are among what is kept.
        states: what the states lie in of layers that keep one, as they were behind this page; empty where they are not kept.
    """

    tokens: Tokens
    parent: Block | None
    pages: list[int]
    children: dict[Tokens, Block] = field(default_factory=dict)
    windowed: bool = False
    states: list[int] = field(default_factory=list)

    @property
    def held(self) -> list[int]:
        """All its pages."""
        return self.pages + self.states


class PrefixTree:
    """Blocks that others can go on from; a `PageCache` of the pool that their pages are from.

    Args:
        page_size: tokens of a block.
        block_pages: pages of a block.
        before_dropping: called before pages are given up.
    """

    def __init__(self, page_size: int, block_pages: int, before_dropping: Callable[[], None]) -> None:
        self.page_size, self.block_pages, self._before_dropping = page_size, block_pages, before_dropping
        self._first: dict[Tokens, Block] = {}
        self._order: OrderedDict[Block, None] = OrderedDict()  # used longest ago first, children before parents
        self._in_use = 0  # of the last ones in this order
        self._state_pages = self._state_pages_in_use = 0

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, block: Block) -> bool:
        return block in self._order

    def after(self, parent: Block | None, tokens: Tokens) -> Block | None:
        """The block of these tokens that follows another, None for the beginning."""
        return (self._first if parent is None else parent.children).get(tokens)

    def find(self, token_ids: Sequence[int], most: int) -> list[Block]:
        """The blocks that a prompt begins with, one after the other, and `most` at most."""
        chain: list[Block] = []
        while len(chain) < most:
            block = self.after(chain[-1] if chain else None, page_of(token_ids, len(chain), self.page_size))
            if block is None:
                break
            chain.append(block)
        return chain

    def touch(self, chain: Sequence[Block]) -> None:
        """Blocks from the beginning of a prompt were used now: all others go before them, and each before its parent."""
        for block in reversed(chain):
            self._order.move_to_end(block)

    @contextmanager
    def using(self, chain: Sequence[Block]) -> Iterator[None]:
        """None of these blocks from the beginning of a prompt is dropped meanwhile."""
        assert not self._in_use
        self.touch(chain)
        self._in_use, self._state_pages_in_use = len(chain), sum(len(block.states) for block in chain)
        try:
            yield
        finally:
            self._in_use = self._state_pages_in_use = 0

    def add(self, parent: Block | None, tokens: Tokens, pages: list[int]) -> Block:
        """A new block behind another; the chain that it ends is to be touched next."""
        assert len(tokens) == self.page_size and len(pages) == self.block_pages and self.after(parent, tokens) is None
        block = Block(tokens, parent, pages)
        (self._first if parent is None else parent.children)[tokens] = block
        self._order[block] = None
        return block

    def add_states(self, block: Block, pages: list[int]) -> None:
        """A block has pages for states from now on."""
        assert block in self._order and not block.states
        block.states = pages
        self._state_pages += len(pages)

    # Pages that count as free -----------------------------------------------------------------------------------------

    @property
    def num_pages(self) -> int:
        return len(self._order) * self.block_pages + self._state_pages

    @property
    def num_spare(self) -> int:
        return (len(self._order) - self._in_use) * self.block_pages + self._state_pages - self._state_pages_in_use

    def give_up(self, count: int) -> list[int]:
        """See `PageCache`."""
        assert count <= self.num_spare
        pages: list[int] = []
        if count > 0:
            self._before_dropping()
        while len(pages) < count:
            block, _ = self._order.popitem(last=False)
            assert not block.children, "a block goes before the one it follows"
            del (self._first if block.parent is None else block.parent.children)[block.tokens]
            self._state_pages -= len(block.states)
            pages += block.held
        return pages

    def held_pages(self) -> list[list[int]]:
        return [block.held for block in self._order]

    def check_integrity(self) -> None:
        """Raises AssertionError when a block cannot be found by its tokens, is in use, or would be dropped after its parent."""
        place = {block: at for at, block in enumerate(self._order)}
        found: list[tuple[Block | None, Tokens, Block]] = [(None, tokens, block) for tokens, block in self._first.items()]
        for block in self._order:
            found += [(block, tokens, child) for tokens, child in block.children.items()]
        assert len(found) == len(place) and not self._in_use
        for parent, tokens, block in found:
            assert block.tokens == tokens and len(tokens) == self.page_size and block.parent is parent
            assert parent is None or place[block] < place[parent], "a block would be dropped before one that follows it"
            assert len(block.pages) == self.block_pages
        assert self._state_pages == sum(len(block.states) for block in self._order)


def page_of(token_ids: Sequence[int], page: int, page_size: int) -> Tokens:
    """The tokens of one page of a prompt."""
    return tuple(token_ids[page * page_size : (page + 1) * page_size])

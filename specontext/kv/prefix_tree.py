"""Which pages of prompts are kept, as a tree, and which of them go first.

    page 0 of a system prompt - page 1 - page 2 of question A
                                       - page 2 of question B - page 3

A block is found by the tokens of its page and of all pages before it. Those that were used longest ago are dropped first, and
a block always before the one that it follows.

Some pages of a block may be lent to requests, which read them where they are. What is lent is nobody's to take: of such a block
only the other pages can be given up. It cannot be found any more then, and its lent pages go when the last request that has them
gives them back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
        users: requests that it is lent to.
        pinned: it is not to be dropped now.
    """

    tokens: Tokens
    parent: Block | None
    pages: list[int]
    children: dict[Tokens, Block] = field(default_factory=dict)
    windowed: bool = False
    states: list[int] = field(default_factory=list)
    users: int = 0
    pinned: bool = False


class PrefixTree:
    """Blocks that others can go on from; a `PageCache` of the pool that their pages are from.

    Args:
        page_size: tokens of a block.
        block_pages: pages of a block.
        before_dropping: called before pages are given up.
        lendable: which of a block's pages can be lent.
    """

    def __init__(
        self, page_size: int, block_pages: int, before_dropping: Callable[[], None], lendable: Iterable[int] = ()
    ) -> None:
        self.page_size, self.block_pages, self._before_dropping = page_size, block_pages, before_dropping
        self.lendable = frozenset(lendable)
        self._first: dict[Tokens, Block] = {}
        self._order: OrderedDict[Block, None] = OrderedDict()  # used longest ago first, children before parents
        self._dropped: dict[Block, None] = {}  # blocks that are lent and not in the tree any more
        self._state_pages = 0
        self._alone = self._spare = self._idle = 0

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
        assert not any(block.pinned for block in chain)
        self.touch(chain)
        self._pin(chain, True)
        try:
            yield
        finally:
            self._pin(chain, False)

    def _pin(self, chain: Sequence[Block], pinned: bool) -> None:
        spare = idle = 0
        for block in chain:
            block.pinned = pinned
            count = self.num_alone_of(block)
            spare += count
            if not block.users:
                idle += count
        self._spare += -spare if pinned else spare
        self._idle += -idle if pinned else idle

    def add(self, parent: Block | None, tokens: Tokens, pages: list[int]) -> Block:
        """A new block behind another; the chain that it ends is to be touched next."""
        assert len(tokens) == self.page_size and len(pages) == self.block_pages and self.after(parent, tokens) is None
        block = Block(tokens, parent, pages)
        (self._first if parent is None else parent.children)[tokens] = block
        self._order[block] = None
        self._count(block, 1)
        return block

    def add_states(self, block: Block, pages: list[int]) -> None:
        """A block has pages for states from now on."""
        assert block in self._order and not block.states
        self._count(block, -1)
        block.states = pages
        self._count(block, 1)
        self._state_pages += len(pages)

    # Blocks that are lent ---------------------------------------------------------------------------------------------

    def lend(self, blocks: Iterable[Block]) -> None:
        """One request more has these blocks, which are in the tree."""
        for block in blocks:
            if block.users:
                block.users += 1
            else:
                self._count(block, -1)
                block.users = 1
                self._count(block, 1)

    def take_back(self, blocks: Iterable[Block]) -> list[int]:
        """A request has these blocks no longer; the pages that nobody holds any more, those of blocks that were dropped."""
        pages: list[int] = []
        for block in blocks:
            here = block in self._order
            if here:
                self._count(block, -1)
            block.users -= 1
            if here:
                self._count(block, 1)
            elif not block.users:
                del self._dropped[block]
                pages += self._lent_of(block)
        return pages

    def _lent_of(self, block: Block) -> list[int]:
        return [page for place, page in enumerate(block.pages) if place in self.lendable]

    def num_alone_of(self, block: Block) -> int:
        """Pages of a block that nobody else holds."""
        return len(block.pages) + len(block.states) - (len(self.lendable) if block.users else 0)

    def _alone_of(self, block: Block) -> list[int]:
        lent = self.lendable if block.users else ()
        return [page for place, page in enumerate(block.pages) if place not in lent] + block.states

    def _count(self, block: Block, sign: int) -> None:
        """A block of the tree counts from now on as it is, or (-1) does not."""
        count = sign * self.num_alone_of(block)
        self._alone += count
        if not block.pinned:
            self._spare += count
            if not block.users:
                self._idle += count

    # Pages that count as free -----------------------------------------------------------------------------------------

    @property
    def num_pages(self) -> int:
        """Pages of all blocks."""
        return len(self._order) * self.block_pages + self._state_pages

    @property
    def num_alone(self) -> int:
        return self._alone

    @property
    def num_spare(self) -> int:
        return self._spare

    @property
    def num_idle(self) -> int:
        return self._idle

    def give_up(self, count: int) -> list[int]:
        """See `PageCache`."""
        assert count <= self.num_spare
        pages: list[int] = []
        if count > 0:
            self._before_dropping()
        for idle in (True, False):
            dropped: list[Block] = []
            for block in self._order:
                if len(pages) >= count or block.pinned:  # they are the last ones
                    break
                if idle and (block.users or block.children):
                    continue
                pages += self._drop(block)
                dropped.append(block)
            for block in dropped:
                del self._order[block]
        return pages

    def give_up_all(self) -> list[int]:
        """All blocks are dropped; the pages that nobody holds any longer."""
        pages = self.give_up(self.num_spare)
        for block in self._order:  # those of which all pages are lent
            pages += self._drop(block)
        self._order.clear()
        return pages

    def _drop(self, block: Block) -> list[int]:
        """The pages that nobody holds any longer, of a block that is taken out of the order next."""
        assert not block.children and not block.pinned, "a block goes before the one it follows"
        del (self._first if block.parent is None else block.parent.children)[block.tokens]
        self._count(block, -1)
        self._state_pages -= len(block.states)
        if block.users:
            self._dropped[block] = None
        return self._alone_of(block)

    def held_pages(self) -> list[list[int]]:
        """Of the blocks in the tree, and of those that were dropped and are still lent."""
        return [*(block.pages + block.states for block in self._order), *(self._lent_of(block) for block in self._dropped)]

    def check_integrity(self) -> None:
        """Raises AssertionError when a block cannot be found by its tokens, is pinned, would be dropped after its parent, or
        counts as what it is not."""
        place = {block: at for at, block in enumerate(self._order)}
        found: list[tuple[Block | None, Tokens, Block]] = [(None, tokens, block) for tokens, block in self._first.items()]
        for block in self._order:
            found += [(block, tokens, child) for tokens, child in block.children.items()]
        assert len(found) == len(place) and not any(block.pinned for block in self._order)
        for parent, tokens, block in found:
            assert block.tokens == tokens and len(tokens) == self.page_size and block.parent is parent
            assert parent is None or place[block] < place[parent], "a block would be dropped before one that follows it"
            assert len(block.pages) == self.block_pages
        assert self._state_pages == sum(len(block.states) for block in self._order)
        assert self._alone == self._spare == sum(len(self._alone_of(block)) for block in self._order)
        assert self._idle == sum(len(self._alone_of(block)) for block in self._order if not block.users)
        assert all(block.users > 0 and block not in self._order for block in self._dropped)

    def check_users(self, users: Mapping[Block, int]) -> None:
        """Raises AssertionError unless blocks are lent to so many requests."""
        for block in (*self._order, *self._dropped):
            assert block.users == users.get(block, 0), "a block is lent to others than have it"
        assert all(block in self._order or block in self._dropped for block in users), "a block that is lent is gone"


def page_of(token_ids: Sequence[int], page: int, page_size: int) -> Tokens:
    """The tokens of one page of a prompt."""
    return tuple(token_ids[page * page_size : (page + 1) * page_size])

"""Kept pages: rows and state come back as they were wherever layers live, blocks are free memory, and streams wait for copies."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from specontext.errors import OutOfPagesError
from specontext.kernels.tables import Copies, NewTokens, Pages, Parts, Slots
from specontext.kv import block_state, copying
from specontext.kv.block_state import State
from specontext.kv.cache import KVCache
from specontext.kv.host_memory import HostMemory
from specontext.kv.hot_slots import SlotSizes
from specontext.kv.layout import Layout, Reader
from specontext.kv.pool import make_pools
from specontext.kv.prefix_tree import Block, PrefixTree, Tokens, page_of
from specontext.kv.seats import ParkedKV
from specontext.kv.streams import PREFETCH, WRITE_BACK
from specontext.kv.transfers import Transfers
from specontext.memory.layer_blocks import LayerBlocks
from specontext.memory.pages import PageAllocator
from specontext.model_shape import ModelShape
from tests.kv.test_host_memory import AHEAD, CHUNK, Driver, driver, host_memory_pool, settled
from tests.kv.test_streams import RaceError, RecordingStreams, watch

__all__ = ["driver"]  # a fixture

LAYERS, HEADS, DIM, PAGE = 3, 2, 4, 4
EACH, LAST = 19, 11  # numbers of a block's state: 3 and 2 rows of 8, which take a page
SHAPE = ModelShape(LAYERS, 8, HEADS, HEADS, DIM, 10, 64, torch.float32)
SIDE_BY_SIDE = (2, 1)  # layers on the host
BLOCK = len(SIDE_BY_SIDE) + 1


# The tree -------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from("akud"), st.integers(0, 2**20)), max_size=40))
def test_any_use_of_a_tree(actions: list[tuple[str, int]]) -> None:
    """Against a list of (tokens, last use): what is dropped was used longest ago of all that nothing follows."""
    used: dict[tuple[int, ...], int] = {}  # whole prefixes
    free, drops = list(range(1, 1000)), [0]
    tree = PrefixTree(2, 3, lambda: drops.__setitem__(0, drops[0] + 1))
    for now, (action, number) in enumerate(actions):
        ids = [number >> shift & 1 for shift in range(8)]
        known = next((n for n in range(4, 0, -1) if tuple(ids[: 2 * n]) in used), 0)
        chain = tree.find(ids, 4)
        assert len(chain) == known and [t for block in chain for t in block.tokens] == ids[: 2 * known]
        assert tree.find(ids, 1) == chain[:1]
        if action == "a" and known < 4:
            chain.append(tree.add(chain[-1] if chain else None, page_of(ids, known, 2), [free.pop() for _ in range(3)]))
            tree.touch(chain)
        elif action == "u":
            with tree.using(chain):
                assert tree.num_spare == 3 * (len(used) - known)
                before = len(used)
                pages = tree.give_up(tree.num_spare)
                assert all(block in tree for block in chain) and len(pages) == 3 * (before - known)
                used = {tuple(ids[: 2 * n]): now for n in range(1, known + 1)}
        elif action == "d" and used:
            count = number % tree.num_pages + 1
            pages = tree.give_up(count)
            assert count <= len(pages) < count + 3 and len(set(pages)) == len(pages)
            for _ in range(len(pages) // 3):
                leaves = [p for p in used if not any(q[:-2] == p for q in used)]
                del used[min(leaves, key=lambda p: used[p])]
        if action in "au":
            used |= {tuple(ids[: 2 * n]): now for n in range(1, len(chain) + 1)}
        # Of equal age, what follows goes first: the reference drops leaves only, and so has one order.
        assert {tuple(t for b in path(block) for t in b.tokens) for block in tree._order} == set(used)
        assert tree.num_pages == tree.num_spare == 3 * len(used)
        tree.check_integrity()


def path(block: Block) -> list[Block]:
    return [*(path(block.parent) if block.parent is not None else ()), block]


# Free memory ----------------------------------------------------------------------------------------------------------


def blocks_of(pages: PageAllocator, count: int) -> PrefixTree:
    tree = PrefixTree(1, 2, lambda: None)
    pages.cache = tree
    parent = None
    for number in range(count):
        parent = tree.add(parent, (number,), pages.allocate(2))
    tree.touch(tree.find(range(count), count))
    return tree


def test_blocks_count_as_free_and_are_given_up_only_when_pages_are_needed() -> None:
    pages = PageAllocator(21, "pool")
    tree = blocks_of(pages, 5)
    assert (pages.num_free, pages.num_held, pages.num_ready) == (20, 0, 10)
    held = pages.allocate(10)
    assert len(tree) == 5
    held += pages.allocate(3)
    assert len(tree) == 3 and pages.num_held == 13 and pages.num_free == 7
    with pytest.raises(OutOfPagesError, match="has 7 free pages and 8 are needed"):
        pages.allocate(8)
    assert len(tree) == 3, "nothing is dropped for what cannot be had"
    with tree.using(tree.find(range(5), 2)):
        assert pages.num_free == 3
        with pytest.raises(OutOfPagesError):
            pages.allocate(4)
        held += pages.allocate(3)
    assert len(tree) == 2
    pages.check_integrity([held])
    held += pages.allocate(4)
    assert not len(tree) and not pages.num_free
    pages.check_integrity([held])
    pages.free(held)
    pages.check_integrity([])


def test_a_page_of_a_block_has_no_other_holder() -> None:
    pages = PageAllocator(21, "pool")
    tree = blocks_of(pages, 2)
    with pytest.raises(AssertionError, match="two holders"):
        pages.check_integrity([tree.held_pages()[0]])


def test_blocks_go_before_memory_is_made_ready_for_others() -> None:
    ready = 11
    pages = PageAllocator(21, "pool", ready=lambda: ready)
    tree = blocks_of(pages, 4)
    assert pages.num_ready == 2
    assert max(pages.allocate(6)) < ready and len(tree) == 2
    taken = pages.allocate(7)
    assert not len(tree) and sorted(p for p in taken if p >= ready) == [11, 12, 13]


def test_kept_pages_never_have_memory_pinned(driver: Driver) -> None:
    """Seats that come and go beside a cache that takes all it gets: what is pinned is what seats reach, and some ahead."""
    shape = ModelShape(1, 8, 2, 2, 64, 10, 64, torch.float32)
    memory = HostMemory(40 * CHUNK, pinned=True)
    page = 16 * 2 * 2 * 64 * 4
    pool = host_memory_pool(shape, memory, 40 * CHUNK // page)
    settled(memory, (1 + AHEAD) * CHUNK)
    tree = PrefixTree(1, 1, lambda: None)
    pool.pages.cache = tree
    rng, seats, parent = random.Random(0), list[list[int]](), None
    for step in range(200):
        if seats and rng.random() < 0.5:
            pool.pages.free(seats.pop(rng.randrange(len(seats))))
        else:
            seats.append(pool.allocate(CHUNK // page // 2))
            if len(seats) > 8:
                pool.pages.free(seats.pop(0))
        for _ in range(pool.pages.num_ready):  # the cache takes all that is ready
            if parent is not None and parent not in tree:
                parent = None
            parent = tree.add(parent, (step * 10_000 + len(tree),), pool.pages.allocate(1))
            tree.touch(path(parent)[-1:])
            tree._order.move_to_end(parent, last=False)
        assert memory.ready_bytes <= (5 + AHEAD + 1) * CHUNK, "8 seats take 4 chunks and the page that nobody holds"
        assert all(page_ < memory.ready_bytes // page for [page_] in tree.held_pages())
        pool.pages.check_integrity(seats)
    memory.close()


def test_pages_whose_memory_was_refused_are_not_taken_for_blocks(driver: Driver) -> None:
    shape = ModelShape(1, 8, 2, 2, 64, 10, 64, torch.float32)
    driver.limit = 3 * CHUNK
    memory = HostMemory(8 * CHUNK, pinned=True)
    page = 16 * 2 * 2 * 64 * 4
    pool = host_memory_pool(shape, memory, 8 * CHUNK // page)
    settled(memory, 3 * CHUNK)
    with pytest.raises(Exception, match="could pin"):
        pool.allocate(5 * CHUNK // page)
    ready = pool.pages.num_ready
    assert ready == 3 * CHUNK // page - 1
    assert max(pool.pages.allocate(ready)) < 3 * CHUNK // page
    memory.close()


# Copies ---------------------------------------------------------------------------------------------------------------


class Bench:
    """A cache of KV whose rows say whose they are: request * 10,000 + layer * 1,000 + head * 100 + token."""

    def __init__(
        self,
        resident: tuple[bool, ...],
        *,
        sizes: tuple[int, ...] = SIDE_BY_SIDE,
        adaptive: bool = False,
        host_pages: int = 200,
        state: tuple[int, int] = (EACH, LAST),
    ) -> None:
        layout = Layout.of_shape(SHAPE, PAGE, LayerBlocks(sizes, max(sizes), tuple(range(LAYERS))))
        arena, host = make_pools(layout, device_pages=200, host_pages=host_pages, device=torch.device("cpu"))
        arena.rows.zero_()
        self.kv = KVCache(
            arena,
            host,
            resident=resident,
            reader=Reader.of_map(layout, torch.zeros(LAYERS, HEADS, dtype=torch.int64), arena.rows.device),
            slots=SlotSizes(6, sink=1, recent=3),
            seats=3,
            max_tokens=60,
            adaptive=adaptive,
            verify_loads=True,
            state=state,
        )
        self.tree = self.kv.blocks.tree

    def fill(self, seat: int, request: int, stop: int, start: int = 0) -> None:
        """Tokens of a prompt."""
        tokens = torch.arange(start, stop)
        assert (None if seat in self.kv.seats else self.kv.open(seat, stop)) is None
        assert self.kv.grow(seat, stop) is None
        for layer in range(LAYERS):
            new = (request * 10_000 + layer * 1_000 + torch.arange(HEADS) * 100 + tokens[:, None])[..., None].expand(-1, -1, DIM)
            place = (torch.full_like(tokens, seat), tokens, torch.full_like(tokens, stop))
            self.kv.transfers.append_chunk(layer, NewTokens(*place, new.float(), -new.float()))
        self.kv.transfers.end_step()

    def decode(self, seat: int, position: int) -> None:
        one = torch.tensor([position])
        new = torch.full((1, HEADS, DIM), 7.0)
        assert self.kv.grow(seat, position + 1) is None
        for layer in range(LAYERS):
            self.kv.transfers.append(layer, NewTokens(torch.tensor([seat]), one, one + 1, new, new))
        self.kv.transfers.end_step()

    def keep(self, seat: int, request: int, chain: list[Block], count: int) -> None:
        first = len(chain)
        self.kv.keep(chain, pages_of(request, first, first + count), seat, state_of(request, first, first + count), 0)

    def rows(self, seat: int, tokens: int) -> Tensor:
        """What is stored of a seat: [L, Hkv, tokens] of the numbers above; keys and values are checked against each other."""
        found = []
        for layer in range(LAYERS):
            home = self.kv.transfers.home(layer)
            rows = home.rows[home.rows_of(layer, torch.tensor([seat]), torch.arange(tokens)[None, None])[0]]
            assert torch.equal(rows[:, :, 0], -rows[:, :, 1]) and (rows == rows[..., :1]).logical_or(rows == -rows[..., :1]).all()
            found.append(rows[:, :, 0, 0])
        return torch.stack(found)


def truth(request: int, tokens: int) -> Tensor:
    layers, heads = torch.arange(LAYERS)[:, None, None] * 1_000, torch.arange(HEADS)[:, None] * 100
    return (request * 10_000 + layers + heads + torch.arange(tokens)).float()


def pages_of(request: int, first: int, stop: int) -> list[Tokens]:
    return [page_of([request * 100 + token for token in range(stop * PAGE)], page, PAGE) for page in range(first, stop)]


def state_of(request: int, first: int, stop: int) -> State:
    pages = torch.arange(first, stop)[:, None] + request * 100.0
    return State(pages + torch.arange(EACH) / 64, -pages - torch.arange(LAST) / 64)


KINDS = [(True, True, True), (True, True, False), (False, False, False), (False, True, False)]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1), (3,)])
@pytest.mark.parametrize("before", KINDS)
@pytest.mark.parametrize("after", KINDS)
def test_rows_and_state_come_back_wherever_layers_live(
    before: tuple[bool, ...], after: tuple[bool, ...], sizes: tuple[int, ...], asynchronous: bool
) -> None:
    """Kept in three parts that end inside of pages; brought back all or some of them, after layers have changed their tiers."""
    bench = Bench(before, sizes=sizes, adaptive=True)
    if asynchronous:
        bench.kv.transfers.run_on(RecordingStreams())
    chain: list[Block] = []
    for start, stop in ((0, 6), (6, 7), (7, 18)):
        bench.fill(0, 1, stop, start)
        bench.keep(0, 1, chain, stop // PAGE - len(chain))
    bench.fill(0, 1, 27, 18)  # what comes after the pages that are kept
    bench.kv.close(0)
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        if old != new:
            assert bench.kv.begin_move(layer, to_host=old) and bench.kv.finish_move({0: 27})
    for pages in (4, 2):
        assert bench.tree.find([100 + token for token in range(60)], pages) == chain[:pages]
        bench.kv.open(1, 20)
        state = bench.kv.bring(chain[:pages], 1)
        tokens = pages * PAGE
        assert torch.equal(bench.rows(1, tokens), truth(1, tokens))
        assert torch.equal(state.each, state_of(1, 0, pages).each)
        assert torch.equal(state.last, state_of(1, pages - 1, pages).last)
        slots_are_filled(bench, 1, tokens)
        bench.kv.close(1)
    bench.kv.check_integrity()
    bench.tree.check_integrity()


def slots_are_filled(bench: Bench, seat: int, tokens: int) -> None:
    """Sinks and the last tokens are in their slots of the layers that are offloaded."""
    kv = bench.kv
    assert kv.hot is not None
    wanted = [0, *range(tokens - kv.hot.recent, tokens)]
    slots = [0, *(1 + token % kv.hot.recent for token in wanted[1:])]
    for layer in kv.offloaded:
        assert kv.transfers.tiers.slots is not None
        rows = kv.transfers.tiers.slots.rows_of(layer, torch.tensor([seat]), torch.tensor(slots)[None, None])[0]
        assert torch.equal(kv.arena.rows[rows][:, :, 0, 0], truth(1, tokens)[layer][:, wanted])


@pytest.mark.parametrize("to_host", [True, False])
def test_a_layer_that_is_moving(to_host: bool) -> None:
    """Pages are kept from and brought to where it lives; then its move brings what is there along."""
    bench = Bench((True, True, to_host), adaptive=True)
    bench.fill(0, 1, 22)
    assert bench.kv.begin_move(2, to_host=to_host)
    bench.kv.advance_move({0: 22}, 5 * HEADS * SHAPE.row_bytes)
    chain: list[Block] = []
    bench.keep(0, 1, chain, 5)
    bench.kv.open(1, 20)
    bench.kv.bring(chain, 1)
    bench.kv.check_integrity()
    assert bench.kv.finish_move({0: 22, 1: 20})
    for seat in (0, 1):
        assert torch.equal(bench.rows(seat, 20), truth(1, 20))
    bench.kv.check_integrity()


def test_a_cache_without_a_head_has_pages_of_layers_only() -> None:
    bench = Bench((True, False, True), state=(0, 0))
    assert bench.tree.block_pages == len(SIDE_BY_SIDE)
    bench.fill(0, 1, 9)
    none = torch.zeros(2, 0)
    chain: list[Block] = []
    bench.kv.keep(chain, pages_of(1, 0, 2), 0, State(none, none), 0)
    bench.kv.open(1, 8)
    state = bench.kv.bring(chain, 1)
    assert state.each.shape == (2, 0) and state.last.shape == (1, 0)
    assert torch.equal(bench.rows(1, 8), truth(1, 8))


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Rows of KV and of state that were copied."""
    counts = {"kv": 0, "state": 0}
    gather, copy = block_state.gather_rows, copying.copy_pieces

    def of_state(source: Tensor, rows: Tensor, target: Tensor, to: Tensor) -> None:
        counts["state"] += rows.numel()
        gather(source, rows, target, to)

    def of_kv(source: Pages, target: Pages, parts: Parts, skipped: Tensor, copies: Copies, **options: Any) -> None:
        if not isinstance(target, Slots):
            layers = (parts.layers >= 0) & ~skipped[parts.layers.clamp(min=0)]
            counts["kv"] += int(layers.sum() * copies.counts.sum())  # one request, and one group
        copy(source, target, parts, skipped, copies, **options)

    monkeypatch.setattr(copying, "copy_pieces", of_kv)
    monkeypatch.setattr(block_state, "gather_rows", of_state)
    return counts


def test_copies_cost_the_rows_of_their_pages_and_no_more(copied: dict[str, int]) -> None:
    bench = Bench((True, False, True))
    bench.kv.transfers.run_on(RecordingStreams())
    bench.fill(0, 1, 23)
    chain: list[Block] = []
    bench.keep(0, 1, chain, 5)
    assert copied == {"kv": 5 * PAGE * LAYERS * HEADS, "state": 5 * (3 + 2)}
    bench.kv.open(1, 12)
    bench.kv.bring(chain[:3], 1)
    assert copied == {"kv": 8 * PAGE * LAYERS * HEADS, "state": 5 * (3 + 2) + 3 * 3 + 2}, (
        "only the last page's feature comes back"
    )


@pytest.mark.parametrize("room", [0, 1, 2, 5])
def test_blocks_take_no_page_from_seats_and_replace_what_was_used_longest_ago(room: int) -> None:
    bench = Bench((True, True, True), host_pages=1 + 20)
    bench.fill(0, 1, 12)
    bench.fill(1, 2, 20)
    old: list[Block] = []
    bench.keep(0, 1, old, 3)
    others = bench.kv.host.allocate(20 - BLOCK * room)
    bench.tree.check_integrity()
    assert len(bench.tree) == min(3, room)
    chain: list[Block] = []
    bench.keep(1, 2, chain, 5)
    assert len(chain) == len(bench.tree) == room, "as many as fit, from the beginning, and the old ones make room"
    assert all(block in bench.tree for block in chain)
    bench.kv.host.pages.check_integrity([others])
    bench.keep(1, 2, chain, 5 - len(chain))
    assert len(chain) == room, "a prompt never drops its own beginning for what follows"


def test_blocks_lie_only_where_memory_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench((True, True, True))
    ready = 1 + 2 * BLOCK + 1
    monkeypatch.setattr(bench.kv.host.pages, "_ready", lambda: ready)
    bench.fill(0, 1, 20)
    chain: list[Block] = []
    bench.keep(0, 1, chain, 5)
    assert len(chain) == 2 and max(page for pages in bench.tree.held_pages() for page in pages) < ready


# Pages that are lent --------------------------------------------------------------------------------------------------


def test_what_is_lent_is_nobody_s_to_take_and_goes_with_its_last_user() -> None:
    pages = PageAllocator(13, "pool")
    tree = PrefixTree(1, 2, lambda: None, lendable=[0])
    pages.cache = tree
    chain: list[Block] = []
    for number in range(3):
        chain.append(tree.add(chain[-1] if chain else None, (number,), pages.allocate(2)))
    tree.touch(chain)
    tree.lend(chain)
    tree.lend(chain[:2])
    assert (pages.num_free, pages.num_held, tree.num_idle, tree.num_pages) == (6 + 3, 3, 0, 6)
    held = pages.allocate(7)
    assert [block in tree for block in chain] == [True, True, False], (
        "one page more is needed: it is what the last block has alone"
    )
    assert tree.find(range(3), 3) == chain[:2] and pages.num_held == 10
    pages.check_integrity([held])
    tree.check_users({chain[0]: 2, chain[1]: 2, chain[2]: 1})
    held += pages.allocate(2)
    assert not len(tree) and not pages.num_free and pages.num_held == 12
    assert tree.take_back(chain[:2]) == [], "somebody still has them"
    pages.check_integrity([held])
    lent = [block.pages[0] for block in chain]
    returned = tree.take_back(chain)
    assert returned == lent
    pages.free(returned)
    pages.check_integrity([held])
    tree.check_integrity()


def test_idle_blocks_go_first_and_lent_ones_only_for_want_of_pages() -> None:
    ready = 12
    pages = PageAllocator(13, "pool", ready=lambda: ready)
    tree = PrefixTree(1, 2, lambda: None, lendable=[0])
    pages.cache = tree
    lent, idle = (tree.add(None, (number,), pages.allocate(2)) for number in range(2))
    tree.lend([lent])
    held = pages.allocate(7)
    assert idle in tree and pages.num_ready == 0
    held += pages.allocate(1)
    assert lent in tree and idle not in tree and pages.num_ready == 1
    held += pages.allocate(2)
    assert lent in tree, "rather than drop it, memory that is not ready is waited for"
    held += pages.allocate(1)
    assert lent not in tree and not pages.num_free
    pages.check_integrity([held])


@pytest.mark.parametrize("seed", range(40))
def test_any_history_of_seats_that_share_pages(seed: int, streams: RecordingStreams) -> None:
    """Prompts are kept, found, waited with and dropped, in a tier that is often too small: seats read their own prompts' rows,
    no page is lost, nothing is copied between pages of the host that both have in common, and no stream overtakes another."""
    rng = random.Random(seed)
    resident = rng.choice([(False, False, False), (True, False, False), (False, True, False)])
    bench = Bench(resident, sizes=rng.choice([(1, 2), (1, 1, 1), (2, 1)]), host_pages=rng.choice([60, 90, 200]))
    kv, tree = bench.kv, bench.tree
    kv.host.rows.zero_()
    if rng.random() < 0.5:
        kv.transfers.run_on(streams)
    stored: dict[int, tuple[int, int, list[Block]]] = {}  # by seat the request, its tokens and the blocks that it follows
    parked: list[tuple[int, int, ParkedKV]] = []
    others: list[int] = []
    for _ in range(60):
        what, free = (
            rng.choice(["come", "come", "grow", "grow", "close", "park", "back", "others", "reset"]),
            {0, 1, 2} - {*stored},
        )
        if what == "come" and free:
            seat, request = min(free), rng.randrange(3)
            chain = tree.find([request * 100 + token for token in range(60)], rng.randint(0, 12))
            with tree.using(chain):
                if kv.open(seat, len(chain) * PAGE + rng.randint(0, 9), known=chain) is None:
                    stored[seat] = (request, len(chain) * PAGE, chain)
                    if chain:
                        state = kv.bring(chain, seat)
                        assert torch.equal(state.each, state_of(request, 0, len(chain)).each)
        elif what == "grow" and stored:
            seat = rng.choice(sorted(stored))
            request, tokens, chain = stored[seat]
            stop = min(60, tokens + rng.randint(1, 12))
            if kv.grow(seat, stop) is None:
                bench.fill(seat, request, stop, tokens)
                follows = len(chain) == tokens // PAGE and (not chain or chain[-1] in tree)
                if follows and tree.after(chain[-1] if chain else None, pages_of(request, len(chain), len(chain) + 1)[0]) is None:
                    bench.keep(seat, request, chain, stop // PAGE - len(chain))
                stored[seat] = (request, stop, chain)
        elif what == "close" and stored:
            seat = rng.choice(sorted(stored))
            del stored[seat]
            kv.close(seat)
        elif what == "park" and stored:
            seat = rng.choice(sorted(stored))
            if (one := kv.park(seat, stored[seat][1])) is not None:
                parked.append((*stored.pop(seat)[:2], one))
        elif what == "back" and parked:
            request, tokens, one = parked.pop(rng.randrange(len(parked)))
            if free and kv.unpark(min(free), one) is None:
                stored[min(free)] = (request, tokens, [])
            else:
                kv.discard(one)
        elif what == "others":
            kv.host.pages.free(others)
            others = kv.host.allocate(rng.randint(0, kv.host.pages.num_free))
        elif what == "reset" and rng.random() < 0.2:
            kv.host.pages.free(tree.give_up_all())
        kv._held.check_integrity([], [others, *(pages for _, _, one in parked for pages in one.held(tree.lendable))])
        tree.check_integrity()
        for seat, (request, tokens, _) in stored.items():
            assert torch.equal(bench.rows(seat, tokens), truth(request, tokens))
    kv.host.pages.free(others)
    for seat in [*stored]:
        kv.close(seat)
    for _, _, one in parked:
        kv.discard(one)
    kv.check_integrity()
    assert not kv.host.pages.num_held and kv.host.pages.num_free == kv.host.pages.num_pages - 1


def test_nothing_is_copied_that_is_lent(copied: dict[str, int]) -> None:
    bench = Bench((True, False, False), sizes=(1, 2))
    bench.kv.transfers.run_on(RecordingStreams())
    bench.fill(0, 1, 23)
    chain: list[Block] = []
    free = bench.kv.host.pages.num_free
    bench.keep(0, 1, chain, 5)
    assert bench.kv.host.pages.num_free == free, "what is kept counts as free"
    bench.kv.open(1, 12, known=chain[:3])
    bench.kv.bring(chain[:3], 1)
    assert copied["kv"] == (5 + 3) * PAGE * HEADS, "of the layer on the device"
    assert [bench.kv._held.on_host.of(1, seat)[:3] for seat in (0, 1)] == [[block.pages[1] for block in chain[:3]]] * 2


# Streams --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> RecordingStreams:
    recording = RecordingStreams()
    watch(recording, monkeypatch)
    return recording


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """deaf(function): what that function does no longer waits for copies."""

    def patch(function: str) -> None:
        join = Transfers.join_copies

        def joining(moving: Transfers) -> None:
            caller = sys._getframe(1)
            through = caller.f_back  # the tree calls through a weak reference
            if function not in (caller.f_code.co_name, through and through.f_code.co_name):
                join(moving)

        monkeypatch.setattr(Transfers, "join_copies", joining)

    return patch


def kept_and_closed(bench: Bench) -> None:
    """Another seat's prompt takes pages from which a copy may not have been made yet."""
    bench.keep(0, 1, [], 5)
    bench.kv.close(0)
    bench.fill(1, 2, 22)


def kept_and_moved(bench: Bench) -> None:
    """A layer that comes back leaves pages on the host from which a copy may not have been made yet."""
    bench.kv.open(1, 1)
    bench.keep(0, 1, [], 5)
    assert bench.kv.begin_move(2, to_host=False) and bench.kv.finish_move({0: 22, 1: 0})
    for position in range(22):
        bench.decode(1, position)


def kept_and_dropped(bench: Bench) -> None:
    """A seat takes pages to which a copy may not have been made yet."""
    bench.kv.open(1, 1)
    bench.keep(0, 1, [], 5)
    bench.kv.host.allocate(bench.kv.host.pages.num_ready)
    for position in range(12):
        bench.decode(1, position)


def kept_and_brought(bench: Bench) -> None:
    chain: list[Block] = []
    bench.keep(0, 1, chain, 5)
    bench.kv.open(1, 20, known=chain)
    bench.kv.bring(chain, 1)


@pytest.mark.parametrize(
    ("who", "resident", "story"),
    [
        ("close", (True, True, True), kept_and_closed),
        ("finish_move", (False, True, False), kept_and_moved),
        ("give_up", (True, True, False), kept_and_dropped),
        ("bring", (True, True, False), kept_and_brought),
    ],
)
@pytest.mark.parametrize("hears", [True, False])
def test_pages_that_are_being_copied(
    hears: bool, who: str, resident: tuple[bool, ...], story: Callable[[Bench], None], streams: RecordingStreams, deaf: Any
) -> None:
    if not hears:
        deaf(who)
    bench = Bench(resident, adaptive=who == "finish_move")
    bench.kv.arena.rows.zero_()
    bench.kv.host.rows.zero_()
    bench.kv.transfers.run_on(streams)
    bench.fill(0, 1, 22)
    if hears:
        story(bench)
        assert WRITE_BACK in streams.streams_seen
        return
    with pytest.raises(RaceError):
        story(bench)


def test_what_is_brought_is_awaited_before_it_is_read(streams: RecordingStreams) -> None:
    bench = Bench((True, True, False))
    bench.kv.transfers.run_on(streams)
    bench.fill(0, 1, 22)
    chain: list[Block] = []
    bench.keep(0, 1, chain, 5)
    bench.kv.open(1, 24, known=chain)
    bench.kv.bring(chain, 1)
    assert PREFETCH in streams.streams_seen
    rows = bench.kv.transfers.home(0).rows_of(0, torch.tensor([1]), torch.arange(20)[None, None])
    streams.access("attention", bench.kv.arena.rows, rows.flatten(), write=False)
    bench.fill(1, 1, 24, 20)
    parked = bench.kv.park(1, 24)
    assert parked is not None and len(parked.pages) == len(SIDE_BY_SIDE)


def test_memory_for_prompts_that_will_be_kept_is_made_ready_without_waiting(driver: Driver) -> None:
    shape = ModelShape(1, 8, 2, 2, 64, 10, 64, torch.float32)
    memory = HostMemory(20 * CHUNK, pinned=True)
    page = 16 * 2 * 2 * 64 * 4
    pool = host_memory_pool(shape, memory, 20 * CHUNK // page)
    settled(memory, (1 + AHEAD) * CHUNK)
    held = pool.allocate(pool.pages.num_ready // 2)
    beside = pool.pages.num_ready
    pool.prepare(beside)
    settled(memory, (1 + AHEAD) * CHUNK)
    pool.prepare(beside + 2 * CHUNK // page)
    settled(memory, (3 + AHEAD) * CHUNK)
    pool.prepare(100 * CHUNK // page)  # more than there is
    settled(memory, 20 * CHUNK)
    pool.pages.check_integrity([held])
    memory.close()

"""KVCache as a state machine: whatever requests do and wherever layers go, attention reads the right rows, only what was
selected is loaded, and every page is where the table in `holdings.py` says.

Truth is a dict from (request, layer, KV head, token) to a number that is unique in the whole run and is written into every
value of the entry's row; so a row says which entry it is, and a stale one is found.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from torch import Tensor

from specontext.core import Selection, SlotPlan
from specontext.errors import LoadError
from specontext.kernels.rows import copy_pieces
from specontext.kernels.tables import NewTokens, Pages, Parts, Slots
from specontext.kv import transfers
from specontext.kv.cache import KVCache
from specontext.kv.dense import read_tile, stored_tiles
from specontext.kv.hot_slots import SlotSizes
from specontext.kv.layout import Layout, PlacedSelection, Reader
from specontext.kv.pool import make_pools
from specontext.kv.seats import LayerMove, ParkedKV
from specontext.memory.layer_blocks import LayerBlocks
from specontext.memory.tiers import Tier
from specontext.model_shape import ModelShape
from specontext.retrieval.selector import Budget

LAYERS, SEATS, DIM = 4, 3, 2
Pair = tuple[int, int, int]  # table, seat, group


def make_shape(kv_heads: int) -> ModelShape:
    return ModelShape(LAYERS, 8, kv_heads, kv_heads, DIM, 10, 64, torch.float32)


def any_blocks(rng: random.Random) -> LayerBlocks:
    """Layers that follow one another divided at random, with a place more than they need in some of the examples."""
    sizes = [1]
    for _ in range(LAYERS - 1):
        if rng.random() < 0.6:
            sizes[-1] += 1
        else:
            sizes.append(1)
    return LayerBlocks(tuple(sizes), max(sizes) + (rng.random() < 0.2), tuple(range(LAYERS)))


@dataclass
class Cache:
    """Reference of one pair's hot slots: the token in each slot and the step of its last read."""

    tokens: list[int]
    used: list[int] = field(default_factory=list)

    def read(self, wanted: list[int], step: int) -> set[int]:
        """Put the tokens into slots, least recently used first, and return those that were in none."""
        missing = [t for t in wanted if t not in self.tokens]
        keep = {self.tokens.index(t) for t in wanted if t in self.tokens}
        victims = sorted(set(range(len(self.tokens))) - keep, key=lambda slot: (self.used[slot], slot))
        for token, slot in zip(missing, victims, strict=False):
            self.tokens[slot] = token
        for token in wanted:
            self.used[self.tokens.index(token)] = step
        return set(missing)


class CacheMachine(RuleBasedStateMachine):
    """Opens, grows, writes, selects, reads, parks and closes seats at random, while layers move."""

    seen: ClassVar[Counter[str]] = Counter()  # over all examples

    @initialize(seed=st.integers(0, 2**32))
    def build(self, seed: int) -> None:
        rng = random.Random(seed)
        kv_heads, groups = rng.choice([(1, 1), (2, 3), (3, 2), (4, 1)])
        self.shape, self.groups = make_shape(kv_heads), groups
        self.head_map = [[rng.randrange(groups) for _ in range(kv_heads)]]
        for _ in range(LAYERS - 1):  # most heads go on reading their group from layer to layer
            self.head_map.append([group if rng.random() < 0.7 else rng.randrange(groups) for group in self.head_map[-1]])
        self.resident = [rng.random() < 0.5 for _ in range(LAYERS)]
        self.in_layer = rng.random() < 0.4
        self.tables = LAYERS if self.in_layer else 1
        sink, recent, scored = rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 4)
        self.budget = Budget(sink + recent + scored, sink, recent)
        self.dense = rng.random() < 0.2  # a method without slots
        self.hot = 0 if self.dense else scored + rng.randint(0, 4)
        self.slots = 0 if self.dense else sink + recent + self.hot
        self.adaptive = rng.random() < 0.75 or self.dense
        self.page_size, self.max_tokens = rng.randint(1, 5), 40
        pages = {tier: rng.choice([300, 200, 100, 40]) for tier in ("device_pages", "host_pages")}
        self.blocks = any_blocks(rng)
        layout = Layout.of_shape(self.shape, self.page_size, self.blocks)
        arena, host = make_pools(layout, **pages, device=torch.device("cpu"))
        self.kv = KVCache(
            arena,
            host,
            resident=self.resident,
            reader=Reader.of_map(layout, torch.tensor(self.head_map), arena.rows.device, in_layer=self.in_layer),
            slots=SlotSizes(self.slots, sink, recent, self.tables, groups) if self.slots else None,
            seats=SEATS,
            max_tokens=self.max_tokens,
            adaptive=self.adaptive,
            verify_loads=rng.random() < 0.5,  # new rows then go to the host at once, else after the last layer
        )
        self.truth: dict[tuple[int, int, int, int], float] = {}
        self.serial = 0
        self.requests = 0
        self.who: dict[int, int] = {}  # request in each open seat
        self.length: dict[int, int] = {}  # tokens stored, by seat
        self.pages: dict[int, int] = {}  # pages of tokens that a seat has in a layer
        self.caches: dict[Pair, Cache] = {}
        self.waiting: list[tuple[int, int, ParkedKV]] = []  # request, tokens, what is parked
        self.step = 0

    # Seats ------------------------------------------------------------------------------------------------------------

    def whole(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    @property
    def move(self) -> LayerMove | None:
        return self.kv.move

    @property
    def offloaded(self) -> list[int]:
        return [layer for layer in range(LAYERS) if not self.resident[layer]]

    def pages_of(self, count: int) -> tuple[int, int]:
        """Device and host pages of a seat with `count` pages of tokens in each layer: the table in `holdings.py`."""
        moving = self.move.layer if self.move is not None else -1
        last = max((layer for layer in range(LAYERS) if self.resident[layer]), default=-1)
        device = 0
        for layer, here in enumerate(self.resident):
            device += count * (here or layer == moving)
            device += self.whole(self.slots) * (not here or (self.adaptive and layer == last))
        return device, count * len(self.blocks_away)

    @property
    def blocks_away(self) -> set[int]:
        """Blocks with a layer on the host, or on its way there or back."""
        moving = {self.move.layer} if self.move is not None else set()
        return {self.blocks.home[layer][0] for layer in {*self.offloaded, *moving}}

    def free(self) -> tuple[int, int]:
        return self.kv.arena.pages.num_free, self.kv.host.pages.num_free

    def expect(self, needed: tuple[int, int], act: Callable[[], Tier | None]) -> bool:
        """Take exactly so many pages of both tiers, or nothing when there are too few, and then say which tier it is."""
        free = self.free()
        short = [tier for tier, n, f in zip(Tier, needed, free, strict=True) if n > f]
        if short:
            self.seen["refusals"] += 1
            assert act() in short
            assert self.free() == free
            return False
        assert act() is None
        assert tuple(f - left for f, left in zip(free, self.free(), strict=True)) == needed
        return True

    @precondition(lambda self: len(self.who) < SEATS)
    @rule(data=st.data(), tokens=st.integers(0, 40))
    def open(self, data: st.DataObject, tokens: int) -> None:
        self.open_seat(data.draw(st.sampled_from(sorted(set(range(SEATS)) - set(self.who)))), tokens)

    def open_seat(self, seat: int, tokens: int) -> None:
        count = self.whole(tokens)
        if self.expect(self.pages_of(count), lambda: self.kv.open(seat, tokens)):
            self.requests += 1
            self.take_seat(seat, self.requests, 0, count)

    def take_seat(self, seat: int, request: int, length: int, pages: int) -> None:
        self.who[seat], self.length[seat], self.pages[seat] = request, length, pages
        for table in range(self.tables):
            for group in range(self.groups):
                self.caches[table, seat, group] = Cache([-1] * self.hot, [0] * self.hot)

    def leave_seat(self, seat: int) -> int:
        del self.length[seat], self.pages[seat]
        return self.who.pop(seat)

    @precondition(lambda self: self.who)
    @rule(data=st.data(), tokens=st.integers(1, 40))
    def grow(self, data: st.DataObject, tokens: int) -> None:
        self.grow_seat(data.draw(st.sampled_from(sorted(self.who))), tokens)

    def grow_seat(self, seat: int, tokens: int) -> None:
        before, after = self.pages_of(self.pages[seat]), self.pages_of(max(self.whole(tokens), self.pages[seat]))
        needed = (after[0] - before[0], after[1] - before[1])
        if self.expect(needed, lambda: self.kv.grow(seat, tokens)):
            self.pages[seat] = max(self.whole(tokens), self.pages[seat])

    @precondition(lambda self: self.who)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        self.close_seat(data.draw(st.sampled_from(sorted(self.who))))

    def close_seat(self, seat: int) -> None:
        self.kv.close(seat)
        self.forget(self.leave_seat(seat))

    def forget(self, request: int) -> None:
        self.truth = {key: value for key, value in self.truth.items() if key[0] != request}

    @precondition(lambda self: self.who)
    @rule(data=st.data())
    def park(self, data: st.DataObject) -> None:
        self.park_seat(data.draw(st.sampled_from(sorted(self.who))))

    def park_seat(self, seat: int) -> None:
        tokens = self.length[seat]
        new = self.whole(tokens) * (len(self.blocks.sizes) - len(self.blocks_away))
        if new > self.free()[1]:
            free = self.free()
            assert self.kv.park(seat, tokens) is None and self.free() == free
            return
        parked = self.kv.park(seat, tokens)
        assert parked is not None
        self.seen["parked"] += 1
        self.waiting.append((self.leave_seat(seat), tokens, parked))

    @precondition(lambda self: self.waiting and len(self.who) < SEATS)
    @rule(data=st.data())
    def unpark(self, data: st.DataObject) -> None:
        free = sorted(set(range(SEATS)) - set(self.who))
        self.unpark_into(data.draw(st.sampled_from(free)), data.draw(st.sampled_from(self.waiting)))

    def unpark_into(self, seat: int, entry: tuple[int, int, ParkedKV]) -> None:
        request, tokens, parked = entry
        count = self.whole(tokens)
        device, host = self.pages_of(count)
        if self.expect((device, host - count * len(self.blocks.sizes)), lambda: self.kv.unpark(seat, parked)):
            self.seen["unparked"] += tokens > 0
            self.waiting = [entry for entry in self.waiting if entry[0] != request]
            self.take_seat(seat, request, tokens, count)
            self.everything_is_stored(seat)

    @precondition(lambda self: self.waiting)
    @rule()
    def discard(self) -> None:
        request, _, parked = self.waiting.pop()
        self.kv.discard(parked)
        self.forget(request)

    # Moves ------------------------------------------------------------------------------------------------------------

    @property
    def may_move(self) -> bool:
        return self.move is None and self.adaptive

    @precondition(lambda self: self.may_move and any(self.resident))
    @rule()
    def start_leaving(self) -> None:
        layer = max(layer for layer in range(LAYERS) if self.resident[layer])
        self.start(layer, to_host=True)

    @precondition(lambda self: self.may_move and not all(self.resident))
    @rule(data=st.data())
    def start_returning(self, data: st.DataObject) -> None:
        self.start(data.draw(st.sampled_from(self.offloaded)), to_host=False)

    def start(self, layer: int, *, to_host: bool) -> None:
        count, other = sum(self.pages.values()), Tier.HOST if to_host else Tier.DEVICE
        there = self.blocks.home[layer][0] in self.blocks_away
        needed = (0, 0 if there else count) if to_host else (count, 0)
        self.expect(needed, lambda: None if self.kv.begin_move(layer, to_host=to_host) else other)

    @precondition(lambda self: self.move is not None)
    @rule(tokens=st.integers(0, 30), odd=st.integers(0, 3))
    def advance(self, tokens: int, odd: int) -> None:
        token_bytes = self.shape.kv_heads * self.shape.row_bytes
        before = self.kv.remaining_bytes(self.length)
        moved = self.kv.advance_move(self.length, tokens * token_bytes + odd)
        assert moved == min(before, max(1, tokens) * token_bytes)
        assert self.kv.remaining_bytes(self.length) == before - moved

    @precondition(lambda self: self.move is not None)
    @rule()
    def finish(self) -> None:
        self.finish_or_refuse()

    def finish_or_refuse(self) -> None:
        move = self.move
        assert move is not None
        free, count = self.free(), sum(self.pages.values())
        others = any(here for layer, here in enumerate(self.resident) if layer != move.layer)
        slots = self.whole(self.slots) * len(self.who) if move.to_host and self.adaptive and others else 0
        if move.to_host and slots > free[0] + count:  # no room for the slots of the next layer to leave
            self.seen["no room for slots"] += 1
            assert not self.kv.finish_move(self.length)
            assert self.free() == free and self.move is move
            return
        left = self.kv.remaining_bytes(self.length)
        before = move.bytes
        assert self.kv.finish_move(self.length) and self.move is None
        self.seen["left" if move.to_host else "returned"] += any(self.length.values())
        assert move.bytes == before + left
        self.resident[move.layer] = not move.to_host

    @precondition(lambda self: self.move is not None)
    @rule()
    def give_up(self) -> None:
        self.cancel()

    def cancel(self) -> None:
        self.kv.cancel_move()
        assert self.move is None

    @precondition(lambda self: self.may_move and self.who)
    @rule(seed=st.integers(0, 2**32), to_host=st.booleans(), rounds=st.integers(1, 6))
    def go_through_a_move(self, seed: int, to_host: bool, rounds: int) -> None:
        """A move from its start to its end, with steps, and with requests that leave, wait, come back and come anew between."""
        rng = random.Random(seed)
        layers = [layer for layer, here in enumerate(self.resident) if here == to_host]
        if not layers:
            return
        self.start(max(layers) if to_host else rng.choice(layers), to_host=to_host)
        for _ in range(rounds if self.move is not None else 0):
            seats = sorted(self.who)
            free = sorted(set(range(SEATS)) - set(seats))
            what = rng.choice(["leave", "park", "come", "come", "back", "grow"])
            if what == "leave" and seats:
                self.close_seat(rng.choice(seats))
            elif what == "park" and seats:
                self.park_seat(rng.choice(seats))
            elif what == "come" and free:
                self.open_seat(rng.choice(free), rng.randint(1, 30))
            elif what == "back" and free and self.waiting:
                self.unpark_into(rng.choice(free), rng.choice(self.waiting))
            elif what == "grow" and seats:
                self.grow_seat(rng.choice(seats), rng.randint(1, 40))
            self.steps(rng, rng.randint(1, 3), rng.choice([0, 3, 10]))
            self.nothing_is_lost()
        if self.move is not None and rng.random() < 0.15:
            self.cancel()
        elif self.move is not None:
            self.finish_or_refuse()

    # Steps ------------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.who)
    @rule(seed=st.integers(0, 2**32), steps=st.integers(1, 8), chunk=st.sampled_from([0, 1, 5, 100]))
    def run_steps(self, seed: int, steps: int, chunk: int) -> None:
        """Steps of the engine: decode tokens of some seats, chunks of the prompts of others; a move goes on between them."""
        self.steps(random.Random(seed), steps, chunk)

    def steps(self, rng: random.Random, steps: int, chunk: int) -> None:
        for _ in range(steps):
            room = {seat: self.pages[seat] * self.page_size - self.length[seat] for seat in self.who}
            room = {seat: min(left, self.max_tokens - self.length[seat]) for seat, left in room.items()}
            chosen = [seat for seat in self.who if room[seat] > 0 and rng.random() < 0.8]
            decodes = [seat for seat in chosen if self.length[seat] and rng.random() < 0.9]
            rng.shuffle(decodes)
            chunks = [(seat, rng.randint(1, room[seat])) for seat in chosen if seat not in decodes]
            if chosen:
                self.run_step(rng, decodes, chunks)
                self.slots_hold_what_the_tables_say()
            if chunk and self.move is not None:
                self.kv.advance_move(self.length, chunk * self.shape.kv_heads * self.shape.row_bytes)

    def run_step(self, rng: random.Random, decodes: list[int], chunks: list[tuple[int, int]]) -> None:
        self.step += 1
        readings: dict[int, PlacedSelection] = {}
        sparse = bool(decodes) and not self.dense
        if sparse and not self.in_layer:
            readings = dict.fromkeys(range(LAYERS), self.select(rng, decodes, 0, None))
        after = {seat: self.length[seat] + 1 for seat in decodes} | {seat: self.length[seat] + size for seat, size in chunks}
        for layer in range(LAYERS):
            if decodes:
                self.append(layer, [(seat, self.length[seat]) for seat in decodes], after, self.kv.transfers.append)
            if sparse and self.in_layer:
                readings[layer] = self.select(rng, decodes, layer, layer)
            if sparse:
                self.kv.transfers.wait(layer)
                rows = self.kv.transfers.rows(range(layer, layer + 1), readings[layer])[0]
                self.kv.transfers.check_rows(layer, readings[layer], rows)
                self.attend(rows)
                self.check_rows(layer, decodes, readings[layer].selection, rows)
            new = [(seat, position) for seat, _ in chunks for position in range(self.length[seat], after[seat])]
            if new:
                self.append(layer, new, after, self.kv.transfers.append_chunk)
        self.kv.transfers.end_step()
        self.length.update(after)
        if self.dense and after:
            self.everything_is_stored(rng.choice(sorted(after)))

    @precondition(lambda self: self.who)
    @rule(data=st.data())
    def stream(self, data: st.DataObject) -> None:
        """A tile of some seats holds their tokens start .. stop - 1, and the tiles of one seat all of its tokens."""
        seats = data.draw(st.lists(st.sampled_from(sorted(self.who)), min_size=1, unique=True))
        start = data.draw(st.integers(0, 10))
        ends = [data.draw(st.integers(0, self.length[seat])) for seat in seats]
        layer, stop = data.draw(st.integers(0, LAYERS - 1)), max(ends)
        self.everything_is_stored(seats[0])
        if start >= stop:
            return
        buffer, rows = read_tile(self.kv.transfers, layer, torch.tensor(seats), start, stop, torch.tensor(ends))
        assert rows.shape == (len(seats), self.shape.kv_heads, stop - start)
        for r, seat in enumerate(seats):
            for head in range(self.shape.kv_heads):
                tokens = [t if t < ends[r] else -1 for t in range(start, stop)]
                self.check_head(layer, seat, head, tokens, buffer, rows[r, head])

    def attend(self, rows: Tensor) -> None:
        """Attention reads these rows of the arena; a hook."""

    def everything_is_stored(self, seat: int) -> None:
        """Dense reading of a seat finds all its tokens in every layer, and its page table leads to them."""
        length = self.length[seat]
        for layer in range(LAYERS):
            tiles = [tile.clone() for tile in stored_tiles(self.kv.transfers, layer, seat, length, 7)]
            found = torch.cat(tiles) if tiles else torch.zeros(0, self.shape.kv_heads, 2, DIM)
            assert torch.equal(found, self.expected(layer, seat, range(length)))
            home = self.kv.transfers.home(layer)
            assert (home.table_of(layer)[seat, : self.whole(length)] > 0).all() and home.rows.shape[1:] == (2, DIM)

    def expected(self, layer: int, seat: int, tokens: Iterable[int]) -> Tensor:
        heads = range(self.shape.kv_heads)
        numbers = [[self.truth[self.who[seat], layer, head, token] for head in heads] for token in tokens]
        number = torch.tensor(numbers).view(-1, len(heads), 1).expand(-1, -1, DIM)
        return torch.stack((number, -number), dim=2)

    # Parts of a step --------------------------------------------------------------------------------------------------

    def append(self, layer: int, new: list[tuple[int, int]], after: dict[int, int], store: Callable[..., None]) -> None:
        """Store new tokens (seat, position), and a padded row."""
        rows = torch.empty(len(new) + 1, self.shape.kv_heads, DIM)
        rows[-1] = torch.nan
        for i, (seat, position) in enumerate(new):
            for head in range(self.shape.kv_heads):
                self.serial += 1
                self.truth[self.who[seat], layer, head, position] = self.serial
                rows[i, head] = self.serial
        seats, positions = (torch.tensor(x) for x in zip(*new, (SEATS, -1), strict=True))
        lengths = torch.tensor([*(after[seat] for seat, _ in new), 0])
        store(layer, NewTokens(seats, positions, lengths, rows, -rows))

    def select(self, rng: random.Random, decodes: list[int], table: int, layer: int | None) -> PlacedSelection:
        """A random selection; checks its plan, and that the loads are exactly the misses."""
        lengths = torch.tensor([self.length[seat] + 1 for seat in decodes])
        scored = torch.full((len(decodes), self.groups, self.budget.scored), -1)
        for r, end in enumerate(self.budget.candidates_end(lengths).tolist()):
            candidates = range(self.budget.sink, end)
            most = min(self.budget.scored, len(candidates))
            for g in range(self.groups):
                wanted = rng.sample(candidates, max(most - (rng.random() < 0.2), 0))
                scored[r, g, : len(wanted)] = torch.tensor(sorted(wanted))
        selection = self.budget.compose(scored, lengths)
        loaded: list[float] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transfers, "copy_pieces", self.recording(loaded))
            reading = self.kv.read(torch.tensor(decodes), selection, layer)
        self.check_plan(decodes, table, layer, selection, reading.plan, loaded)
        return reading

    @staticmethod
    def recording(loaded: list[float]) -> Any:
        load = transfers.copy_pieces

        def copy(source: Pages, target: Pages, *plan: Any, **options: Any) -> None:
            written = torch.full_like(target.rows, torch.nan)
            copy_pieces(source, replace(target, rows=written), *plan)
            loaded.extend(number for number in written[:, 0, 0].tolist() if number == number)
            load(source, target, *plan, **options)

        return copy

    # Checks -----------------------------------------------------------------------------------------------------------

    def check_plan(
        self, seats: list[int], table: int, layer: int | None, selection: Selection, plan: SlotPlan | None, loaded: list[float]
    ) -> None:
        offloaded = [i for i in self.offloaded if layer is None or i == layer]
        if self.dense or not (offloaded or (layer is None and self.adaptive and self.kv.transfers.asynchronous)):
            assert plan is None and not loaded
            return
        assert plan is not None
        expected = []
        for r, seat in enumerate(seats):
            for g in range(self.groups):
                wanted = selection.tokens[r, g][selection.scored[r, g]].tolist()
                cache = self.caches[table, seat, g]
                held = set(cache.tokens) - {-1}
                missing = cache.read(wanted, self.step)
                self.seen["evictions"] += len(held - set(cache.tokens))
                assert set(selection.tokens[r, g][plan.missing[r, g]].tolist()) == missing
                assert torch.equal(plan.slots[r, g] < 0, selection.tokens[r, g] < 0)
                expected += [
                    self.truth[self.who[seat], i, head, token]
                    for i in offloaded
                    for head in range(self.shape.kv_heads)
                    if self.head_map[i][head] == g
                    for token in missing
                ]
        assert sorted(loaded) == sorted(expected), "what was loaded is not what was missing"

    def check_rows(self, layer: int, seats: list[int], selection: Selection, rows: Tensor) -> None:
        for r, seat in enumerate(seats):
            for head in range(self.shape.kv_heads):
                tokens = selection.tokens[r, self.head_map[layer][head]].tolist()
                self.check_head(layer, seat, head, tokens, self.kv.arena.rows, rows[r, head])

    def check_head(self, layer: int, seat: int, head: int, tokens: list[int], buffer: Tensor, rows: Tensor) -> None:
        """The rows hold the tokens' true K and V in their order, and -1 where the token is -1."""
        assert torch.equal(rows < 0, torch.tensor(tokens) < 0)
        expected = [self.truth[self.who[seat], layer, head, token] for token in tokens if token >= 0]
        found = buffer[rows[rows >= 0]]
        number = torch.tensor(expected)[:, None].expand(-1, DIM)
        assert torch.equal(found, torch.stack((number, -number), dim=1))

    @invariant()
    def slots_hold_what_the_tables_say(self) -> None:
        """Sinks, the ring of recent tokens and the hot entries of every offloaded layer."""
        if self.kv.hot is None:
            return
        sink, recent = self.budget.sink, self.budget.recent
        for (table, seat, group), cache in self.caches.items():
            if seat not in self.who:
                continue
            assert self.kv.hot.token_of_slot[table, seat, group].tolist() == cache.tokens
            length = self.length[seat]
            fixed = [p if p < length else -1 for p in range(sink)] + [-1] * recent
            for position in range(max(sink, length - recent), length):
                fixed[sink + position % recent] = position
            tokens = fixed + cache.tokens
            for layer in self.offloaded if not self.in_layer else set(self.offloaded) & {table}:
                slots = torch.arange(self.slots)
                assert self.kv.transfers.tiers.slots is not None
                rows = self.kv.transfers.tiers.slots.rows_of(layer, torch.tensor([seat]), slots[None, None])[0]
                for head in range(self.shape.kv_heads):
                    if self.head_map[layer][head] == group:
                        present = torch.where(torch.tensor(tokens) >= 0, rows[head], -1)
                        self.check_head(layer, seat, head, tokens, self.kv.arena.rows, present)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.kv.check_integrity()
        held = [self.pages_of(count) for count in self.pages.values()]
        parked = sum(self.whole(tokens) for _, tokens, _ in self.waiting) * len(self.blocks.sizes)
        arena, host = self.kv.arena.pages, self.kv.host.pages
        assert arena.num_held + arena.claimed == sum(device for device, _ in held)
        assert host.num_held + host.claimed == sum(host for _, host in held) + parked
        assert self.kv.resident == tuple(self.resident)

    def teardown(self) -> None:
        if not hasattr(self, "kv"):
            return
        for seat in list(self.who):
            self.kv.close(seat)
        for _, _, parked in self.waiting:
            self.kv.discard(parked)
        if self.move is not None:
            self.kv.cancel_move()
        self.kv.check_integrity()
        assert self.kv.arena.pages.num_held == self.kv.host.pages.num_held == 0


def test_any_sequence_of_steps() -> None:
    CacheMachine.seen.clear()
    bounds = settings(
        max_examples=80, stateful_step_count=16, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
    )
    run_state_machine_as_test(CacheMachine, settings=bounds)  # type: ignore[no-untyped-call]
    assert min(CacheMachine.seen[what] for what in ("evictions", "refusals", "parked")) > 3


@pytest.mark.slow
def test_moves_while_requests_come_and_go() -> None:
    """Mostly moves, from their start to their end, with everything that may happen between."""
    CacheMachine.seen.clear()
    for seed in range(60):
        rng, machine = random.Random(seed), CacheMachine()  # type: ignore[no-untyped-call]
        machine.build(seed)
        for seat in range(SEATS):
            machine.open_seat(seat, rng.randint(1, 30))
        for _ in range(4):
            if machine.may_move and machine.who:
                machine.go_through_a_move(rng.getrandbits(32), rng.random() < 0.5, rng.randint(1, 6))
            if machine.move is not None:
                machine.cancel()
            if machine.who:
                machine.steps(rng, 2, 0)
            machine.nothing_is_lost()
            machine.slots_hold_what_the_tables_say()
            for seat in machine.who:
                machine.everything_is_stored(seat)
        machine.teardown()
    assert min(CacheMachine.seen[what] for what in ("left", "returned", "parked", "unparked")) > 10


# The checks can fail --------------------------------------------------------------------------------------------------


def small_kv(*, slots: int = 6, verify_loads: bool = True) -> KVCache:
    """One seat, one head, all offloaded: sink 1, recent 2, and the rest hot slots; 20 tokens are stored."""
    layout, cpu = Layout.of_shape(ModelShape(2, 8, 1, 1, DIM, 10, 64, torch.float32), 4), torch.device("cpu")
    kv = KVCache(
        *make_pools(layout, device_pages=40, host_pages=40, device=cpu),
        resident=(False, False),
        reader=Reader.of_map(layout, torch.zeros(2, 1, dtype=torch.int64), cpu),
        slots=SlotSizes(slots, sink=1, recent=2),
        seats=1,
        max_tokens=32,
        verify_loads=verify_loads,
    )
    kv.open(0, 32)
    for position in range(20):
        write(kv, position)
    return kv


def write(kv: KVCache, position: int) -> None:
    at = torch.tensor([position])
    for layer in range(2):
        row = torch.full((1, 1, DIM), 100.0 * layer + position)
        kv.transfers.append(layer, NewTokens(torch.tensor([0]), at, at + 1, row, row))


def decode(kv: KVCache, position: int, scored: list[int]) -> list[Tensor]:
    """One step that selects `scored`; what each layer's attention reads as K."""
    seats = torch.tensor([0])
    selection = Budget(3 + len(scored), 1, 2).compose(torch.tensor([[scored]]), torch.tensor([position + 1]))
    reading = kv.read(seats, selection)
    write(kv, position)
    rows = kv.transfers.rows(range(2), reading)
    for layer in range(2):
        kv.transfers.check_rows(layer, reading, rows[layer])
    return [kv.arena.rows[rows[layer, 0, 0], 0, 0] for layer in range(2)]


def test_a_step_reads_sinks_scored_and_recent_tokens_of_its_layer() -> None:
    first, second = decode(small_kv(), 20, [3, 7, 11])
    assert first.tolist() == [0, 3, 7, 11, 19, 20]
    assert second.tolist() == [100, 103, 107, 111, 119, 120]


def test_wrong_rows_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(*arguments: Any, **_: Any) -> None:
        *before, copies = arguments
        into_slots = isinstance(before[1], Slots)
        copy_pieces(*before, replace(copies, source=copies.source - 1) if into_slots else copies)

    monkeypatch.setattr(transfers, "copy_pieces", shifted)
    with pytest.raises(LoadError, match="layer 0: a slot holds a row that differs"):
        decode(small_kv(), 20, [3, 7, 11])
    assert decode(small_kv(verify_loads=False), 20, [3, 7, 11])[0].tolist() == [0, 2, 6, 10, 19, 20]


def test_forgotten_loads_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = small_kv()
    decode(kv, 20, [3, 7, 11])
    monkeypatch.setattr(transfers, "copy_pieces", lambda *_, **__: None)
    decode(kv, 21, [3, 7, 11])  # nothing is missing
    with pytest.raises(LoadError, match="layer 0"):
        decode(kv, 22, [3, 7, 12])


def test_rows_overwritten_in_a_slot_are_noticed() -> None:
    kv = small_kv()
    decode(kv, 20, [3, 7, 11])
    kv.arena.rows += 1
    with pytest.raises(LoadError):
        decode(kv, 21, [3, 7, 11])


def test_integrity_notices_lost_pages_and_crooked_tables() -> None:
    kv = small_kv()
    decode(kv, 20, [3, 7, 11])
    kv.check_integrity()
    assert kv.hot is not None
    kv.hot.token_of_slot[0, 0, 0, 1] = 9
    with pytest.raises(AssertionError, match="does not point back"):
        kv.check_integrity()
    leaky = small_kv()
    leaky.host.pages.allocate(1)
    with pytest.raises(AssertionError, match="held pages and their holders differ"):
        leaky.check_integrity()


def test_spare_slots_keep_what_was_not_selected() -> None:
    tight, spare = small_kv(slots=6), small_kv(slots=9)
    for kv in (tight, spare):
        decode(kv, 20, [3, 7, 11])
        decode(kv, 21, [4, 8, 12])
    selection = Budget(6, 1, 2).compose(torch.tensor([[[3, 7, 11]]]), torch.tensor([23]))
    plans = [kv.read(torch.tensor([0]), selection).plan for kv in (tight, spare)]
    missing = [plan.missing.sum().item() for plan in plans if plan is not None]
    assert missing == [3, 0]


def test_one_gather_serves_all_layers_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    kv, layers = small_kv(), []

    def counting(source: Pages, target: Pages, parts: Parts, *others: Any, **options: Any) -> None:
        if isinstance(target, Slots):
            layers.append(parts.layers.tolist())
        copy_pieces(source, target, parts, *others, **options)

    monkeypatch.setattr(transfers, "copy_pieces", counting)
    for position, scored in enumerate(([3, 7, 11], [3, 8, 12], [4, 8, 12]), start=20):
        first, second = decode(kv, position, scored)
        assert (second - first == 100).all() and first[1:4].tolist() == scored
    assert layers == [[[0, 1]]] * 3  # one part, since the layers are one block whose only head reads alike


def test_steps_are_counted_on_the_device() -> None:
    kv = small_kv()
    assert kv.hot is not None
    counter = kv.hot.steps.data_ptr()
    for position in (20, 21):
        decode(kv, position, [3, 7, 11])
    assert kv.hot.steps.tolist() == [2] and kv.hot.steps.data_ptr() == counter
    assert kv.hot.last_used[:, 0].unique().tolist() == [2]

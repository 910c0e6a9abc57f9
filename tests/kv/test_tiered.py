"""TieredKV as a state machine: whatever requests do, attention reads the right rows, and only what was selected is loaded.

Truth is a dict from (seat, layer, KV head, token) to a number that is unique in the whole run and is written into every
value of the entry's row; so a row says which entry it is, and a stale one is found.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from torch import Tensor

from specontext.core import LoadPlan, ModelShape, Selection
from specontext.kernels.rows import gather_rows_layers
from specontext.kv import tiered
from specontext.kv.tiered import LoadError, TieredKV
from specontext.memory.pages import OutOfPagesError
from specontext.retrieval.selector import Budget

LAYERS, SEATS, DIM = 3, 3, 2
Pair = tuple[int, int, int]  # table, seat, group


def make_shape(kv_heads: int) -> ModelShape:
    return ModelShape(LAYERS, 8, kv_heads, kv_heads, DIM, 10, 64, torch.float32)


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


class TieredMachine(RuleBasedStateMachine):
    """Opens, writes, selects, reads and closes seats at random."""

    evictions = 0  # over all examples

    @initialize(data=st.data())
    def build(self, data: st.DataObject) -> None:
        kv_heads, groups = data.draw(st.sampled_from([(1, 1), (2, 3), (3, 2), (4, 1)]))
        self.shape, self.groups = make_shape(kv_heads), groups
        heads = st.lists(st.integers(0, groups - 1), min_size=kv_heads, max_size=kv_heads)
        self.head_map = [data.draw(heads) for _ in range(LAYERS)]
        self.resident = data.draw(st.tuples(*[st.booleans()] * LAYERS))
        self.in_layer = data.draw(st.booleans())
        self.tables = LAYERS if self.in_layer else 1
        sink, recent, scored = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)))
        self.budget = Budget(sink + recent + scored, sink, recent)
        self.hot = scored + data.draw(st.integers(0, 4))
        self.page_size, self.max_tokens = data.draw(st.integers(1, 5)), 40
        self.kv = TieredKV(
            self.shape,
            resident=self.resident,
            head_map=torch.tensor(self.head_map),
            tables=self.tables,
            groups=groups,
            slots=sink + recent + self.hot,
            sink=sink,
            recent=recent,
            seats=SEATS,
            max_tokens=self.max_tokens,
            page_size=self.page_size,
            device_pages=data.draw(st.integers(30, 300)),
            host_pages=data.draw(st.integers(30, 300)),
            device=torch.device("cpu"),
            verify_loads=True,
        )
        self.truth: dict[tuple[int, int, int, int], float] = {}
        self.serial = 0
        self.length: dict[int, int] = {}  # tokens stored, of the seats that are open
        self.room: dict[int, int] = {}
        self.caches: dict[Pair, Cache] = {}
        self.step = 0

    # Rules ------------------------------------------------------------------------------------------------------------

    @rule(seat=st.integers(0, SEATS - 1), tokens=st.integers(1, 40))
    def open(self, seat: int, tokens: int) -> None:
        if seat in self.length:
            return
        pools = (self.kv.arena.pages, self.kv.host.pages)
        free = tuple(pool.num_free for pool in pools)
        needed = self.kv.pages_needed(tokens)
        if any(n > f for n, f in zip(needed, free, strict=True)):
            with pytest.raises(OutOfPagesError):
                self.kv.open(seat, tokens)
            assert tuple(pool.num_free for pool in pools) == free
            return
        self.kv.open(seat, tokens)
        assert tuple(f - pool.num_free for f, pool in zip(free, pools, strict=True)) == needed
        self.length[seat], self.room[seat] = 0, tokens
        for table in range(self.tables):
            for group in range(self.groups):
                self.caches[table, seat, group] = Cache([-1] * self.hot, [0] * self.hot)

    @precondition(lambda self: self.length)
    @rule(seed=st.integers(0, 2**32), steps=st.integers(1, 8))
    def run_steps(self, seed: int, steps: int) -> None:
        """Steps of the engine: decode tokens of some seats, chunks of the prompts of others."""
        rng = random.Random(seed)
        for _ in range(steps):
            chosen = [seat for seat in self.length if self.length[seat] < self.room[seat] and rng.random() < 0.8]
            decodes = [seat for seat in chosen if self.length[seat] and rng.random() < 0.9]
            rng.shuffle(decodes)
            chunks = [(seat, rng.randint(1, self.room[seat] - self.length[seat])) for seat in chosen if seat not in decodes]
            if chosen:
                self.run_step(rng, decodes, chunks)
                self.slots_hold_what_the_tables_say()

    def run_step(self, rng: random.Random, decodes: list[int], chunks: list[tuple[int, int]]) -> None:
        self.step += 1
        selections: dict[int, Selection] = {}
        if decodes and not self.in_layer:
            selections = dict.fromkeys(range(LAYERS), self.select(rng, decodes, 0, None))
        seats = decodes + [seat for seat, size in chunks for _ in range(size)]
        positions = [self.length[seat] for seat in decodes]
        lengths = [p + 1 for p in positions]
        for seat, size in chunks:
            positions += range(self.length[seat], self.length[seat] + size)
            lengths += [self.length[seat] + size] * size
        for layer in range(LAYERS):
            self.append(layer, seats, positions, lengths)
            if decodes and self.in_layer:
                selections[layer] = self.select(rng, decodes, layer, layer)
            if decodes:
                rows = self.kv.rows(layer, torch.tensor(decodes), selections[layer], in_layer=self.in_layer)
                self.check_rows(layer, decodes, selections[layer], rows)
        for seat in decodes:
            self.length[seat] += 1
        for seat, size in chunks:
            self.length[seat] += size

    @precondition(lambda self: self.length)
    @rule(data=st.data())
    def stream(self, data: st.DataObject) -> None:
        """A tile of some seats holds their tokens start .. stop - 1."""
        seats = data.draw(st.lists(st.sampled_from(sorted(self.length)), min_size=1, unique=True))
        start = data.draw(st.integers(0, 10))
        stops = [data.draw(st.integers(0, self.length[seat])) for seat in seats]
        if start >= max(stops):
            return
        layer = data.draw(st.integers(0, LAYERS - 1))
        stop: Any = torch.tensor(stops) if len(seats) > 1 else stops[0]
        buffer, rows = self.kv.tile(layer, torch.tensor(seats), start, stop)
        assert rows.shape == (len(seats), self.shape.kv_heads, max(stops) - start)
        for r, seat in enumerate(seats):
            for head in range(self.shape.kv_heads):
                tokens = [t if t < stops[r] else -1 for t in range(start, max(stops))]
                self.check_head(layer, seat, head, tokens, buffer, rows[r, head])

    @precondition(lambda self: self.length)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        seat = data.draw(st.sampled_from(sorted(self.length)))
        self.kv.close(seat)
        del self.length[seat], self.room[seat]
        self.truth = {key: value for key, value in self.truth.items() if key[0] != seat}

    # Parts of a step --------------------------------------------------------------------------------------------------

    def append(self, layer: int, seats: list[int], positions: list[int], lengths: list[int]) -> None:
        new = torch.empty(len(seats), self.shape.kv_heads, DIM)
        for i, (seat, position) in enumerate(zip(seats, positions, strict=True)):
            for head in range(self.shape.kv_heads):
                self.serial += 1
                self.truth[seat, layer, head, position] = self.serial
                new[i, head] = self.serial
        self.kv.append(layer, *(torch.tensor(x) for x in (seats, positions)), new, -new, torch.tensor(lengths))

    def select(self, rng: random.Random, decodes: list[int], table: int, layer: int | None) -> Selection:
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
            patch.setattr(tiered, "gather_rows_layers", self.recording(loaded))
            plan = self.kv.begin_step(torch.tensor(decodes), selection, layer)
        self.check_plan(decodes, table, layer, selection, plan, loaded)
        return selection

    @staticmethod
    def recording(loaded: list[float]) -> Any:
        def gather(source: Tensor, target: Tensor, *plan: Any) -> None:
            written = torch.full_like(target, torch.nan)
            gather_rows_layers(source, written, *plan)
            loaded.extend(number for number in written[:, 0, 0].tolist() if number == number)
            gather_rows_layers(source, target, *plan)

        return gather

    # Checks -----------------------------------------------------------------------------------------------------------

    def check_plan(
        self, seats: list[int], table: int, layer: int | None, selection: Selection, plan: LoadPlan | None, loaded: list[float]
    ) -> None:
        offloaded = [i for i in (range(LAYERS) if layer is None else [layer]) if not self.resident[i]]
        if not offloaded:
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
                type(self).evictions += len(held - set(cache.tokens))
                assert set(selection.tokens[r, g][plan.missing[r, g]].tolist()) == missing
                assert torch.equal(plan.slots[r, g] < 0, selection.tokens[r, g] < 0)
                expected += [
                    self.truth[seat, i, head, token]
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
        expected = [self.truth[seat, layer, head, token] for token in tokens if token >= 0]
        found = buffer[rows[rows >= 0]]
        number = torch.tensor(expected)[:, None].expand(-1, DIM)
        assert torch.equal(found, torch.stack((number, -number), dim=1))

    @invariant()
    def slots_hold_what_the_tables_say(self) -> None:
        if self.kv.hot is None:
            return
        for (table, seat, group), cache in self.caches.items():
            if seat not in self.length:
                continue
            assert self.kv.hot.token_of_slot[table, seat, group].tolist() == cache.tokens
            for layer in [table] if self.in_layer else range(LAYERS):
                if self.resident[layer]:
                    continue
                slots = torch.arange(self.hot) + self.budget.sink + self.budget.recent
                rows = self.kv.arena.rows_of(self.kv.device_table[layer, [seat]], slots[None, None])[0]
                for head in range(self.shape.kv_heads):
                    if self.head_map[layer][head] == group:
                        present = torch.where(torch.tensor(cache.tokens) >= 0, rows[head], -1)
                        self.check_head(layer, seat, head, cache.tokens, self.kv.arena.rows, present)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.kv.check_integrity()
        held = [sum(pages) for pages in zip(*(self.kv.pages_needed(self.room[s]) for s in self.length), strict=True)] or [0, 0]
        assert [self.kv.arena.pages.num_held, self.kv.host.pages.num_held] == held

    def teardown(self) -> None:
        if not hasattr(self, "kv"):
            return
        for seat in list(self.length):
            self.kv.close(seat)
        self.kv.check_integrity()
        assert self.kv.arena.pages.num_held == self.kv.host.pages.num_held == 0


def test_any_sequence_of_steps() -> None:
    TieredMachine.evictions = 0
    bounds = settings(
        max_examples=60, stateful_step_count=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
    )
    run_state_machine_as_test(TieredMachine, settings=bounds)  # type: ignore[no-untyped-call]
    assert TieredMachine.evictions > 50


# The checks can fail --------------------------------------------------------------------------------------------------


def small_kv(*, slots: int = 6, verify_loads: bool = True) -> TieredKV:
    """One seat, one head, all offloaded: sink 1, recent 2, and the rest hot slots; 20 tokens are stored."""
    kv = TieredKV(
        ModelShape(2, 8, 1, 1, DIM, 10, 64, torch.float32),
        resident=(False, False),
        head_map=torch.zeros(2, 1, dtype=torch.int64),
        tables=1,
        groups=1,
        slots=slots,
        sink=1,
        recent=2,
        seats=1,
        max_tokens=32,
        page_size=4,
        device_pages=40,
        host_pages=40,
        device=torch.device("cpu"),
        verify_loads=verify_loads,
    )
    kv.open(0, 32)
    for position in range(20):
        write(kv, position)
    return kv


def write(kv: TieredKV, position: int) -> None:
    at = torch.tensor([position])
    for layer in range(kv.shape.layers):
        row = torch.full((1, 1, DIM), 100.0 * layer + position)
        kv.append(layer, torch.tensor([0]), at, row, row, at + 1)


def decode(kv: TieredKV, position: int, scored: list[int]) -> list[Tensor]:
    """One step that selects `scored`; what each layer's attention reads as K."""
    seats = torch.tensor([0])
    selection = Budget(3 + len(scored), 1, 2).compose(torch.tensor([[scored]]), torch.tensor([position + 1]))
    kv.begin_step(seats, selection)
    write(kv, position)
    return [kv.arena.rows[kv.rows(layer, seats, selection, in_layer=False)[0, 0], 0, 0] for layer in range(kv.shape.layers)]


def test_a_step_reads_sinks_scored_and_recent_tokens_of_its_layer() -> None:
    first, second = decode(small_kv(), 20, [3, 7, 11])
    assert first.tolist() == [0, 3, 7, 11, 19, 20]
    assert second.tolist() == [100, 103, 107, 111, 119, 120]


def test_wrong_rows_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(*arguments: Any) -> None:
        before, tokens, after = arguments[:7], arguments[7], arguments[8:]
        gather_rows_layers(*before, tokens - 1, *after)

    monkeypatch.setattr(tiered, "gather_rows_layers", shifted)
    with pytest.raises(LoadError, match="layer 0: a slot holds a row that differs"):
        decode(small_kv(), 20, [3, 7, 11])
    assert decode(small_kv(verify_loads=False), 20, [3, 7, 11])[0].tolist() == [0, 2, 6, 10, 19, 20]


def test_forgotten_loads_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = small_kv()
    decode(kv, 20, [3, 7, 11])
    monkeypatch.setattr(tiered, "gather_rows_layers", lambda *_: None)
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
    missing = [plan.missing.sum().item() for kv in (tight, spare) if (plan := kv.begin_step(torch.tensor([0]), selection))]
    assert missing == [3, 0]


def test_one_gather_serves_all_layers_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    kv, layers = small_kv(), []

    def counting(*arguments: Any) -> None:
        layers.append(arguments[4].tolist())
        gather_rows_layers(*arguments)

    monkeypatch.setattr(tiered, "gather_rows_layers", counting)
    for position, scored in enumerate(([3, 7, 11], [3, 8, 12], [4, 8, 12]), start=20):
        first, second = decode(kv, position, scored)
        assert (second - first == 100).all() and first[1:4].tolist() == scored
    assert layers == [[0, 1]] * 3


def test_steps_are_counted_on_the_device() -> None:
    kv = small_kv()
    assert kv.hot is not None
    counter = kv.hot.steps.data_ptr()
    for position in (20, 21):
        decode(kv, position, [3, 7, 11])
    assert kv.hot.steps.tolist() == [2] and kv.hot.steps.data_ptr() == counter
    assert kv.hot.last_used.unique().tolist() == [2]

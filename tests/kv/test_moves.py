"""What a step pays for a layer that moves: a portion, however long the requests are; and nothing in it waits for the device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specontext.errors import HostMemoryError
from specontext.kernels import dispatch
from specontext.kv import copying, seat_copies, seats
from specontext.kv.cache import KVCache
from specontext.kv.hot_slots import SlotSizes
from specontext.kv.layout import Layout, Reader
from specontext.kv.pool import make_pools
from specontext.memory.layer_blocks import LayerBlocks
from specontext.memory.pages import PageAllocator
from specontext.model_shape import ModelShape
from tests.engine.test_graph_safety import Guard, SeveralStreams, guarded

LAYERS, SEATS, PAGE, PORTION, SLOTS = 6, 3, 4, 64, 24
BLOCKS = LayerBlocks((3, 3), 3, tuple(range(LAYERS)))


def make_kv(tokens: int, *, spare: int = 0) -> KVCache:
    """Three requests of so many tokens, with room for some pages more."""
    layout, cpu = Layout.of_shape(ModelShape(LAYERS, 8, 1, 1, 2, 10, 64, torch.float32), PAGE, BLOCKS), torch.device("cpu")
    room = SEATS * (tokens // PAGE + spare + 2)
    kv = KVCache(
        *make_pools(layout, device_pages=(LAYERS + 1) * room + 60, host_pages=3 * room, device=cpu),
        resident=[True] * LAYERS,
        reader=Reader.of_map(layout, torch.zeros(LAYERS, 1, dtype=torch.int64), cpu),
        slots=SlotSizes(SLOTS, sink=2, recent=4),
        seats=SEATS,
        max_tokens=tokens + spare * PAGE,
        adaptive=True,
    )
    for seat in range(SEATS):
        assert kv.open(seat, tokens + spare * PAGE) is None
    kv.arena.rows[kv.arena.page_rows :] = torch.randn(kv.arena.rows[kv.arena.page_rows :].shape)
    return kv


@dataclass
class Work(TorchDispatchMode):
    """What happens inside: lines of this package, operations, numbers of the largest result, pages taken, rows copied."""

    lines: int = 0
    operations: int = 0
    largest: int = 0
    pages: int = 0
    rows: int = 0
    patch: Any = field(default=None)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        result = func(*args, **(kwargs or {}))
        views = func.is_view or func._schema.name.endswith("_")
        if not views:
            self.largest = max([self.largest, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))])
        return result

    def trace(self, frame: Any, event: str, _: Any) -> Any:
        if "specontext" not in frame.f_code.co_filename:
            return None
        self.lines += event == "line"
        return self.trace


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    work = Work()
    allocate, gather = PageAllocator.allocate, copying.gather_rows

    def taking(self: PageAllocator, count: int) -> list[int]:
        work.pages += count
        return allocate(self, count)

    def copying_rows(*args: Any) -> None:
        work.rows += args[1].numel()
        gather(*args)

    before = sys.gettrace()
    with monkeypatch.context() as patch, work:
        patch.setattr(PageAllocator, "allocate", taking)
        patch.setattr(copying, "gather_rows", copying_rows)
        sys.settrace(work.trace)
        try:
            yield work
        finally:
            sys.settrace(before)


def most_of_a_move(kv: KVCache, layer: int, *, to_host: bool, tokens: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, ...]:
    """The most that any step of a move does, of everything that is counted."""
    stored = dict.fromkeys(range(SEATS), tokens)
    portion = PORTION * kv.layout.layers[0].entry_bytes
    found: list[Work] = []

    def step(act: Callable[[], object]) -> None:
        with counted(monkeypatch) as work:
            act()
        found.append(work)

    step(partial(kv.begin_move, layer, to_host=to_host))
    while not kv.move_is_copied(stored):
        step(partial(kv.advance_move, stored, portion))
    for seat in stored:  # a token that came with the last step
        stored[seat] += 1
    step(partial(kv.finish_move, stored))
    assert len(found) >= 2 + SEATS * tokens // PORTION
    kv.check_integrity()
    return tuple(max(getattr(work, name) for work in found) for name in ("lines", "operations", "largest", "pages", "rows"))


def test_what_a_step_does_for_a_move_does_not_grow_with_the_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers leave and come back, alone and as the first or last of their block on the host."""
    short, long = [], []
    for tokens, found in ((128, short), (1024, long)):
        kv = make_kv(tokens, spare=2)
        for layer, to_host in ((5, True), (4, True), (4, False), (5, False)):
            found.append(most_of_a_move(kv, layer, to_host=to_host, tokens=tokens, monkeypatch=monkeypatch))
    for little, much in zip(short, long, strict=True):
        assert much[0] <= 1.1 * little[0] and much[1] <= little[1] + 2, "lines and operations"
        assert much[2] <= little[2] * 1.1 and much[2] < SEATS * SLOTS * 4 + 8 * PORTION + 400, "numbers of a tensor"
        assert much[3] <= PORTION // PAGE + SEATS * (1 + SLOTS // PAGE) and much[4] <= PORTION + SEATS


def test_a_move_without_portions_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    kv, stored = make_kv(1024, spare=2), dict.fromkeys(range(SEATS), 1024)
    assert kv.begin_move(5, to_host=True)
    with counted(monkeypatch) as work:
        kv.finish_move(stored)
    assert work.rows == 3 * 1024 and work.pages > 3 * 1024 // PAGE and work.largest >= 3 * 1024


@pytest.mark.parametrize("to_host", [True, False])
def test_a_move_waits_for_nothing_on_the_device(to_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: kernels, streams, and numbers that come from pinned memory."""
    kv, stored = make_kv(40, spare=2), dict.fromkeys(range(SEATS), 40)
    if not to_host:
        assert kv.begin_move(5, to_host=True) and kv.finish_move(stored)
    truth = rows(kv, 5, 41)
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    kv.transfers.run_on(SeveralStreams())  # type: ignore[arg-type]

    def uploading(*args: Any) -> torch.Tensor:
        Guard.inside_a_kernel = True
        try:
            return dispatch.upload(*args)
        finally:
            Guard.inside_a_kernel = False

    for module in (seats, seat_copies):
        monkeypatch.setattr(module, "upload", uploading)
    with torch.inference_mode(), guarded(monkeypatch):
        assert kv.begin_move(5, to_host=to_host)
        while not kv.move_is_copied(stored):
            kv.advance_move(stored, 30 * kv.layout.layers[0].entry_bytes)
        assert kv.finish_move(dict.fromkeys(stored, 41))
    monkeypatch.delenv(dispatch.VARIABLE)
    assert torch.equal(rows(kv, 5, 41), truth)
    kv.check_integrity()


def rows(kv: KVCache, layer: int, tokens: int) -> torch.Tensor:
    home = kv.transfers.home(layer)
    return home.rows[home.rows_of(layer, torch.arange(SEATS), torch.arange(tokens).expand(SEATS, 1, -1))].clone()


# Pages that are claimed -----------------------------------------------------------------------------------------------


def test_nobody_else_gets_what_a_moving_layer_needs() -> None:
    kv, stored = make_kv(40), dict.fromkeys(range(SEATS), 40)
    host = kv.host.pages
    free = host.num_free
    assert kv.begin_move(5, to_host=True) and host.num_held == 0 and host.num_free == free - 30
    others = kv.host.allocate(host.num_free)
    assert kv.park(0, 40) is None, "nor does one that would wait there take more than its own"
    assert kv.finish_move(stored) and host.num_held == len(others) + 30 and not host.claimed
    host.free(others)
    kv.check_integrity()


def test_a_move_goes_on_with_the_memory_that_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    kv, stored = make_kv(40), dict.fromkeys(range(SEATS), 40)
    truth, portion = rows(kv, 5, 40), 80 * kv.layout.layers[0].entry_bytes
    ready = [7]
    monkeypatch.setattr(kv.host, "at_once", lambda count: min(count, ready[0]))
    assert kv.begin_move(5, to_host=True)
    for pages in (7, 0, 5):
        ready[0] = pages
        copied = kv.advance_move(stored, portion, patient=True)
        assert copied == pages * PAGE * kv.layout.layers[0].entry_bytes
        kv.check_integrity()
    assert kv.finish_move(stored) and torch.equal(rows(kv, 5, 40), truth)


def test_memory_that_is_refused_leaves_a_move_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    kv, stored = make_kv(40), dict.fromkeys(range(SEATS), 40)
    truth = rows(kv, 5, 40)
    assert kv.begin_move(5, to_host=True)
    with monkeypatch.context() as patch:
        patch.setattr(kv.host, "_allocate", refuse)
        for _ in range(2):
            with pytest.raises(HostMemoryError):
                kv.advance_move(stored, 1 << 20)
            kv.check_integrity()
    assert kv.finish_move(stored) and torch.equal(rows(kv, 5, 40), truth)
    kv.check_integrity()


def refuse(count: int) -> list[int]:
    raise HostMemoryError("no more")


@pytest.mark.parametrize("how", ["cancelled", "closed", "parked"])
def test_claims_end_with_who_has_them(how: str) -> None:
    kv, stored = make_kv(40), dict.fromkeys(range(SEATS), 40)
    assert kv.begin_move(5, to_host=True)
    kv.advance_move(stored, 50 * kv.layout.layers[0].entry_bytes)
    if how == "cancelled":
        kv.cancel_move()
        assert not kv.host.pages.num_held
    elif how == "closed":
        kv.close(1)
        assert kv.host.pages.claimed + kv.host.pages.num_held == 20
    else:
        parked = kv.park(1, 40)
        assert parked is not None and parked.num_pages == 20 and kv.host.pages.claimed + kv.host.pages.num_held == 40
    assert how == "cancelled" or kv.finish_move(stored)
    assert not kv.host.pages.claimed
    kv.check_integrity()

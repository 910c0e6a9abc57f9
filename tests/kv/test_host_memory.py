"""Host memory is pinned chunk by chunk ahead of need, refuses with words that help, and gives everything back."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from specontext.errors import HostMemoryError, MemoryPlanError
from specontext.kv import host_memory
from specontext.kv.cache import KVCache
from specontext.kv.host_memory import HostMemory
from specontext.kv.hot_slots import SlotSizes
from specontext.kv.layout import Layout, Reader
from specontext.kv.pool import PagePool, make_pools
from specontext.memory.layer_blocks import one_by_one
from specontext.model_shape import ModelShape

CHUNK, AHEAD = 1 << 20, 2


class Driver:
    """Counts what is pinned, and whether all of it was committed before; refuses beyond `limit` bytes, and holds its answer back
    while `gate` is closed."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.limit = 1 << 60
        self.committed = True
        self.gate = threading.Event()
        self.gate.set()

    def register(self, address: int, size: int) -> int:
        self.gate.wait(10)
        self.committed &= committed(address, size)
        if sum(self.pinned.values()) + size > self.limit:
            return 2
        assert address not in self.pinned
        self.pinned[address] = size
        return 0

    def unregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


def committed(address: int, size: int) -> bool:
    """Whether the system has pages for all of this memory."""
    page, first = mmap.PAGESIZE, address // mmap.PAGESIZE
    count = -(-(address + size) // page) - first
    found = (ctypes.c_ubyte * count)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(first * page), ctypes.c_size_t(count * page), found) == 0
    return all(one & 1 for one in found)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    fake = Driver()
    monkeypatch.setattr(host_memory, "CHUNK", CHUNK)
    monkeypatch.setattr(host_memory, "AHEAD", AHEAD)
    monkeypatch.setattr(host_memory, "register", fake.register)
    monkeypatch.setattr(host_memory, "unregister", fake.unregister)
    yield fake
    fake.gate.set()


def settled(memory: HostMemory, end: int) -> None:
    """Wait until the thread has pinned so far."""
    assert memory._pins is not None
    with memory._pins._changed:
        assert memory._pins._changed.wait_for(lambda: memory.ready_bytes >= end, timeout=10)


def test_chunks_are_pinned_in_order_and_ahead_of_need(driver: Driver) -> None:
    size = (AHEAD + 8) * CHUNK + 100
    memory = HostMemory(size, pinned=True)
    settled(memory, (1 + AHEAD) * CHUNK)
    first = memory.bytes.data_ptr()
    assert first % (1 << 21) == 0, "huge pages begin at their own size"
    assert sorted(driver.pinned) == [first + n * CHUNK for n in range(1 + AHEAD)]
    driver.gate.clear()
    memory.reach((1 + AHEAD) * CHUNK)  # is there: nothing to wait for, although the driver does not answer
    driver.gate.set()
    memory.reach(size)
    assert memory.ready_bytes == size == sum(driver.pinned.values())
    memory.close()
    assert not driver.pinned


@pytest.mark.parametrize("populates", [True, False], ids=["populated", "written"])
def test_memory_is_committed_before_the_driver_has_it(driver: Driver, monkeypatch: pytest.MonkeyPatch, populates: bool) -> None:
    if not populates:  # an older kernel knows no such advice
        monkeypatch.setattr(host_memory, "POPULATE_WRITE", 9999)
    memory = HostMemory(5 * CHUNK + 100, pinned=True)
    memory.reach(5 * CHUNK + 100)
    assert driver.committed and not memory.bytes.any()
    memory.close()


def test_who_waits_is_served_without_the_pauses(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "PAUSE", 1e9)
    memory = HostMemory(8 * CHUNK, pinned=True)
    assert memory.ready_bytes == CHUNK, "what nobody waits for has to wait"
    memory.reach(5 * CHUNK)
    assert memory.ready_bytes == 5 * CHUNK
    memory.close()
    assert not driver.pinned


def test_what_was_begun_ahead_of_need_can_be_waited_for(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "PAUSE", 1e9)
    memory = HostMemory(8 * CHUNK, pinned=True)
    memory.finish()
    assert memory.ready_bytes == (1 + AHEAD) * CHUNK
    memory.finish()  # there is nothing to wait for
    driver.limit = 4 * CHUNK
    memory.prepare(8 * CHUNK)
    memory.finish()
    assert memory.ready_bytes == 4 * CHUNK
    memory.close()
    HostMemory(100, pinned=False).finish()


def test_reaching_far_waits_for_the_thread(driver: Driver) -> None:
    memory = HostMemory(8 * CHUNK, pinned=True)
    driver.gate.clear()
    release = threading.Timer(0.05, driver.gate.set)
    release.start()
    memory.reach(8 * CHUNK)
    assert memory.ready_bytes == 8 * CHUNK
    memory.close()


def test_memory_that_cannot_be_pinned_is_an_error_that_says_what_to_set(driver: Driver) -> None:
    driver.limit = 4 * CHUNK
    memory = HostMemory(9 * CHUNK, pinned=True)
    with pytest.raises(HostMemoryError) as caught:
        memory.reach(6 * CHUNK)
    words = str(caught.value)
    for part in (str(4 * CHUNK), str(6 * CHUNK), str(9 * CHUNK), "--host-memory", "ulimit -l", "CUDA error 2"):
        assert part in words
    memory.reach(4 * CHUNK)  # what is there can still be used
    memory.close()
    assert not driver.pinned


def test_pages_are_not_lost_where_their_memory_is_refused(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.limit = 3 * CHUNK
    shape = ModelShape(1, 8, 2, 2, 64, 10, 64, torch.float32)
    memory = HostMemory(8 * CHUNK, pinned=True)
    page = 16 * 2 * 2 * 64 * 4
    pool = host_memory_pool(shape, memory, 8 * CHUNK // page)
    taken = pool.allocate(CHUNK // page)
    with pytest.raises(HostMemoryError):
        pool.allocate(5 * CHUNK // page)
    pool.pages.check_integrity([taken])
    memory.close()


def test_a_seat_that_cannot_grow_on_the_host_is_as_it_was(driver: Driver) -> None:
    shape = ModelShape(2, 8, 2, 2, 64, 10, 64, torch.float32)
    memory = HostMemory(8 * CHUNK, pinned=True)
    layout = one_layer_a_block(shape)
    arena, _ = make_pools(layout, device_pages=900, host_pages=1, device=torch.device("cpu"))
    host = host_memory_pool(shape, memory, 8 * CHUNK // arena.page_bytes)
    kv = KVCache(
        arena,
        host,
        resident=(True, False),
        reader=Reader.of_map(layout, torch.zeros(2, 2, dtype=torch.int64), arena.rows.device),
        slots=SlotSizes(32, sink=1, recent=2),
        seats=1,
        max_tokens=8000,
    )
    assert kv.open(0, 100) is None
    driver.limit = sum(driver.pinned.values())
    with pytest.raises(HostMemoryError):
        kv.grow(0, 7000)
    kv.check_integrity()
    kv.close(0)
    memory.close()


def host_memory_pool(shape: ModelShape, memory: HostMemory, pages: int) -> PagePool:
    layout = one_layer_a_block(shape)
    return PagePool(layout, layout.layer_blocks, pages, "host tier of KV", torch.device("cpu"), memory)


def one_layer_a_block(shape: ModelShape) -> Layout:
    return Layout.of_shape(shape, 16, one_by_one(shape.layers))


def test_memory_of_a_cpu_is_all_there_at_once() -> None:
    memory = HostMemory(1 << 32, pinned=False)  # nothing is committed before it is written
    assert memory.ready_bytes == 1 << 32
    memory.reach(1 << 32)
    memory.bytes[:8] = 1
    assert memory.bytes[:9].tolist() == [1] * 8 + [0]
    memory.close()


def test_more_than_the_system_has_is_refused() -> None:
    with pytest.raises(HostMemoryError, match="lower --host-memory"):
        HostMemory(1 << 55, pinned=False)


def test_a_file_takes_the_place_of_memory_and_leaves_no_trace(tmp_path: Path) -> None:
    shape = ModelShape(1, 8, 2, 2, 4, 10, 64, torch.float32)
    options = {"device_pages": 3, "host_pages": 50, "device": torch.device("cpu")}
    _, pool = make_pools(Layout.of_shape(shape, 16), **options, directory=tmp_path)  # type: ignore[arg-type]
    pool.rows[10:20] = 3.0
    assert pool.rows[10:20].eq(3).all() and not list(tmp_path.iterdir())
    with pytest.raises(HostMemoryError, match="another directory with --offload-dir"):
        make_pools(Layout.of_shape(shape, 16), **options, directory=tmp_path / "nowhere")  # type: ignore[arg-type]


def test_a_device_that_refuses_the_memory_of_its_tier_says_so() -> None:
    shape = ModelShape(1, 8, 1, 1, 8, 10, 10, torch.float32)
    with pytest.raises(MemoryPlanError, match=r"the device tier of KV asks for \d{15} bytes .*: lower --gpu-memory"):
        layout = Layout.of_shape(shape, 1 << 42)
        PagePool(layout, layout.by_layer, 2, "device tier of KV", torch.device("cpu"))

"""Sums in the ranks' memory, as far as a CPU tells: what they take, what ranks agree on, and which signals let a kernel go."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from specontext.memory.sharing import Share
from specontext.models.near_sums import BLOCKS, LARGEST, NearSums, let_go, near_sums, takes, what_fails
from specontext.models.ranks import Ranks

CPU = torch.device("cpu")


@contextmanager
def connected(size: int) -> Iterator[list[Ranks]]:
    """Ranks as threads of this process."""
    first = Ranks(Share(0, size))
    ranks = [first, *(Ranks(Share(rank, size), first.port) for rank in range(1, size))]
    with ThreadPoolExecutor(size) as threads:
        list(threads.map(lambda one: one.connect(CPU), ranks))
    try:
        yield ranks
    finally:
        for one in ranks:
            one.close()


@pytest.mark.parametrize(
    "dtype, size, taken",
    [
        (torch.bfloat16, 8192, True),
        (torch.float32, 4, True),
        (torch.float32, LARGEST, True),
        (torch.float32, LARGEST + 4, False),
        (torch.bfloat16, 2, False),
        (torch.bfloat16, 8194, False),
        (torch.bfloat16, 0, False),
        (torch.float16, 8192, False),
        (torch.float64, 8192, False),
        (torch.int32, 8192, False),
    ],
)
def test_small_tensors_of_two_number_formats_are_taken(dtype: torch.dtype, size: int, taken: bool) -> None:
    assert takes(dtype, size) is taken


def test_tensors_of_another_device_are_not_taken() -> None:
    sums = NearSums(Share(0, 2), None, "sums", torch.device("cuda:0"))
    assert not sums.takes(torch.zeros(4096, dtype=torch.bfloat16))


@pytest.mark.parametrize("failing, at", [((), 3), ((1,), 1), ((0, 2), 1), ((0, 1, 2), 0), ((2,), 2)])
def test_ranks_go_as_far_as_all_of_them_come(failing: tuple[int, ...], at: int) -> None:
    """All make the stages up to the one at which a rank fails, and none a later one, whichever rank that is."""

    def go(ranks: Ranks) -> tuple[list[int], str | None]:
        gone: list[int] = []

        def stage(number: int) -> Callable[[], None]:
            def run() -> None:
                gone.append(number)
                if number == at and ranks.share.rank in failing:
                    raise OSError(f"stage {number} of rank {ranks.share.rank}")

            return run

        return gone, what_fails(map(stage, range(3)), ranks.least)

    with connected(3) as ranks, ThreadPoolExecutor(3) as threads:
        found = list(threads.map(go, ranks))
    for rank, (gone, why) in enumerate(found):
        assert gone == list(range(min(at + 1, 3)))
        assert why == (None if not failing else f"stage {at} of rank {rank}" if rank in failing else "another rank cannot")


def test_where_gpus_do_not_reach_each_other_all_ranks_say_so_and_go_without(caplog: pytest.LogCaptureFixture) -> None:
    def go(ranks: Ranks) -> NearSums | None:
        device = torch.device("cuda:0")  # the same one for both, which none can share
        return near_sums(ranks.share, ranks._store, ranks.port, device, ranks.least)

    with connected(2) as ranks, ThreadPoolExecutor(2) as threads, caplog.at_level(logging.INFO, "specontext"):
        assert list(threads.map(go, ranks)) == [None, None]
    said = [record.message for record in caplog.records if "NCCL alone" in record.message]
    assert len(said) == 2 and all(message.endswith("GPU 0 has no direct access to GPU 0") for message in said)


def test_ranks_on_a_cpu_add_up_as_ever() -> None:
    def go(ranks: Ranks) -> Tensor:
        numbers = torch.full((3, 5), float(1 + ranks.share.rank))
        ranks.sum_(numbers)
        return numbers

    with connected(2) as ranks, ThreadPoolExecutor(2) as threads:
        assert all(one.near is None for one in ranks)
        for found in threads.map(go, ranks):
            assert bool((found == 3).all())


class Waiting:
    """The kernels of one rank: for each block and other rank a thread that puts a signal, then waits for one, again and again."""

    def __init__(self, pads: list[Tensor], rank: int, waits: int) -> None:
        self._pads, self._rank = pads, rank
        threads = [(block, other) for block in range(BLOCKS) for other in range(len(pads))]
        self._left = {thread: 2 * waits for thread in threads}

    @property
    def done(self) -> bool:
        return not any(self._left.values())

    def go_on(self) -> None:
        """Each thread goes as far as signals let it."""
        for (block, other), left in self._left.items():
            while left:
                putting = left % 2 == 0
                pad, column = (self._pads[other], self._rank) if putting else (self._pads[self._rank], other)
                if int(pad[block, column]) == int(putting):
                    break
                pad[block, column] = int(putting)
                left -= 1
            self._left[block, other] = left


@pytest.mark.parametrize("size, rank", [(2, 0), (2, 1), (3, 1)])
def test_a_rank_whose_others_are_gone_is_let_go(size: int, rank: int) -> None:
    """One wait of each round, however many are queued; without rounds it waits for ever."""
    pads = [torch.zeros((BLOCKS, size), dtype=torch.int32) for _ in range(size)]
    kernels = Waiting(pads, rank, waits=8)
    for _ in range(3):
        kernels.go_on()
    assert not kernels.done
    rounds = 0
    while not kernels.done and rounds < 100:
        let_go(pads, rank)
        kernels.go_on()
        rounds += 1
    assert kernels.done and rounds <= 9


def test_signals_between_others_are_left_alone() -> None:
    pads = [torch.full((BLOCKS, 3), 7, dtype=torch.int32) for _ in range(3)]
    let_go(pads, 1)
    assert [pad[0].tolist() for pad in pads] == [[7, 0, 7], [1, 7, 1], [7, 0, 7]]
    assert all(bool((pad == pad[0]).all()) for pad in pads)


def test_without_memory_of_others_there_is_nothing_to_let_go_or_close() -> None:
    sums = NearSums(Share(0, 2), None, "sums", torch.device("cuda:0"))
    sums.release()
    sums.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["as it was made", "in the midst of its memory", "in another order"])
def test_tensors_are_handed_on_whole_and_come_back_where_they_were(dtype: torch.dtype, kind: str) -> None:
    """The kernel, here two ranks with the same numbers, has contiguous tensors of one shape that begin at 16 bytes."""
    sums = NearSums(Share(0, 2), None, "sums", CPU)
    sums._buffer = torch.zeros(LARGEST, dtype=torch.uint8)

    def add_up(shared: Tensor, how: str, name: str, out: Tensor) -> None:
        assert (how, name) == ("sum", "sums") and shared.storage_offset() == 0
        assert shared.shape == out.shape and shared.dtype == out.dtype
        assert out.is_contiguous() and out.data_ptr() % 16 == 0
        out.copy_(2 * shared)

    sums._sum = add_up
    numbers = torch.arange(6 * 64).view(6, 64).to(dtype) % 99
    tensor = {
        "as it was made": numbers.clone(),
        "in the midst of its memory": torch.cat((numbers.flatten()[:1], numbers.flatten()))[1:].view(6, 64),
        "in another order": numbers.T.contiguous().T,
    }[kind]
    where = tensor.data_ptr()
    sums.sum_(tensor)
    assert torch.equal(tensor, 2 * numbers) and tensor.data_ptr() == where


class Recorded:
    """Stands for the ranks' memory and for NCCL: what is asked of them, in order."""

    def __init__(self, rests: bool = True) -> None:
        self.asked: list[str] = []
        self._rests = rests

    def __getattr__(self, name: str) -> Callable[..., bool | None]:
        def ask(*_: object) -> bool | None:
            self.asked.append(name)
            return {"takes": True, "idle": self._rests}.get(name)

        return ask


def ranks_with(recorded: Recorded) -> Ranks:
    ranks = Ranks(Share(0, 1))
    ranks.near = ranks._device = recorded  # type: ignore[assignment]
    return ranks


def test_an_abort_lets_go_before_nccl_ends_and_sums_go_to_nccl_from_then_on() -> None:
    """Which may wait for the device; an aborted communicator refuses what it is given."""
    ranks = ranks_with(recorded := Recorded())
    ranks.sum_(torch.zeros(4))
    ranks.abort()
    ranks.abort()
    ranks.sum_(torch.zeros(4))
    assert recorded.asked == ["takes", "sum_", "release", "abort", "allreduce"]


@pytest.mark.parametrize("rests, asked", [(True, ["idle", "close", "abort"]), (False, ["idle", "release", "abort", "close"])])
def test_ranks_part_without_signals_that_others_may_wait_for(rests: bool, asked: list[str]) -> None:
    """Only where sums are still under way are their kernels let go, which takes signals from others."""
    ranks = ranks_with(recorded := Recorded(rests))
    ranks.close()
    assert recorded.asked == asked and ranks.near is None


def test_a_rank_that_computes_apart_adds_nothing_up() -> None:
    ranks = ranks_with(recorded := Recorded())
    with ranks.apart():
        ranks.sum_(torch.zeros(4))
    assert recorded.asked == []

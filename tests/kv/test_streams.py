"""No two streams touch a row at once: whatever the engine does, accesses of different streams are ordered by marks and waits.

The engine runs on a CPU as it would on a GPU, with streams that only record. Every access to a row of the arena, of the host
or of a staging tile gets the vector clock of its stream; a mark carries a clock, and waiting for it merges it. Two accesses to
a row, one of them a write, that no chain of waits orders are a race. What this
covers: compute waits for a layer's load; a load waits for the attention that has read its slots; write-back comes before any
load that could select its rows; a staging tile is not overwritten while it is read; a layer's flag turns when its rows are
there; pages that are given back are read by nobody.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specontext import LLM
from specontext.engine import step as engine_step
from specontext.kv import copying, dense, moves, prefix, slot_fill, tiered, write_back
from specontext.kv.streams import COMPUTE, PREFETCH, STATISTICS, WRITE_BACK, OneStream
from tests.kv.test_tiered import SEATS, TieredMachine

Clock = dict[str, int]


class RaceError(AssertionError):
    """Two accesses that nothing orders."""


class RecordingStreams:
    """Streams by vector clocks.

    Args:
        deaf: pairs (who waits, for whom) whose waits are ignored.
        deaf_place: a place in the code, as in `places`, whose waits are ignored.

    Attributes:
        places: where waits were asked for: file, function, who waits.
    """

    asynchronous = True

    def __init__(self, deaf: tuple[tuple[str, str], ...] = (), deaf_place: str | None = None) -> None:
        self.deaf, self.deaf_place, self.current = deaf, deaf_place, COMPUTE
        self.places: set[str] = set()
        self.clocks: dict[str, Clock] = {name: {} for name in (COMPUTE, PREFETCH, WRITE_BACK, STATISTICS)}
        self.written: dict[tuple[int, int], tuple[str, int, str]] = {}
        self.read: dict[tuple[int, int], list[tuple[str, int, str]]] = {}
        self.kept: list[Tensor] = []  # so that no address is given twice
        self.streams_seen: set[str] = set()

    @contextmanager
    def on(self, stream: str) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def record(self, stream: str) -> Any:
        return stream, dict(self.clocks[stream])

    def wait(self, stream: str, mark: Any) -> None:
        if mark is None or (stream, mark[0]) in self.deaf:
            return
        code = sys._getframe(1).f_code
        place = f"{Path(code.co_filename).stem}.{code.co_name} {stream}"
        self.places.add(place)
        if place == self.deaf_place:
            return
        for name, count in mark[1].items():
            self.clocks[stream][name] = max(self.clocks[stream].get(name, 0), count)

    def keep(self, stream: str, *tensors: Tensor) -> None:
        self.kept += tensors

    # Accesses ---------------------------------------------------------------------------------------------------------

    def access(self, what: str, tensor: Tensor, rows: Tensor, *, write: bool) -> None:
        """One kernel's reads or writes of rows of a buffer."""
        stream, clock = self.current, self.clocks[self.current]
        clock[stream] = clock.get(stream, 0) + 1
        self.streams_seen.add(stream)
        self.kept.append(tensor)
        mine = (stream, clock[stream], what)
        for row in rows[rows >= 0].unique().tolist():
            place = (tensor.untyped_storage().data_ptr(), row)
            self._after(self.written.get(place), mine, clock)
            if write:
                for other in self.read.pop(place, ()):
                    self._after(other, mine, clock)
                self.written[place] = mine
            else:
                self.read.setdefault(place, []).append(mine)

    @staticmethod
    def _after(other: tuple[str, int, str] | None, mine: tuple[str, int, str], clock: Clock) -> None:
        if other is not None and clock.get(other[0], 0) < other[1]:
            raise RaceError(f"{mine[2]} on {mine[0]} does not wait for {other[2]} on {other[0]}")


def changed_rows(tensors: list[Tensor], call: Callable[[], Any]) -> list[Tensor]:
    """Rows of each tensor whose numbers are others after the call."""
    before = [tensor.clone() for tensor in tensors]
    call()
    return [(old != new).flatten(1).any(1).nonzero().squeeze(1) for old, new in zip(before, tensors, strict=True)]


def rows_of_layers(pages: Tensor, entries: Tensor, a: dict[str, Any]) -> Tensor:
    """Rows that `gather_rows_layers` finds entries at, in all layers that are not resident."""
    found = []
    for layer in a["layers"][~a["resident"][a["layers"]]].tolist():
        for r, seat in enumerate(a["seats"].tolist()):
            for head, group in enumerate(a["head_map"][layer].tolist()):
                entry = entries[r, group][a["missing"][r, group]]
                page = pages[layer, seat][entry // a["page_size"]]
                found.append((page * a["page_size"] + entry % a["page_size"]) * a["head_map"].shape[1] + head)
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


LAYERS_ARGUMENTS = (
    "source_pages",
    "target_pages",
    "layers",
    "seats",
    "head_map",
    "resident",
    "tokens",
    "slots",
    "missing",
    "page_size",
)


def watch(streams: RecordingStreams, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels and attention tell which rows they touch."""
    gather, layers, append, chunk = dense.gather_rows, tiered.gather_rows_layers, tiered.append_layer, tiered.append_tokens
    sparse, dense_chunk = engine_step.sparse_attention, engine_step.chunk_attention

    def gathering(source: Tensor, source_rows: Tensor, target: Tensor, target_rows: Tensor) -> None:
        streams.access("gather", source, source_rows.flatten(), write=False)
        streams.access("gather", target, target_rows.flatten()[source_rows.flatten() >= 0], write=True)
        gather(source, source_rows, target, target_rows)

    def loading(source: Tensor, target: Tensor, *arguments: Any) -> None:
        a = dict(zip(LAYERS_ARGUMENTS, arguments, strict=True))
        streams.access("load", source, rows_of_layers(a["source_pages"], a["tokens"], a), write=False)
        streams.access("load", target, rows_of_layers(a["target_pages"], a["slots"], a), write=True)
        layers(source, target, *arguments)

    def appending(host: Tensor, host_pages: Tensor, arena: Tensor, *arguments: Any, **options: Any) -> None:
        written = changed_rows([host, arena], lambda: append(host, host_pages, arena, *arguments, **options))
        for tensor, rows in zip((host, arena), written, strict=True):
            streams.access("append", tensor, rows, write=True)

    def appending_chunk(pool: Tensor, *arguments: Any) -> None:
        [written] = changed_rows([pool], lambda: chunk(pool, *arguments))
        streams.access("append of a chunk", pool, written, write=True)

    def attending(query: Tensor, buffer: Tensor, rows: Tensor, scale: float) -> Any:
        streams.access("attention", buffer, rows.flatten(), write=False)
        return sparse(query, buffer, rows, scale)

    def attending_chunk(query: Tensor, key: Tensor, value: Tensor, scale: float, past: Iterator[Tensor]) -> Any:
        def tiles() -> Iterator[Tensor]:
            for tile in past:
                yield tile
                first = tile.storage_offset() // tile[0, 0].numel()  # read before the next tile is asked for
                streams.access("attention of a chunk", tile, first + torch.arange(tile.shape[0] * tile.shape[1]), write=False)

        return dense_chunk(query, key, value, scale, tiles())

    for module in (dense, moves, prefix):
        monkeypatch.setattr(module, "gather_rows", gathering)
    for module in (copying, tiered, slot_fill, write_back):
        monkeypatch.setattr(module, "gather_rows_layers", loading)
    monkeypatch.setattr(tiered, "append_layer", appending)
    monkeypatch.setattr(tiered, "append_tokens", appending_chunk)
    monkeypatch.setattr(engine_step, "sparse_attention", attending)
    monkeypatch.setattr(engine_step, "chunk_attention", attending_chunk)
    monkeypatch.setattr(engine_step, "GPU_TILE", 16)


Run = Callable[..., RecordingStreams]


@pytest.fixture
def run_moves() -> list[Any]:
    """Moves of layers in the last run."""
    return []


@pytest.fixture
def run(
    make_llm: Callable[..., LLM],
    prompts: list[list[int]],
    greedy: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    run_moves: list[Any],
) -> Run:
    """Requests that join, decode, wait and leave, with recording streams; returns the streams."""

    def running(method: str = "speculative", *, deaf: tuple[tuple[str, str], ...] = (), **options: Any) -> RecordingStreams:
        llm = make_llm("llama", method, **({"max_num_batched_tokens": 20, "max_model_len": 128} | options))
        streams = RecordingStreams(deaf)
        llm.engine.parts.kv.streams = streams
        with monkeypatch.context() as patch:
            watch(streams, patch)
            llm.generate(prompts, [greedy(n) for n in (14, 5, 9, 12)])
        llm.engine.check_integrity()
        run_moves[:] = llm.engine.parts.residency.moves
        return streams

    return running


@pytest.mark.parametrize("offload_layers", [1, 2, -1])
def test_sparse_steps_and_chunks(offload_layers: int, run: Run) -> None:
    streams = run(budget=12, slots=14, offload_layers=offload_layers)
    assert streams.streams_seen == {COMPUTE, PREFETCH, WRITE_BACK}


def test_dense_steps_through_staging_tiles(run: Run) -> None:
    assert run("full", offload_layers=2).streams_seen == {COMPUTE, PREFETCH, WRITE_BACK}


@pytest.mark.parametrize("gpu_memory", [50_000, 60_000, 90_000])
def test_layers_that_move_and_requests_that_wait(gpu_memory: int, run: Run, run_moves: list[Any]) -> None:
    run(budget=12, slots=14, gpu_memory=gpu_memory, host_memory=400_000)
    assert run_moves


@pytest.mark.parametrize(
    ("deaf", "method"),
    [
        ((COMPUTE, PREFETCH), "speculative"),  # attention before its rows are there
        ((PREFETCH, COMPUTE), "speculative"),  # loads into slots that attention still reads
        ((COMPUTE, WRITE_BACK), "speculative"),  # loads and steps before new rows are on the host
        ((WRITE_BACK, COMPUTE), "speculative"),  # write-back of rows that are not there yet
        ((COMPUTE, PREFETCH), "full"),
        ((PREFETCH, COMPUTE), "full"),  # a staging tile overwritten while it is read
    ],
)
def test_every_wait_is_needed(deaf: tuple[str, str], method: str, run: Run) -> None:
    options = {"budget": 12, "slots": 14} if method == "speculative" else {}
    with pytest.raises(RaceError):
        run(method, deaf=(deaf,), offload_layers=2, **options)


# Any history ----------------------------------------------------------------------------------------------------------


class WatchedMachine(TieredMachine):
    """The state machine of `TieredKV`, in which attention tells what it reads; what the tests look at is no access."""

    def watched_by(self, streams: RecordingStreams) -> None:
        self.kv.arena.rows.zero_()
        self.kv.host.rows.zero_()
        self.kv.streams = self.streams = streams

    def attend(self, rows: Tensor) -> None:
        self.streams.access("attention", self.kv.arena.rows, rows.flatten(), write=False)

    def everything_is_stored(self, seat: int) -> None:
        self.kv.streams = OneStream()
        super().everything_is_stored(seat)
        self.kv.streams = self.streams


def any_history(seed: int, streams: RecordingStreams) -> None:
    """Requests come, step, wait, come back and go while layers move both ways, and some moves are given up."""
    rng, machine = random.Random(seed), WatchedMachine()  # type: ignore[no-untyped-call]
    machine.build(seed)
    machine.watched_by(streams)
    for seat in range(SEATS):
        machine.open_seat(seat, rng.randint(1, 30))
    for _ in range(4):
        if machine.may_move and machine.who:
            machine.go_through_a_move(rng.getrandbits(32), rng.random() < 0.5, rng.randint(1, 6))
        if machine.move is not None:  # it found no room to arrive
            machine.cancel()
        if machine.who and rng.random() < 0.3:
            machine.close_seat(rng.choice(sorted(machine.who)))
        if len(machine.who) < SEATS:
            machine.open_seat(min(set(range(SEATS)) - set(machine.who)), rng.randint(1, 30))
        if machine.who:
            machine.steps(rng, 2, 0)
        machine.nothing_is_lost()
    machine.teardown()


PLACES = {
    "copying.copy_pages prefetch",
    "copying.copy_pages write-back",
    "dense._fetch prefetch",  # only in a whole engine
    "dense.take compute",
    "moves._copy prefetch",
    "moves._copy write-back",
    "moves.cancel compute",
    "moves.finish compute",
    "parking._copy compute",
    "tiered.append write-back",
    "tiered.append_chunk write-back",
    "tiered.begin_step prefetch",
    "tiered.close compute",
    "tiered.end_step compute",
    "tiered.wait compute",
}


def test_any_history_is_free_of_races(monkeypatch: pytest.MonkeyPatch) -> None:
    places: set[str] = set()
    for seed in range(30):
        streams = RecordingStreams()
        with monkeypatch.context() as patch:
            watch(streams, patch)
            any_history(seed, streams)
        places |= streams.places
    assert places >= {place for place in PLACES if not place.startswith("dense")}, "a wait that these histories never come to"


@pytest.mark.parametrize("place", sorted(place for place in PLACES if not place.startswith("dense")))
@pytest.mark.slow
def test_no_single_wait_can_be_left_out(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RaceError):
        for seed in range(300):
            streams = RecordingStreams(deaf_place=place)
            with monkeypatch.context() as patch:
                watch(streams, patch)
                any_history(seed, streams)

"""No two streams touch a row at once: whatever the engine does, accesses of different streams are ordered by marks and waits.

The engine runs on a CPU as it would on a GPU, with streams that only record. Every access to a row of the arena, of the host
or of a staging tile gets the vector clock of its stream; a mark carries a clock, and waiting for it merges it. Two accesses to
a row, one of them a write, that no chain of waits orders are a race. What this
covers: compute waits for a layer's load; a load waits for the attention that has read its slots; write-back comes before any
load that could select its rows; a staging tile is not overwritten while it is read; a layer's flag turns when its rows are
there; pages that are given back are read by nobody.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from specontext import LLM
from specontext.engine import decode as engine_decode
from specontext.engine import prefill as engine_prefill
from specontext.kernels.dense_attention import ChunkAttention
from specontext.kernels.tables import Copies, NewTokens, Pages, Parts, Tiers
from specontext.kv import block_state, copying, dense, staging, transfers
from specontext.kv.streams import COMPUTE, PREFETCH, STATISTICS, WRITE_BACK
from tests.kv.test_cache import SEATS, CacheMachine

Clock = dict[str, int]


class RaceError(AssertionError):
    """Two accesses that nothing orders."""


class RecordingStreams:
    """Streams by vector clocks.

    Args:
        deaf: pairs (who waits, for whom) whose waits are ignored.
        deaf_place: a place in the code, as in `places`, whose waits are ignored.

    Attributes:
        places: where waits were asked for: file and function outside of what `Transfers` has for waiting, and who waits.
    """

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
        if (stream, mark[0]) in self.deaf:
            return
        place = f"{place_of_wait(sys._getframe(1))} {stream}"
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


def place_of_wait(frame: FrameType | None) -> str:
    """Who asked for a wait: the first caller that is none of the ways in which `Transfers` waits for its callers."""
    ways = {getattr(transfers.Transfers, name).__name__ for name in ("beside", "after", "join")}
    while frame is not None:
        code, file = frame.f_code, Path(frame.f_code.co_filename)
        if file.stem != "contextlib" and not (file.stem == "transfers" and code.co_name in ways):
            return f"{file.stem}.{code.co_name}"
        frame = frame.f_back
    raise AssertionError("nobody waits")


def changed_rows(tensors: list[Tensor], call: Callable[[], Any]) -> list[Tensor]:
    """Rows of each tensor whose numbers are others after the call."""
    before = [tensor.clone() for tensor in tensors]
    call()
    return [(old != new).flatten(1).any(1).nonzero().squeeze(1) for old, new in zip(before, tensors, strict=True)]


def rows_of_parts(pages: Pages, parts: Parts, skipped: Tensor, entries: Tensor, copies: Copies) -> Tensor:
    """Rows of entries that are copied in the layers of some parts."""
    found = [torch.zeros(0, dtype=torch.int64)]
    for layers, head, group in zip(parts.layers.tolist(), parts.heads.tolist(), parts.groups.tolist(), strict=True):
        for layer in [layer for layer in layers if layer >= 0 and not skipped[layer]]:
            for r in range(len(copies.seats)):
                entry = entries[r, group, : copies.counts[r, group]]
                found.append(pages.rows_of(layer, copies.seats[r : r + 1], entry[None, None].long())[0, head])
    return torch.cat(found)


def watch(streams: RecordingStreams, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels and attention tell which rows they touch."""
    gather, copy, append, append_chunk, append_block = (
        dense.gather_rows,
        transfers.copy_pieces,
        transfers.append_layer,
        transfers.append_tokens,
        transfers.append_pieces,
    )
    sparse = engine_decode.sparse_attention

    def gathering(source: Tensor, source_rows: Tensor, target: Tensor, target_rows: Tensor) -> None:
        streams.access("gather", source, source_rows.flatten(), write=False)
        streams.access("gather", target, target_rows.flatten()[source_rows.flatten() >= 0], write=True)
        gather(source, source_rows, target, target_rows)

    def loading(source: Pages, target: Pages, parts: Parts, skipped: Tensor, copies: Copies, **options: Any) -> None:
        streams.access("load", source.rows, rows_of_parts(source, parts, skipped, copies.source, copies), write=False)
        streams.access("load", target.rows, rows_of_parts(target, parts, skipped, copies.target, copies), write=True)
        copy(source, target, parts, skipped, copies, **options)

    def appending(tiers: Tiers, layer: int, new: NewTokens, **options: Any) -> None:
        pools = [tiers.host.rows, tiers.tokens.rows]
        written = changed_rows(pools, lambda: append(tiers, layer, new, **options))
        for tensor, rows in zip(pools, written, strict=True):
            streams.access("append", tensor, rows, write=True)

    def appending_chunk(pages: Pages, layer: int, new: NewTokens) -> None:
        [written] = changed_rows([pages.rows], lambda: append_chunk(pages, layer, new))
        streams.access("append of a chunk", pages.rows, written, write=True)

    def appending_block(pages: Pages, line: int, seats: Tensor, positions: Tensor, new: Tensor, wanted: Tensor) -> None:
        streams.access("append of a block", new, torch.arange(len(new)), write=False)
        [written] = changed_rows([pages.rows], lambda: append_block(pages, line, seats, positions, new, wanted))
        streams.access("append of a block", pages.rows, written, write=True)

    def attending(query: Tensor, buffer: Tensor, rows: Tensor, scale: float, cap: float | None) -> Any:
        streams.access("attention", buffer, rows.flatten(), write=False)
        return sparse(query, buffer, rows, scale, cap)

    class Attending(ChunkAttention):
        def add(self, tile: Tensor) -> None:
            super().add(tile)
            unit = tile[0, 0].numel()
            along = [
                torch.arange(count) * (stride // unit) for count, stride in zip(tile.shape[:2], tile.stride()[:2], strict=True)
            ]
            rows = tile.storage_offset() // unit + along[0][:, None] + along[1]
            streams.access("attention of a chunk", tile, rows.flatten(), write=False)

    for module in (dense, copying, block_state):
        monkeypatch.setattr(module, "gather_rows", gathering)
    for module in (copying, staging, transfers):
        monkeypatch.setattr(module, "copy_pieces", loading)
    monkeypatch.setattr(transfers, "append_layer", appending)
    monkeypatch.setattr(transfers, "append_tokens", appending_chunk)
    monkeypatch.setattr(transfers, "append_pieces", appending_block)
    monkeypatch.setattr(engine_decode, "sparse_attention", attending)
    monkeypatch.setattr(engine_prefill, "chunk_attention", Attending)
    monkeypatch.setattr(engine_decode, "DECODE_TILE", 16)
    monkeypatch.setattr(engine_decode, "prompt_tile", lambda _: 16)


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

    def running(
        method: str = "speculative", *, family: str = "llama", deaf: tuple[tuple[str, str], ...] = (), **options: Any
    ) -> RecordingStreams:
        llm = make_llm(family, method, **({"max_num_batched_tokens": 20, "max_model_len": 128} | options))
        streams = RecordingStreams(deaf)
        llm.engine.parts.kv.transfers.run_on(streams)
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


@pytest.mark.parametrize(("method", "offload_layers"), [("speculative", 2), ("speculative", -1), ("full", 2)])
def test_a_host_in_8_bits(method: str, offload_layers: int, run: Run) -> None:
    options = {"host_kv_dtype": "int8", "enable_prefix_caching": False, "budget": 12}
    assert run(method, offload_layers=offload_layers, **options).streams_seen == {COMPUTE, PREFETCH, WRITE_BACK}


def test_dense_steps_through_staging_buffers(run: Run) -> None:
    assert run("full", offload_layers=2).streams_seen == {COMPUTE, PREFETCH, WRITE_BACK}


@pytest.mark.parametrize(("method", "options"), [("full", {}), ("oracle", {"budget": 12}), ("speculative", {"budget": 12})])
def test_layers_that_read_what_others_have_stored(method: str, options: dict[str, Any], run: Run) -> None:
    """The slots, tiles and rows of a layer are read again after its own attention, while new rows go to the host."""
    assert {COMPUTE, PREFETCH, WRITE_BACK} <= run(method, family="shared", offload_layers=2, **options).streams_seen


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("full", {}),
        ("speculative", {"budget": 12, "slots": 14}),
        ("oracle", {"budget": 12}),
        *(
            (method, {"budget": 12, "host_kv_dtype": "fp8", "enable_prefix_caching": False})
            for method in ("full", "speculative", "oracle")
        ),
    ],
)
def test_what_runs_beside_the_steps_changes_no_token(
    method: str,
    options: dict[str, Any],
    make_llm: Callable[..., LLM],
    prompts: list[list[int]],
    greedy: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Staged tiles, rows of prompts that wait for their block, and loads block by block, as on a GPU."""
    monkeypatch.setattr(engine_decode, "prompt_tile", lambda _: 16)
    found = []
    for beside in (False, True):
        llm = make_llm("llama", method, max_num_batched_tokens=20, offload_layers=2, **options)
        if beside:
            llm.engine.parts.kv.transfers.run_on(RecordingStreams())
        found.append([output.token_ids for output in llm.generate(prompts, [greedy(n) for n in (14, 5, 9, 12)])])
    assert found[0] == found[1]


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
        ((PREFETCH, COMPUTE), "full"),  # a staging buffer overwritten while it is read
    ],
)
def test_every_wait_is_needed(deaf: tuple[str, str], method: str, run: Run) -> None:
    options: dict[str, Any] = {"budget": 12, "slots": 14} if method == "speculative" else {}
    with pytest.raises(RaceError):
        run(method, deaf=(deaf,), offload_layers=-1, **options)


# Any history ----------------------------------------------------------------------------------------------------------


class WatchedMachine(CacheMachine):
    """The state machine of `KVCache`, in which attention tells what it reads; what the tests look at is no access."""

    def watched_by(self, streams: RecordingStreams) -> None:
        self.kv.arena.rows.zero_()
        self.kv.host.rows.zero_()
        self.kv.transfers.run_on(streams)
        self.streams = streams

    def attend(self, rows: Tensor) -> None:
        self.streams.access("attention", self.kv.arena.rows, rows.flatten(), write=False)

    def everything_is_stored(self, seat: int) -> None:
        self.kv.transfers.run_on(None)
        super().everything_is_stored(seat)
        self.kv.transfers.run_on(self.streams)


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


def watched_history(seed: int, streams: RecordingStreams) -> RecordingStreams:
    with pytest.MonkeyPatch.context() as patch:
        watch(streams, patch)
        any_history(seed, streams)
    return streams


@functools.cache
def places_of_waits(seed: int) -> frozenset[str]:
    """Places that wait in a history without a race."""
    return frozenset(watched_history(seed, RecordingStreams()).places)


def test_any_history_is_free_of_races() -> None:
    for seed in range(30):
        places_of_waits(seed)


@pytest.mark.slow
def test_no_single_wait_can_be_left_out() -> None:
    """Every place that waits, wherever it is in the code, is needed: without it some history has a race."""
    places = set[str]().union(*(places_of_waits(seed) for seed in range(60)))
    assert len(places) > 12, "loads, write-back, chunks, copies and moves both ways, what ends, closes and comes back"
    assert {place.split()[1] for place in places} == {COMPUTE, PREFETCH, WRITE_BACK}
    for place in sorted(places):
        with pytest.raises(RaceError):
            for seed in range(300):
                if seed >= 60 or place in places_of_waits(seed):  # others do without it anyway
                    watched_history(seed, RecordingStreams(deaf_place=place))
            pytest.fail(f"the wait of {place} is never needed")

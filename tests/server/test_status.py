"""What an engine says of its load: totals that nothing is missing from, and little reading of the device."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest
import torch

from specontext.engine.orders import Life
from specontext.engine.statistics import Count, Meter
from specontext.engine.status import StatusMeter
from specontext.errors import EngineDeadError
from tests.server.serving import make_engine
from tests.server.test_async_engine import PROMPT, collect, params, run, started


@pytest.mark.slow
def test_bytes_of_all_requests_are_counted_however_they_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, seen, rng = Counter[Count](), list[float](), random.Random(0)

    def watch(name: str) -> None:
        original = getattr(Meter, name)

        def watched(self: Any, *args: Any) -> None:
            before = self.counts.sum(0)
            original(self, *args)
            counted.update({count: int((self.counts.sum(0) - before)[count]) for count in Count})

        monkeypatch.setattr(Meter, name, watched)

    for name in ("_add", "sparse"):
        watch(name)

    async def test() -> None:
        engine = make_engine(max_num_seqs=6, max_model_len=512, gpu_memory=800_000)
        async with started(engine) as served:

            async def client(number: int) -> None:
                stream = await served.submit(f"r{number}", [PROMPT[number:]], params(rng.randrange(120, 170)))
                if number % 3:
                    await collect(stream)
                else:
                    for _ in range(rng.randrange(40)):
                        await anext(stream, None)
                        seen.append((await served.call(served._loop.meter.take)).loaded_bytes)
                    stream.abort()

            await asyncio.gather(*map(client, range(8)))
            load = await served.call(served._loop.meter.take)
            assert engine.scheduler.preemptions > 0 and load.preemptions == engine.scheduler.preemptions
            assert load.loaded_bytes == counted[Count.LOADED_BYTES] > 0
            assert seen == sorted(seen) and len(set(seen)) > 5

    run(test)


def test_stalls_of_all_moves_are_counted() -> None:
    async def test() -> None:
        engine = make_engine(max_num_seqs=4, gpu_memory=1_000_000, offload_layers=None, max_model_len=1024)
        async with started(engine) as served:
            await asyncio.gather(*(collect(served.generate(f"r{i}", PROMPT, params(150))) for i in range(4)))
            status = await served.call(served._loop.meter.take)  # outputs end before the loop looks at itself again
            moves = engine.parts.residency.moves
            assert moves and status.stall_s >= sum(move.stall_s for move in moves) > 0
            assert served.status.stall_s == status.stall_s

    run(test)


def test_a_load_reads_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    for i in range(5):
        engine.add_request(f"r{i}", PROMPT, params(20))
    for _ in range(6):
        engine.step()
    reads: Counter[str] = Counter()
    for name in ("tolist", "item", "cpu", "numpy", "__float__", "__int__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name), name, reads))
    load = StatusMeter().take(engine)
    assert reads == {"tolist": 1}
    assert load.running == 5 and load.overlap is not None
    assert all(request.overlap is not None and request.bytes_loaded_per_step for request in load.requests)


def counting(method: Any, name: str, calls: Counter[str]) -> Any:
    def counted(self: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        calls[name] += 1
        return method(self, *arguments, **options)

    return counted


def test_the_time_in_the_queue_is_known_exactly() -> None:
    waited: list[tuple[float, float, str]] = []
    computed: list[int] = []

    class Watching:
        def token(self, seconds: float, *, first: bool) -> None:
            pass

        def step(self, tokens: int) -> None:
            computed.append(tokens)

        def ended(self, life: Life) -> None:
            waited.append((life.queued, life.seconds, life.reason))
            if life.reason != "abort":
                assert life.prefill is not None and life.decode is not None
                assert life.queued + life.prefill + life.decode <= life.seconds and life.prompt_tokens == len(PROMPT)

    async def test() -> None:
        async with started(make_engine(max_num_seqs=1), observer=Watching()) as served:
            first = await served.submit("first", [PROMPT], params(60))
            second = await served.submit("second", [PROMPT], params(5))
            third = await served.submit("third", [PROMPT], params(5))
            third.abort()
            [*_, one] = await collect(first)
            [*_, two] = await collect(second)
        assert one.stats is not None and two.stats is not None
        queued: list[Any] = [one.stats.queue_s, two.stats.queue_s]
        times: list[Any] = [one.stats.ttft_s, two.stats.ttft_s]
        assert 0 <= queued[0] < times[0] < queued[1] < times[1]
        (third_queued, third_whole, reason), *rest = waited
        assert reason == "abort" and third_queued == third_whole
        for (found, whole, _), stat in zip(rest, queued, strict=True):
            assert stat <= found < whole  # counted from the submission on, so a little longer
        assert sum(computed) >= len(PROMPT) + 59  # a prompt, and tokens that were computed in order to go on

    run(test)


def test_a_lost_page_is_noticed_where_loads_are_verified() -> None:
    async def test() -> None:
        async with started(make_engine(verify_loads=True)) as served:
            await collect(served.generate("good", PROMPT, params(5)))
            await served.drained()
            await served.call(lambda engine: engine.parts.kv.arena.pages.allocate(1))
            with pytest.raises(EngineDeadError, match="AssertionError"):
                while True:
                    await served.call(lambda engine: None)
            assert served.is_dead

    run(test)

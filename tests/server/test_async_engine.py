"""The engine behind asyncio: streams, bounds, failures, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.engine.async_engine import AsyncEngine
from specontext.engine.llm_engine import LLMEngine
from specontext.engine.request_stream import Delta, RequestStream
from specontext.errors import EngineDeadError, LogitsError, QueueFullError, RequestError, RequestFailedError, SpeContextError
from tests.server.serving import PATIENCE, check_free, make_engine

PROMPT = [5, 6, 7, 8, 9] * 8


def params(max_tokens: int = 8, **options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "ignore_eos": True} | options, max_tokens=max_tokens)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), PATIENCE))


@asynccontextmanager
async def started(engine: LLMEngine | None = None, **options: Any) -> AsyncIterator[AsyncEngine]:
    """A running engine that must be idle, with all pages free, in the end."""
    served = AsyncEngine(engine or make_engine(), **options)
    served.start()
    try:
        yield served
        if not served.is_dead:
            await asyncio.wait_for(served.drained(), PATIENCE)
            await served.call(check_free)
    finally:
        await served.close()


@asynccontextmanager
async def held(served: AsyncEngine) -> AsyncIterator[None]:
    """The engine's thread stands still."""
    standing, go_on = threading.Event(), threading.Event()
    call = asyncio.ensure_future(served.call(lambda _: (standing.set(), go_on.wait(PATIENCE))))
    await asyncio.to_thread(standing.wait, PATIENCE)
    try:
        yield
    finally:
        go_on.set()
        await call


async def collect(stream: AsyncIterator[list[Delta]], into: list[Delta] | None = None) -> list[Delta]:
    found = into if into is not None else []
    async for deltas in stream:
        found += deltas
    return found


def texts(deltas: list[Delta]) -> dict[int, tuple[str, list[int]]]:
    found: dict[int, tuple[str, list[int]]] = {}
    for delta in deltas:
        text, tokens = found.get(delta.index, ("", []))
        found[delta.index] = text + delta.text, tokens + delta.token_ids
    return found


@pytest.mark.parametrize("overlaps", [False, True])
def test_many_at_once_equal_the_offline_engine(overlaps: bool) -> None:
    llm = LLM("nano", config=SpeContextConfig(budget=64, offload_layers=2), device="cpu", max_model_len=2048)
    prompts = [PROMPT[i:] for i in range(20)]
    sampled = params(12, n=2, temperature=1.0, seed=4, logprobs=1)
    expected = llm.generate(prompts, sampled)

    async def test() -> None:
        async with started() as served:
            served._loop._overlaps = overlaps  # as on a GPU: outputs are shown while the next step computes
            streams = [served.generate(f"r{i}", prompt, sampled) for i, prompt in enumerate(prompts)]
            found = await asyncio.gather(*map(collect, streams))
        for deltas, output in zip(found, expected, strict=True):
            assert texts(deltas) == {i: (o.text, o.token_ids) for i, o in enumerate(output.outputs)}
            last = [delta for delta in deltas if delta.finish_reason]
            assert len(last) == 2 and all(delta.stats and delta.finish_reason == "length" for delta in last)
            assert sum(len(delta.logprobs or ()) for delta in deltas) == 24

    run(test)


def test_a_reader_that_stops_reading_gets_the_rest_in_one_piece() -> None:
    async def test() -> None:
        async with started() as served:
            stream = await served.submit("slow", [PROMPT], params(64))
            first = await anext(stream)
            await served.drained()  # the engine has not waited
            rest = await collect(stream)
            assert len(rest) == 1 and rest[0].finish_reason == "length"
            assert len(first[0].token_ids) + len(rest[0].token_ids) == 64

    run(test)


def test_the_queue_is_bounded() -> None:
    async def test() -> None:
        async with started(make_engine(max_num_seqs=1), max_waiting=4) as served:
            async with held(served):
                tasks = [asyncio.ensure_future(served.submit(f"r{i}", [PROMPT], params(n=2))) for i in range(2)]
                await asyncio.sleep(0)  # lets them submit
                assert served.open_outputs == served.waiting == 4
                with pytest.raises(QueueFullError, match="queue of 4"):
                    await served.submit("one more", [PROMPT], params())
            streams = await asyncio.gather(*tasks)
            with pytest.raises(RequestError, match="5 outputs"):
                await served.submit("never", [PROMPT], params(n=5))
            await asyncio.gather(*map(collect, streams))
            await collect(served.generate("now", PROMPT, params()))

    run(test)


def test_aborting_one_leaves_the_others_alone() -> None:
    async def test() -> None:
        async with started() as served:
            alone = texts(await collect(served.generate("alone", PROMPT, params(30))))
            stays = asyncio.ensure_future(collect(served.generate("stays", PROMPT, params(30))))
            async for _ in (goes := served.generate("goes", PROMPT[3:], params(1000))):
                break
            await goes.aclose()
            assert texts(await stays) == alone

    run(test)


def test_requests_that_cannot_be_served_are_refused_at_once() -> None:
    async def test() -> None:
        async with started() as served:
            for prompts in ([[]], [PROMPT, [10**9]], [[5] * 5000]):
                with pytest.raises(RequestError):
                    await served.submit("bad", prompts, params())
                assert served.open_outputs == 0

    run(test)


@pytest.mark.slow
def test_hundreds_of_random_submits_and_aborts_leak_nothing() -> None:
    rng = random.Random(0)

    async def client(served: AsyncEngine, number: int, places: asyncio.Semaphore, counts: Counter[str]) -> None:
        async with places:
            while (outcome := await attempt(served, number)) == "queue full":
                counts[outcome] += 1
                await asyncio.sleep(0.01)  # as clients do
            counts[outcome] += 1

    async def attempt(served: AsyncEngine, number: int) -> str:
        length, made, patience = rng.randrange(1, 120), rng.randrange(1, 12), rng.randrange(0, 6)
        prompts = [[rng.randrange(4, 1800) for _ in range(length)] for _ in range(rng.choice((1, 1, 2)))]
        wanted = params(made, n=rng.choice((1, 1, 3)))
        task = asyncio.ensure_future(served.submit(f"r{number}", prompts, wanted, only_final=rng.random() < 0.3))
        if rng.random() < 0.15:
            await asyncio.sleep(0)
            task.cancel()
        try:
            stream = await task
        except QueueFullError:
            return "queue full"
        except asyncio.CancelledError:
            return "gone before it was accepted"
        if rng.random() < 0.5:
            await collect(stream)
            return "whole"
        for _ in range(patience):
            if await anext(stream, None) is None:
                break
        stream.abort()
        return "aborted"

    async def test() -> None:
        async with started(make_engine(max_num_seqs=24), max_waiting=20) as served:
            places, counts = asyncio.Semaphore(20), Counter[str]()
            await asyncio.gather(*(client(served, number, places, counts) for number in range(400)))
            full = counts.pop("queue full")
            assert full and counts.total() == 400 and len(counts) == 3 and min(counts.values()) > 20, counts

    run(test)


def breaking(engine: LLMEngine, error: Callable[[], Exception], when: Callable[[], bool]) -> None:
    """Let one step of an engine raise after it was made, which loses what it returns."""
    step = engine.step

    def broken(*arguments: Any) -> Any:
        touched = step(*arguments)
        if when():
            engine.step = step  # type: ignore[method-assign]
            raise error()
        return touched

    engine.step = broken  # type: ignore[method-assign]


def test_an_error_that_names_its_requests_hurts_no_others() -> None:
    async def test() -> None:
        async with started() as served:
            breaking(served.engine, lambda: LogitsError(["bad-0", "gone-0"]), lambda: len(served.engine.scheduler.running) == 2)
            alone = texts(await collect(served.generate("alone", PROMPT, params(40))))
            good = asyncio.ensure_future(collect(served.generate("good", PROMPT, params(40))))
            seen: list[Delta] = []
            with pytest.raises(RequestFailedError, match="not numbers"):
                await collect(served.generate("bad", PROMPT, params(40, n=1)), seen)
            assert texts(await good) == alone and not served.is_dead

    run(test)


def test_an_output_may_end_in_the_step_that_breaks_another() -> None:
    async def test() -> None:
        async with started() as served:
            async with held(served):
                good = asyncio.ensure_future(collect(served.generate("good", PROMPT, params(5))))
                bad = asyncio.ensure_future(collect(served.generate("bad", PROMPT, params(50))))
                await asyncio.sleep(0)
                breaking(
                    served.engine,
                    lambda: LogitsError(["bad-0"]),
                    lambda: [r.request_id for r in served.engine.scheduler.running] == ["bad-0"],
                )
            found = await good
            assert found[-1].finish_reason == "length" and len(texts(found)[0][1]) == 5
            with pytest.raises(RequestFailedError):
                await bad

    run(test)


def test_a_request_that_cannot_be_added_fails_alone() -> None:
    async def test() -> None:
        async with started() as served:
            add = served.engine.add_request

            def broken(request_id: str, *arguments: Any, **options: Any) -> Any:
                if request_id == "bad-1":
                    raise KeyError("a bug")
                return add(request_id, *arguments, **options)

            served.engine.add_request = broken  # type: ignore[method-assign]
            good = asyncio.ensure_future(collect(served.generate("good", PROMPT, params(20))))
            with pytest.raises(RequestFailedError, match="a bug"):
                await served.submit("bad", [PROMPT], params(n=2))
            assert len(texts(await good)[0][1]) == 20 and served.open_outputs == 0

    run(test)


def test_a_dead_loop_is_seen_by_all() -> None:
    async def test() -> None:
        died = asyncio.Event()
        async with started(on_death=died.set) as served:
            breaking(served.engine, lambda: ZeroDivisionError("a bug"), lambda: len(served.engine.scheduler.running) == 3)
            streams = [served.generate(f"r{i}", PROMPT, params(100)) for i in range(3)]
            for outcome in await asyncio.gather(*map(collect, streams), return_exceptions=True):
                assert isinstance(outcome, EngineDeadError) and "a bug" in str(outcome)
            await died.wait()
            assert served.is_dead and "ZeroDivisionError" in str(served.error) and served.open_outputs == 0
            for attempt in (served.submit("late", [PROMPT], params()), served.call(lambda engine: None)):
                with pytest.raises(EngineDeadError):
                    await attempt
            await served.drained()

    run(test)


def test_ending_all_requests_and_closing() -> None:
    class Over(SpeContextError):
        pass

    async def test() -> None:
        async with started() as served:
            streams: list[RequestStream] = [await served.submit(f"r{i}", [PROMPT], params(500)) for i in range(20)]
            served.abort_all(Over("enough"))
            for outcome in await asyncio.gather(*map(collect, streams), return_exceptions=True):
                assert isinstance(outcome, Over)
            await served.drained()
            last = await served.submit("last", [PROMPT], params(1000))
            await served.close()
            with pytest.raises(EngineDeadError, match="closed"):
                await collect(last)

    run(test)


def test_the_load_says_what_happens() -> None:
    async def test() -> None:
        async with started(make_engine(max_num_seqs=2)) as served:
            streams = [await served.submit(f"r{i}", [PROMPT * 4], params(40)) for i in range(3)]
            await anext(streams[0])
            async with held(served):
                await asyncio.sleep(0)
            load = await served.call(lambda _: served._loop.meter.take(served.engine))
            while load.running < 2:  # orders that come at once are carried out before the next step, which admits the second
                load = await served.call(lambda _: served._loop.meter.take(served.engine))
            assert (load.running, load.waiting, load.offloaded_layers, load.layers) == (2, 1, 2, 4)
            assert load.device_kv_used > 0 and load.host_kv_used > 0
            assert {request.state for request in load.requests} == {"running", "waiting"}
            await asyncio.gather(*map(collect, streams))
            assert served.generation_tokens == 120 and served.prompt_tokens == 3 * len(PROMPT) * 4
            idle = await served.call(lambda _: served.status)
            assert idle.running == 0 and idle.loaded_bytes >= load.loaded_bytes and idle.overlap

    run(test)

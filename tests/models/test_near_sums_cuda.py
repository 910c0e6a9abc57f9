"""On two GPUs: sums in the ranks' memory are right, again and again in captured steps, and end when a rank is lost."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import pytest
import torch

from specontext.errors import RankError
from specontext.memory.sharing import Share
from specontext.models.near_sums import LARGEST
from specontext.models.ranks import Ranks

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

LIMIT_S = 100  # for processes to start and do what a test asks of them: one that hangs fails


def together(work: Callable[..., Any], *arguments: object, size: int = 2) -> list[Any]:
    """What a function gives on ranks that are processes; an exception there, or one that hangs, fails."""
    context = multiprocessing.get_context("spawn")
    ports, pipes = context.Queue(), [context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        context.Process(target=_rank, args=(rank, size, ports, pipes[rank][1], work, arguments), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    until = time.monotonic() + LIMIT_S
    results: dict[int, Any] = {}
    try:
        while len(results) < size:
            waiting = {pipes[rank][0]: rank for rank in range(size) if rank not in results}
            told = wait(list(waiting), max(0.0, until - time.monotonic()))
            assert told, f"ranks {sorted(waiting.values())} hang"
            for pipe in told:
                results[waiting[pipe]] = result = pipe.recv()
                if isinstance(result, BaseException):
                    raise result
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [results[rank] for rank in range(size)]


def _rank(rank: int, size: int, ports: Any, pipe: Any, work: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    try:
        device = torch.device(f"cuda:{rank}")
        torch.cuda.set_device(device)
        ranks = Ranks(Share(rank, size), None if rank == 0 else ports.get())
        for _ in range(size - 1 if rank == 0 else 0):
            ports.put(ranks.port)
        ranks.connect(device)
        assert ranks.near is not None, "these GPUs do not reach each other's memory"
        with torch.inference_mode():
            pipe.send(work(ranks, device, *arguments))
        threading.Event().wait()  # until the test has heard of all
    except BaseException as error:
        pipe.send(RuntimeError(f"rank {rank}: {type(error).__name__}: {error}"))
        raise


def integers(shape: tuple[int, ...], rank: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """So small that every number format adds them up exactly."""
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randint(-9, 10, shape, generator=generator).to(device, dtype)


def compare(ranks: Ranks, device: torch.device) -> list[str]:
    """Sums of several sizes and number formats that are wrong."""
    wrong = []
    near = ranks.near
    assert near is not None
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for shape in [(1,), (2,), (3, 1), (6, 1), (7, 5), (1, 4096), (5, 4096), (64, 4096), (2, 3, 640), (65, 4096)]:
            parts = [integers(shape, rank, device, dtype) for rank in range(ranks.share.size)]
            expected, own = torch.stack(parts).sum(0), parts[ranks.share.rank]
            elsewhere = torch.cat((own.flatten()[:1], own.flatten()))[1:].view(shape)  # not at the beginning of its memory
            across = own.movedim(0, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 0)
            taken = dtype != torch.float16 and own.nbytes <= LARGEST and own.nbytes % 4 == 0
            for tensor in (own, elsewhere, across):
                if not taken and not tensor.is_contiguous():
                    continue  # NCCL takes none
                if near.takes(tensor) != taken:
                    wrong.append(f"takes {dtype} {shape}")
                ranks.sum_(tensor)
                if not torch.equal(tensor, expected):
                    wrong.append(f"{dtype} {shape}")
    tensor = torch.full((4, 8), float(ranks.share.rank), device=device)
    with ranks.apart():
        ranks.sum_(tensor)
    if not bool((tensor == ranks.share.rank).all()):
        wrong.append("apart")
    ranks.close()
    return wrong


def test_sums_of_all_sizes_and_number_formats_are_exact() -> None:
    assert together(compare) == [[], []]


def captured(ranks: Ranks, own: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A step of 64 sums of different numbers, at which ranks arrive at different times, and what all of it adds up to."""
    rank, total = ranks.share.rank, torch.zeros(own.shape, device=own.device)

    def step() -> None:
        total.zero_()
        for number in range(64):
            part = own + (1 + rank) * (number % 16)
            if number % 8 == 3 * rank:
                torch.cuda._sleep(20_000)
            ranks.sum_(part)
            total.add_(part)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph, total


def replay(ranks: Ranks, device: torch.device) -> list[str]:
    """Replays of captured steps that come out wrong."""
    wrong, numbers = [], sum(number % 16 for number in range(64))
    for dtype, rows in [(torch.bfloat16, 1), (torch.bfloat16, 16), (torch.bfloat16, 64), (torch.float32, 1), (torch.float32, 32)]:
        parts = [integers((rows, 4096), rank, device, dtype) for rank in range(ranks.share.size)]
        graph, total = captured(ranks, parts[ranks.share.rank])
        for turn in range(100):
            graph.replay()
            expected = 64 * torch.stack(parts).float().sum(0) + 3 * numbers
            if not torch.equal(total, expected):
                wrong.append(f"{dtype} {rows} rows, replay {turn}")
            for part in parts:
                part.add_(1 if turn % 2 == 0 else -1)
        del graph
    ranks.close()
    return wrong


def test_captured_sums_are_exact_in_every_replay() -> None:
    assert together(replay) == [[], []]


def lose(ranks: Ranks, device: torch.device, dies: bool) -> float:
    """Seconds from the abort to a device that rests, on rank 0, whose steps under way wait for a rank that does not join."""
    graph, _ = captured(ranks, integers((4, 4096), ranks.share.rank, device, torch.bfloat16))
    ranks.gather(torch.zeros((4, 64), device=device), 128)
    graph.replay()
    torch.cuda.synchronize()
    ranks.least(0)  # both are here
    if ranks.share.rank == 1:
        if dies:
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return 0.0
    near = ranks.near
    assert near is not None
    for _ in range(2):  # the step that computes, and the one ahead
        graph.replay()
        ranks.gather(torch.zeros((4, 64), device=device), 128)
    assert not near.idle(2.0), "nothing waits for the other rank"
    began = time.monotonic()
    aborting = threading.Thread(target=ranks.abort, daemon=True)
    aborting.start()
    assert near.idle(20.0), "the device still waits"
    seconds = time.monotonic() - began
    aborting.join(20.0)
    assert not aborting.is_alive(), "the abort does not end"
    del graph
    ranks.close()
    torch.cuda.synchronize()
    return seconds


@pytest.mark.parametrize("dies", [False, True], ids=["stays away", "is killed"])
def test_steps_that_wait_for_a_lost_rank_end_within_seconds(dies: bool) -> None:
    assert together(lose, dies)[0] < 10


def two_engines(ranks: Ranks, device: torch.device) -> list[list[int]]:
    """Sums of two sets of ranks of the same processes, one after the other."""
    numbers = torch.ones(4096, device=device)
    ranks.sum_(numbers)
    following = Ranks(Share(0, 2)) if ranks.share.rank == 0 else None
    port = ranks.most(0 if following is None else following.port)
    ranks.close()
    again = following or Ranks(Share(1, 2), port)
    again.connect(device)
    assert again.near is not None
    again.sum_(numbers)
    again.close()
    return [numbers[:2].int().tolist()]


def test_engines_one_after_the_other() -> None:
    assert together(two_engines) == [[[4, 4]], [[4, 4]]]


def _engine(pipe: Any) -> None:
    from specontext import LLM, SamplingParams  # what takes long to load, and ranks need not

    options: dict[str, Any] = {"device": "cuda", "dtype": "float32", "max_model_len": 1024, "max_num_seqs": 4}
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    prompts = [[17 + (7 * i) % 400 for i in range(200)], [11, 12, 13]]
    one = LLM("nano", **options)
    expected = [output.token_ids for output in one.generate(prompts, params)]
    one.engine.close()
    llm = LLM("nano", tensor_parallel_size=2, **options)
    near = llm.engine.loaded.ranks is not None and llm.engine.loaded.ranks.near is not None
    found = [output.token_ids for output in llm.generate(prompts, params)]
    stream = llm.stream([5] * 60, SamplingParams(temperature=0, max_tokens=900, ignore_eos=True))
    next(stream)
    began, why = time.monotonic(), ""
    os.kill(llm.engine._processes.pids[0], signal.SIGKILL)  # type: ignore[attr-defined]
    try:
        for _ in stream:
            pass
    except RankError as error:
        why = str(error)
    llm.engine.close()
    pipe.send((near, found == expected, why, time.monotonic() - began))


def test_an_engine_gives_one_gpus_tokens_and_ends_when_a_rank_is_killed() -> None:
    context = multiprocessing.get_context("spawn")
    reading, writing = context.Pipe(duplex=False)
    process = context.Process(target=_engine, args=(writing,), daemon=True)
    process.start()
    try:
        assert reading.poll(3 * LIMIT_S), "the engine hangs"
        near, same, why, seconds = reading.recv()
    finally:
        process.kill()
        process.join()
    assert near and same
    assert "rank 1 of 2 is lost" in why and seconds < 30

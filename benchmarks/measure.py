"""What the benchmarks share: timing on CPU and CUDA, bandwidths of this machine, pinned host memory, names for reports."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import specontext  # isort: skip  # before torch: it says how torch's threads wait

import torch
from torch import Tensor

# Hugging Face has a package named `kernels` that transformers looks for: scripts of this folder come after installed packages.
if sys.path[0] == str(Path(__file__).parent):
    sys.path.append(sys.path.pop(0))

GIB = 1 << 30
Call = Callable[[], Any]
HOLD_CYCLES = 1 << 20  # about half a millisecond in which the host gets ahead of the device
REPLAY_SECONDS = 2e-3  # of one sample on a GPU
MOST_CALLS = 64  # in one sample


# Names ----------------------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads, {platform.machine()}"


def versions() -> dict[str, str]:
    """Versions of what results depend on; packages that are not installed are left out."""
    found = {"specontext": specontext.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


# Time -----------------------------------------------------------------------------------------------------------------


def clock(device: torch.device) -> float:
    """Seconds on the host's clock, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def elapsed(call: Call, device: torch.device) -> float:
    """Seconds that a call takes: on a GPU between two events, after a pause that hides the host's launches."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if hasattr(torch.cuda, "_sleep"):
        torch.cuda._sleep(HOLD_CYCLES)
    began.record()
    call()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1000


class Timer:
    """Samples the time of calls that take turns.

    On a GPU many calls are captured as one CUDA graph, so that a sample has no gaps between launches; calls that cannot be
    captured are launched one by one. On a CPU a sample is one call.

    Attributes:
        how: "graph", "events" or "host".
        why: why calls were not captured, None where they were.
    """

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        self.calls, self.device = calls, device
        self.turn, self.count = 0, 1
        self.how, self.why = "host", None
        self._graph: Any = None
        if device.type == "cuda":
            self._prepare()
        else:
            self._next()

    def sample(self) -> float:
        """Seconds of one call, the mean of those of this sample."""
        run = self._several if self._graph is None else self._graph.replay
        return elapsed(run, self.device) / self.count

    def _next(self) -> None:
        self.calls[self.turn % len(self.calls)]()
        self.turn += 1

    def _several(self) -> None:
        for _ in range(self.count):
            self._next()

    def _prepare(self) -> None:
        self.count = len(self.calls)  # whole rounds only: calls may depend on the ones before
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._several()
            seconds = elapsed(self._several, self.device)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        rounds = min(REPLAY_SECONDS / max(seconds, 1e-9), MOST_CALLS / len(self.calls))
        self.count *= max(1, int(rounds))
        self.how = "graph"
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="relaxed"):
                self._several()
            for _ in range(2):
                graph.replay()
            torch.cuda.synchronize(self.device)
            self._graph = graph
        except RuntimeError as error:
            self.how, self.why, self.turn = "events", str(error).splitlines()[0], 0
            torch.cuda.synchronize(self.device)


def interleaved(timers: Sequence[Timer], rounds: int) -> list[float]:
    """Median seconds of a call of each timer; they take turns."""
    samples = [[timer.sample() for timer in timers] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*samples, strict=True)]


# Speed of the machine -------------------------------------------------------------------------------------------------


def best_seconds(call: Call, device: torch.device, repeats: int = 5) -> float:
    """The best of some repeats, after one to warm up."""
    call()
    return min(elapsed(call, device) for _ in range(repeats))


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that reading the device's memory reaches: a sum over 512 MiB, on a GPU over 4 GiB."""
    numbers = torch.ones(1 << (30 if device.type == "cuda" else 27), dtype=torch.float32, device=device)
    return numbers.numel() * 4 / best_seconds(numbers.sum, device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written ones together, of a copy in the device's memory: 256 MiB, on a GPU 1 GiB."""
    source = torch.ones(1 << (28 if device.type == "cuda" else 26), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / best_seconds(lambda: target.copy_(source), device)


def copy_engine_bandwidth(host: Tensor, device: torch.device) -> float:
    """Bytes a second of one large copy from pinned host memory, of what is pinned as one: a copy engine refuses to cross."""
    from specontext.kv.host_memory import CHUNK

    source = host.view(-1).view(torch.uint8)[:CHUNK]
    target = torch.empty(source.shape, dtype=torch.uint8, device=device)
    return len(source) / best_seconds(lambda: target.copy_(source, non_blocking=True), device)


def multiply_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of a large matrix product; on a CPU in float32, which attention converts to there."""
    size, dtype = (8192, dtype) if device.type == "cuda" else (1024, torch.float32)
    left, right = torch.randn((2, size, size), device=device).to(dtype)
    return 2 * size**3 / best_seconds(lambda: left @ right, device)


# Memory ---------------------------------------------------------------------------------------------------------------


@contextmanager
def host_memory(size: int, *, pinned: bool) -> Iterator[Tensor]:
    """Uninitialised uint8 host memory of exactly this size, where asked registered with CUDA so that kernels can read it.

    It is the engine's own host memory: huge pages where the system has them, pinned in chunks.

    Raises:
        HostMemoryError: it could not be pinned.
    """
    from specontext.kv.host_memory import HostMemory

    memory = HostMemory(size, pinned=pinned)
    memory.reach(size)
    try:
        yield memory.bytes
    finally:
        if pinned:
            torch.cuda.synchronize()
        memory.close()


def fill(tensor: Tensor, generator: torch.Generator, block: int = (1 << 24) - 8) -> Tensor:
    """Normally distributed numbers, in place; a contiguous tensor. The generator's device makes them.

    On a CPU one block of numbers is repeated; its length is no multiple of a row's, so rows differ.
    """
    flat = tensor.view(-1)
    device = generator.device
    numbers = (
        torch.empty(min(block, flat.numel()), dtype=torch.float32, device=device).normal_(generator=generator).to(flat.dtype)
    )
    for start in range(0, flat.numel(), block):
        part = flat[start : start + block]
        if start and device.type == "cuda":
            numbers.normal_(generator=generator)
        part.copy_(numbers[: len(part)])
    return tensor

"""Streams of work and what they wait for.

    compute      the model and everything it waits for
    prefetch     rows from the host into slots and staging tiles
    write-back   new rows of prompts, and layers on their way out, to the host
    statistics   counting, which nothing waits for before the end of a step

On a CPU there are none: everything happens in the order in which it is said. Only `Transfers` uses them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

COMPUTE, PREFETCH, WRITE_BACK, STATISTICS = "compute", "prefetch", "write-back", "statistics"
Mark = Any  # a point in a stream


class Streams(Protocol):
    """What orders work that runs beside the host and beside other work, out of whose reach the host's rows are for attention."""

    def on(self, stream: str) -> AbstractContextManager[None]:
        """Work that is started inside goes to this stream."""
        ...

    def record(self, stream: str) -> Mark:
        """Mark what the stream has been given so far."""
        ...

    def wait(self, stream: str, mark: Mark) -> None:
        """What the stream is given from now on waits for a mark of another stream."""
        ...

    def keep(self, stream: str, *tensors: Tensor) -> None:
        """The stream uses memory of tensors that were made elsewhere: it must not be given to others before that is done."""
        ...


class CudaStreams:
    """CUDA streams and events; compute is whichever stream is current, also one that is being captured into a graph."""

    def __init__(self, device: torch.device) -> None:
        # The few programs that move rows come before those of the layers: they finish early, and leave the device to them.
        self._side = {name: torch.cuda.Stream(device, priority=-1) for name in (PREFETCH, WRITE_BACK)}
        self._side[STATISTICS] = torch.cuda.Stream(device)

    def _stream(self, name: str) -> torch.cuda.Stream:
        return self._side.get(name) or torch.cuda.current_stream()

    @contextmanager
    def on(self, stream: str) -> Iterator[None]:
        with torch.cuda.stream(self._stream(stream)):
            yield

    def record(self, stream: str) -> Mark:
        return self._stream(stream).record_event()

    def wait(self, stream: str, mark: Mark) -> None:
        self._stream(stream).wait_event(mark)

    def keep(self, stream: str, *tensors: Tensor) -> None:
        for tensor in tensors:
            tensor.record_stream(self._stream(stream))


def streams_of(device: torch.device) -> Streams | None:
    """The streams of a device; None where it has none."""
    return CudaStreams(device) if device.type == "cuda" else None

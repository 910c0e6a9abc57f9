"""Host memory for KV: one range of addresses that is committed, and for a GPU pinned, chunk by chunk ahead of need.

The range is contiguous, so a row's address is its number times its size, in kernels as in PyTorch. Nothing is paid for what is
never reached: on a CPU the operating system commits pages as they are first written; for a GPU a thread pins the next chunks
while the engine works, since pinning a gigabyte takes up to half a second. Nothing can be launched while the driver pins: so a
chunk is committed before it is pinned, which leaves the driver only to pin it, and what nobody waits for is pinned in small
chunks, with pauses between them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from specontext.errors import HostMemoryError
from specontext.kv.nearby import stay_near

CHUNK = 1 << 25  # bytes that are pinned at once
AHEAD = 16  # chunks that are pinned beyond what is in use
PAUSE = 4.0  # after a chunk that nobody waits for, in the time that it took
PORTABLE_AND_MAPPED = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped
HUGE_PAGE = 1 << 21
POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, of Linux 5.14


class HostMemory:
    """A range of host memory.

    Args:
        num_bytes: length of the range; what is reached of it counts, not its length.
        pinned: the memory of a GPU's host tier, which its kernels read in place.
        near: the GPU on whose node pinned memory should lie.
        directory: where a file takes the place of memory; it has no name there and goes with this object.

    Raises:
        HostMemoryError: the range, or its first chunk, cannot be had.
    """

    def __init__(self, num_bytes: int, *, pinned: bool, directory: Path | None = None, near: torch.device | None = None) -> None:
        assert not (pinned and directory), "a GPU's kernels cannot read pages of a file"
        self.num_bytes, self.pinned = num_bytes, pinned
        region = _memory(num_bytes + HUGE_PAGE) if directory is None else _file(num_bytes + HUGE_PAGE, directory)
        whole = torch.frombuffer(region, dtype=torch.uint8)
        start = -whole.data_ptr() % HUGE_PAGE
        self.bytes: Tensor = whole[start : start + num_bytes]
        self._pins = _Pins(self.bytes.data_ptr(), num_bytes, near) if pinned else None
        if self._pins is not None:
            weakref.finalize(self, self._pins.release)
            self.reach(min(1, num_bytes))

    @property
    def ready_bytes(self) -> int:
        """Bytes, from the start, that can be used now without waiting."""
        return self.num_bytes if self._pins is None else self._pins.ready

    def reach(self, end: int) -> None:
        """Make the first `end` bytes usable, waiting where they are not pinned yet, and let the next chunks be pinned meanwhile.

        Raises:
            HostMemoryError: the system has no more memory to pin.
        """
        if self._pins is not None:
            self._pins.reach(end)

    def prepare(self, end: int) -> None:
        """Have the first `end` bytes, or all there are, made usable meanwhile, without waiting."""
        if self._pins is not None:
            self._pins.prepare(end)

    def finish(self) -> None:
        """Wait until all that is being made usable ahead of need is; where the system has no more, until that is known."""
        if self._pins is not None:
            self._pins.finish()

    def close(self) -> None:
        """Unpin; the memory must not be in use any more."""
        if self._pins is not None:
            self._pins.release()


def _memory(num_bytes: int) -> mmap.mmap:
    try:
        region = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise HostMemoryError(
            f"the host tier of KV asks for {num_bytes} bytes of memory and the system refuses them: lower --host-memory"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):  # rows are read at random: fewer pages, fewer misses in translation
        with suppress(OSError):
            region.madvise(mmap.MADV_HUGEPAGE)
    return region


def _file(num_bytes: int, directory: Path) -> mmap.mmap:
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # now, rather than a bus error when the disk is full later
            return mmap.mmap(file.fileno(), num_bytes)
    except OSError as error:
        raise HostMemoryError(
            f"the host tier of KV asks for a file of {num_bytes} bytes in {directory} ({error.strerror or error}): "
            "lower --host-memory, or name another directory with --offload-dir"
        ) from error


class _Pins:
    """Pins chunks in order, on a thread of its own that ends when it has nothing to do."""

    def __init__(self, address: int, num_bytes: int, near: torch.device | None) -> None:
        self.address, self.num_bytes, self.near = address, num_bytes, near
        self.ready, self.needed, self.wanted = 0, 0, 0  # needed: somebody waits
        self.error: str | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def prepare(self, end: int) -> None:
        with self._changed:
            self.wanted = min(self.num_bytes, max(self.wanted, -(-end // CHUNK) * CHUNK))
            if self.ready < self.wanted and self._thread is None and self.error is None:
                self._thread = threading.Thread(target=self._work, name="specontext-pin", daemon=True)
                self._thread.start()

    def reach(self, end: int) -> None:
        assert end <= self.num_bytes
        with self._changed:
            self.needed = max(self.needed, end)
            self._changed.notify_all()
        self.prepare(end + AHEAD * CHUNK)
        with self._changed:
            self._changed.wait_for(lambda: self.ready >= end or self.error is not None)
            if self.ready < end:
                raise HostMemoryError(
                    f"the host tier of KV could pin {self.ready} bytes of host memory and asks for {end} now, {self.num_bytes} "
                    f"at most ({self.error}): lower --host-memory, or raise the limit on locked memory (ulimit -l; "
                    "--ulimit memlock=-1 for a container)"
                )

    def finish(self) -> None:
        with self._changed:
            self.needed = max(self.needed, self.wanted)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._thread is None)

    def _work(self) -> None:
        if self.near is not None:  # who commits memory decides where it lies
            stay_near(self.near)
        pause = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(self._pressed, timeout=pause)
                if self.ready >= self.wanted or self.error is not None:
                    self._thread = None
                    self._changed.notify_all()
                    return
                start = self.ready
            size = min(CHUNK, self.num_bytes - start)
            commit(self.address + start, size)
            began = time.perf_counter()
            code = int(register(self.address + start, size))
            pause = PAUSE * (time.perf_counter() - began)
            with self._changed:
                if code:
                    self.error = f"CUDA error {code}"
                else:
                    self.ready = start + size
                self._changed.notify_all()

    def _pressed(self) -> bool:
        """Whether the thread has no time for a pause: somebody waits for memory, or nothing more is wanted."""
        return self.ready < self.needed or self.ready >= self.wanted

    def release(self) -> None:
        with self._changed:
            self.needed = self.wanted = 0  # stops the thread after the chunk it is at
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._thread is None, timeout=10)
            if self.ready:
                settle()  # copies may still be under way
            for start in range(0, self.ready, CHUNK):
                unregister(self.address + start)
            self.ready = 0


def settle() -> None:
    """Wait for whatever GPUs are doing; one that has failed does nothing any more."""
    if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
        with suppress(RuntimeError):
            torch.cuda.synchronize()


def commit(address: int, size: int) -> None:
    """Have the system find pages for memory that nobody has written yet, without holding Python's lock or the driver's; one huge
    page at a time, since who wants addresses of the system waits meanwhile."""
    advise = ctypes.CDLL(None).madvise
    for start in range(address, address + size, HUGE_PAGE):
        length = min(HUGE_PAGE, address + size - start)
        if advise(ctypes.c_void_p(start), ctypes.c_size_t(length), POPULATE_WRITE):  # an older kernel
            ctypes.memset(start, 0, length)


def register(address: int, size: int) -> int:
    """Pin host memory and map it for all devices; the CUDA error code, 0 for none."""
    return int(torch.cuda.cudart().cudaHostRegister(address, size, PORTABLE_AND_MAPPED))


def unregister(address: int) -> int:
    """Undo `register`; the CUDA error code, 0 for none."""
    return int(torch.cuda.cudart().cudaHostUnregister(address))

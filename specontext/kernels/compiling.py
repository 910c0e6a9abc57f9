"""Triton kernels compiled side by side.

A kernel is compiled when it is first launched, and the host waits: a step of twenty kernels waits twenty times. Here a step that
is to come is walked through first. Its kernels are handed to threads that compile them, and none is launched; what the walk
computes is nothing, in memory that is zero.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

THREADS = 8  # at most
AT_HAND = 0.3  # seconds in which kernels are there that were compiled before, and lie in Triton's cache
_walking = threading.Lock()


class Compilers:
    """Inside, as a context, Triton kernels that `walk` meets compile in threads of their own; they are there when it ends.

    On a CPU, and where Triton is missing or cannot do it (before 3.4), nothing happens.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: _Pool | None = None
        self._mode: Any = None

    def __enter__(self) -> Compilers:
        if self._device.type != "cuda":
            return self
        try:
            from triton.runtime._async_compile import AsyncCompileMode, active_mode
        except ImportError:
            return self
        if active_mode.get() is None:  # somebody else's
            self._pool = _Pool(self._device)
            # A kernel that cannot be compiled says so when it is launched, if ever it is.
            self._mode = AsyncCompileMode(self._pool, ignore_errors=True)
            self._mode.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._pool is not None:
            try:
                self._mode.__exit__(kind, error, traceback)
            finally:
                self._pool.shutdown()

    def walk(self, step: Callable[[], object]) -> bool:
        """Have all kernels compiled that a step launches.

        Args:
            step: it computes on the device, in this thread, and does not wait for what it computes. Nothing that it computes is
                to be kept.

        Returns:
            Whether there was something to compile; False where all was compiled before.
        """
        if self._pool is None:
            return False
        self._pool.begun.clear()
        with _nothing_launched(), _Zeros():
            step()
        return bool(wait(self._pool.begun, AT_HAND).not_done)


class _Pool(Executor):
    """Threads that compile. They load what they have compiled, too: that calls a C compiler and the driver."""

    def __init__(self, device: torch.device) -> None:
        threads = max(1, min(THREADS, (os.cpu_count() or 1) - 1))
        number = torch.cuda.current_device() if device.index is None else device.index
        self._threads = ThreadPoolExecutor(threads, "compile", initializer=torch.cuda.set_device, initargs=(number,))
        self.begun: list[Future[Any]] = []

    def submit(self, compile_kernel: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def loaded() -> Any:
            kernel = compile_kernel(*args, **kwargs)
            _ = kernel.run  # its launcher
            return kernel

        future = self._threads.submit(loaded)
        self.begun.append(future)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._threads.shutdown(wait, cancel_futures=cancel_futures)


@contextmanager
def _nothing_launched() -> Iterator[None]:
    """Inside, launches of our kernels by this thread compile them at most. Other packages' run: some are timed to be chosen."""
    from triton.runtime.jit import JITFunction

    here, ours = threading.get_ident(), __name__.partition(".")[0] + "."
    with _walking:
        run = JITFunction.run

        def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            only = threading.get_ident() == here and self.module.startswith(ours)
            return run(self, *args, grid=grid, warmup=warmup or only, **kwargs)

        JITFunction.run = compiled
        try:
            yield
        finally:
            JITFunction.run = run


class _Zeros(TorchDispatchMode):
    """Memory that nobody has written is zero: numbers of rows that a kernel would have put there may be used as such."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        return made.zero_() if func.overloadpacket in _EMPTY else made


_EMPTY = {getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")}

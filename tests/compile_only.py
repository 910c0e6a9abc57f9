"""A pytest plugin: kernels are compiled for Hopper instead of being run, by whichever Triton there is. A test passes when all of
those compile that it launches; what it says of results does not count.

    TRITON_INTERPRET=0 python -m pytest -p tests.compile_only tests/kernels
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)
broken: list[str] = []
run = JITFunction.run


class Driver:
    """Of a GPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compiled(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
    try:
        run(kernel, *args, grid=grid, warmup=True, **options)
    except Exception as error:
        broken.append(f"{kernel.fn.__module__}.{kernel.fn.__name__}: {error}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if call.when == "call" and report.outcome != "skipped":
        report.outcome, report.longrepr = ("failed", "\n".join(broken)) if broken else ("passed", None)
        broken.clear()
    return report


driver.set_active(Driver())
JITFunction.run = compiled

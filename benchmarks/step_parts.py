"""Where the time of a decode step goes, by the host's clock: for a CPU, where a call returns when its work is done."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from specontext.engine import decode as engine_decode
from specontext.kv.hot_slots import HotSlots
from specontext.kv.transfers import Transfers
from specontext.retrieval.methods import speculative

# Part, and the functions whose time it is. Time spent in another part's function counts for that part alone.
PARTS: tuple[tuple[str, Any, str], ...] = (
    ("linear layers", torch.nn.Linear, "forward"),
    ("head and scores", speculative.SpeculativeSelector, "select"),
    ("top-k", speculative, "choose"),
    ("plan", HotSlots, "plan"),
    ("loads", Transfers, "load"),
    ("append", Transfers, "append"),
    ("row numbers", Transfers, "rows"),
    ("attention", engine_decode, "sparse_attention"),
    ("attention", engine_decode, "paged_attention"),
)


class Stopwatch:
    """Own seconds of nested calls, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            self._inner.append(0.0)
            try:
                return call(*args, **kwargs)
            finally:
                whole = time.perf_counter() - began
                self.seconds[name] += whole - self._inner.pop()
                if self._inner:
                    self._inner[-1] += whole

        return run


@contextmanager
def watched(watch: Stopwatch) -> Iterator[None]:
    """Every part of a step is timed as long as this lasts."""
    with ExitStack() as stack:
        for name, owner, attribute in PARTS:
            stack.enter_context(patch.object(owner, attribute, watch.timed(name, getattr(owner, attribute))))
        yield


def seconds_by_part(step: Callable[[], Any], steps: int) -> dict[str, float]:
    """Median seconds of every part of a step and of the rest (modules, norms, statistics), after one step to warm up."""
    found = []
    for _ in range(steps + 1):
        watch = Stopwatch()
        with watched(watch):
            watch.timed("rest", step)()
        found.append(watch.seconds)
    names = dict.fromkeys([*(name for name, _, _ in PARTS), "rest"])
    return {name: statistics.median(one[name] for one in found[1:]) for name in names}

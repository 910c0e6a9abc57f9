"""No memory is given back while another stream still works on it.

A GPU's allocator gives a tensor's memory to whatever its own stream makes next, as soon as nobody in Python holds the tensor:
a stream beside it that still reads would read that. So whatever a side works on was made there, is kept for it, or is held until
its maker has waited for it. The engine runs on a CPU as it would on a GPU, with streams that only record; every operation of
PyTorch tells which tensors it works on, and when a storage is gone its maker must have waited for all who used it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specontext import LLM
from specontext.kv.streams import COMPUTE, PREFETCH, STATISTICS, WRITE_BACK
from tests.kv.test_streams import RecordingStreams


class LifetimeError(AssertionError):
    """Memory that is still used is given back."""


@dataclass
class Use:
    """What a stream has done last with the storage of another."""

    count: int
    what: str


class Lifetimes(TorchDispatchMode):
    """Watches which streams work on which storages, and when those go.

    Args:
        streams: say which stream works; what they keep for a stream is safe for it.
        forgetful: nothing is kept.
    """

    def __init__(self, streams: RecordingStreams, *, forgetful: bool = False) -> None:
        super().__init__()
        self.streams, self.forgetful = streams, forgetful
        self.alive: dict[int, tuple[StorageWeakRef, str, dict[str, Use]]] = {}  # address: storage, maker, uses of others
        self.safe: set[tuple[int, str]] = set()
        self.borrowed: set[tuple[str, str]] = set()  # (maker, user) that were seen
        streams.keep = self.keep  # type: ignore[method-assign]

    def keep(self, stream: str, *tensors: Tensor) -> None:
        if not self.forgetful:
            self.safe |= {(tensor.untyped_storage()._cdata, stream) for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.look()
        current, clocks = self.streams.current, self.streams.clocks
        clocks[current][current] = clocks[current].get(current, 0) + 1
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._use(tensor, current, str(func))
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), current, {}
        return result

    def _use(self, tensor: Tensor, current: str, what: str) -> None:
        storage = tensor.untyped_storage()
        found = self.alive.get(storage._cdata)
        if found is None:  # older than the first step that was watched: it belongs to the engine
            self.alive[storage._cdata] = StorageWeakRef(storage), "engine", {}
        elif found[1] not in (current, "engine"):
            self.borrowed.add((found[1], current))
            found[2][current] = Use(self.streams.clocks[current][current], what)

    def look(self) -> None:
        """Raises LifetimeError where a storage is gone and was still in use."""
        for address, (storage, maker, uses) in list(self.alive.items()):
            if storage.expired():
                del self.alive[address]
                for user, use in uses.items():
                    kept = (address, user) in self.safe
                    if not kept and self.streams.clocks[maker].get(user, 0) < use.count:
                        raise LifetimeError(f"{use.what} on {user} works on memory that {maker} has given back")
                self.safe -= {(address, user) for user in uses}


Run = Callable[..., Lifetimes]


@pytest.fixture
def run(
    make_llm: Callable[..., LLM], prompts: list[list[int]], greedy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Requests that join, decode, wait and leave, each watched step by itself, in memory that is new as on a GPU."""

    def new(purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    for module in [module for name, module in sys.modules.items() if name.startswith("specontext.k")]:
        if hasattr(module, "scratch"):
            monkeypatch.setattr(module, "scratch", new)

    def running(method: str = "speculative", *, forgetful: bool = False, **options: Any) -> Lifetimes:
        llm = make_llm("llama", method, **({"max_num_batched_tokens": 20, "max_model_len": 128} | options))
        streams = RecordingStreams()
        llm.engine.parts.kv.transfers.run_on(streams)
        for i, prompt in enumerate(prompts):
            llm.engine.add_request(str(i), prompt, greedy((14, 5, 9, 12)[i]))
        watched = Lifetimes(streams, forgetful=forgetful)
        while llm.engine.has_work:
            with watched:
                llm.engine.step()
        watched.look()
        return watched

    return running


ALL = {PREFETCH, WRITE_BACK, STATISTICS}


@pytest.mark.parametrize(
    ("method", "options", "sides"),
    [
        ("speculative", {"budget": 12, "slots": 14, "offload_layers": 2}, ALL),
        ("speculative", {"budget": 12, "slots": 14, "gpu_memory": 60_000, "host_memory": 400_000}, ALL),
        ("full", {"offload_layers": 2}, {PREFETCH, WRITE_BACK}),
        pytest.param("quest", {"budget": 24, "offload_layers": 2}, {WRITE_BACK}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_memory_outlives_its_uses(method: str, options: dict[str, Any], sides: set[str], run: Run) -> None:
    assert {user for maker, user in run(method, **options).borrowed if maker == COMPUTE} >= sides


@pytest.mark.parametrize("method", ["speculative", "full"])
def test_what_is_kept_has_to_be(method: str, run: Run) -> None:
    with pytest.raises(LifetimeError):
        run(method, forgetful=True, offload_layers=2, **({"budget": 12, "slots": 14} if method == "speculative" else {}))

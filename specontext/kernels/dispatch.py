"""How an operation runs: as a Triton kernel for tensors on a GPU, and as its PyTorch reference everywhere else, in memory that a
CPU uses again and again; and how numbers of the host get to a device.

`SPECONTEXT_KERNELS=torch` or `=triton` decides for all; Triton on CPU tensors needs its interpreter (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
import threading
from collections.abc import Callable, Sequence
from functools import cache, wraps
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from specontext.errors import SpeContextError
from specontext.installing import install_command

VARIABLE = "SPECONTEXT_KERNELS"
CHOICES = ("auto", "torch", "triton")
P = ParamSpec("P")
T = TypeVar("T")
_blocks = threading.local()


@cache
def _triton_is_there() -> bool:
    return importlib.util.find_spec("triton") is not None


def use_triton(tensor: Tensor) -> bool:
    """Whether an operation on `tensor` runs as a Triton kernel.

    Raises:
        SpeContextError: `SPECONTEXT_KERNELS` asks for what is not there.
    """
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in CHOICES:
        raise SpeContextError(f"{VARIABLE} is '{choice}': set it to one of {', '.join(CHOICES)}")
    if choice == "triton" and not _triton_is_there():
        raise SpeContextError(f"{VARIABLE} asks for Triton, which is not installed: {install_command('triton')}")
    return choice == "triton" or (choice == "auto" and tensor.is_cuda and _triton_is_there())


def upload(numbers: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of (nested) lists of numbers on a device, which the host does not wait for.

    What a GPU is given from now on finds it there, and its host memory, which is pinned, is not used again before it was copied.
    """
    gpu = device.type == "cuda"
    return torch.tensor(numbers, dtype=dtype, pin_memory=gpu).to(device, non_blocking=gpu)


def operation(decided_by: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Makes a reference an operation: the reference runs on a CPU, and the Triton kernel for tensors on a GPU.

    The kernel is the function of the same name, with the same parameters, in the file of the same name in `kernels/triton/`. No
    kernel takes what decides in float64: that is left to the reference on any device.

    Args:
        decided_by: the parameter whose device decides: a tensor, or 'parameter.attribute' for one inside of it.
    """

    def decorate(reference: Callable[P, T]) -> Callable[P, T]:
        module = reference.__module__.replace(".kernels.", ".kernels.triton.")
        name, _, attribute = decided_by.partition(".")
        place = list(inspect.signature(reference).parameters).index(name)

        @wraps(reference)
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            decider: Any = args[place] if place < len(args) else kwargs[name]
            tensor = getattr(decider, attribute) if attribute else decider
            if tensor.dtype == torch.float64 or not use_triton(tensor):
                return reference(*args, **kwargs)
            kernel: Callable[P, T] = getattr(import_module(module), reference.__name__)
            return kernel(*args, **kwargs)

        return run

    return decorate


def reference_of(operation: Callable[P, T]) -> Callable[P, T]:
    """The reference of an operation."""
    return inspect.unwrap(operation)


def scratch(purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor of this shape that holds anything, and is overwritten when its purpose is asked for again.

    On a CPU every thread has one block for each purpose, which grows to the largest request: fresh memory costs more than what is
    done in it. Sparse attention over 28 x 8 x 1,024 bfloat16 rows took 36 to 50 ms with a new buffer a layer and 28 ms with the
    same one. Callers ask for a few MiB at a time, whatever the batch or the context. On other devices memory is new: their
    allocators cost nothing, and a captured graph must own what it writes.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    blocks: dict[str, Tensor] = _blocks.__dict__
    block = blocks.get(purpose)
    if block is None or len(block) < size:
        with torch.inference_mode(False):  # or it could not be written outside of inference mode
            block = blocks[purpose] = torch.empty(size, dtype=torch.uint8)
    return block[:size].view(dtype).view(shape)

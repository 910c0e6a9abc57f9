"""Which implementation of a kernel runs: Triton for tensors on a GPU, the PyTorch reference everywhere else.

`SPECONTEXT_KERNELS=torch` or `=triton` decides for all; Triton on CPU tensors needs its interpreter (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from specontext.core import SpeContextError

VARIABLE = "SPECONTEXT_KERNELS"
CHOICES = ("auto", "torch", "triton")
P = ParamSpec("P")
T = TypeVar("T")


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
        raise SpeContextError(f"{VARIABLE} asks for Triton, which is not installed: pip install 'specontext[triton]'")
    return choice == "triton" or (choice == "auto" and tensor.is_cuda and _triton_is_there())


def operation(decided_by: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Makes a reference an operation: the reference runs on a CPU, and the Triton kernel for tensors on a GPU.

    The kernel is the function of the same name, with the same parameters, in the file of the same name in `kernels/triton/`.

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
            if not use_triton(getattr(decider, attribute) if attribute else decider):
                return reference(*args, **kwargs)
            kernel: Callable[P, T] = getattr(import_module(module), reference.__name__)
            return kernel(*args, **kwargs)

        return run

    return decorate


def reference_of(operation: Callable[P, T]) -> Callable[P, T]:
    """The reference of an operation."""
    return inspect.unwrap(operation)

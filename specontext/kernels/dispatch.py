"""Which implementation of a kernel runs: Triton for tensors on a GPU, the PyTorch reference everywhere else.

`SPECONTEXT_KERNELS=torch` or `=triton` decides for all; Triton on CPU tensors needs its interpreter (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache

from torch import Tensor

from specontext.core import SpeContextError
from specontext.installing import install_command

VARIABLE = "SPECONTEXT_KERNELS"
CHOICES = ("auto", "torch", "triton")


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

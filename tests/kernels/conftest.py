"""Without a GPU the Triton kernels run in the interpreter; the switch must be set before Triton is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

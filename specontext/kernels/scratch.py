"""Memory that the CPU kernels use again and again for their tiles.

On a CPU fresh memory costs more than what is done in it: sparse attention over 28 x 8 x 1,024 bfloat16 rows took 36 to 50 ms with
a new buffer a layer and 28 ms with the same one. Callers ask for a few MiB at a time, whatever the batch or the context, so
what is kept is bounded by their tile sizes.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_blocks = threading.local()


def scratch(purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous tensor of this shape that holds anything, and is overwritten when its purpose is asked for again.

    On a CPU every thread has one block for each purpose, which grows to the largest request. On other devices memory is new:
    their allocators cost nothing, and a captured graph must own what it writes.
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

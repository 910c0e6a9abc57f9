"""The machine that something was measured on."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from specontext.memory.tiers import free_memory


def machine(device: torch.device) -> dict[str, Any]:
    """What speed and room depend on; bytes of memory."""
    found: dict[str, Any] = {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "host_memory_free": free_memory(torch.device("cpu")),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory": properties.total_memory, "cuda": torch.version.cuda}
    return found

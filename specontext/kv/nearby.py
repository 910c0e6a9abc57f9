"""The CPUs beside a GPU: memory that they touch first lies on their node, and the GPU reads it over the shortest way."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

DEVICES = Path("/sys/bus/pci/devices")


def stay_near(device: torch.device) -> None:
    """Keep the calling thread, and threads and processes that it starts, on the CPUs of a GPU's node, where these are known."""
    if (own := cpus_near(device)) and hasattr(os, "sched_setaffinity"):
        with suppress(OSError):  # a container may forbid it
            os.sched_setaffinity(0, own)


def cpus_near(device: torch.device) -> set[int]:
    """CPUs of a GPU's node that this thread may use; empty where the system does not say, and on a machine of one node."""
    if device.type != "cuda" or not hasattr(os, "sched_getaffinity"):
        return set()
    found: Any = torch.cuda.get_device_properties(device)  # its stubs lack where it is
    if not hasattr(found, "pci_bus_id"):  # an older PyTorch
        return set()
    address = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
    own = cpus_of(address) & os.sched_getaffinity(0)
    return own if own != os.sched_getaffinity(0) else set()


def cpus_of(address: str, devices: Path = DEVICES) -> set[int]:
    """CPUs on the node of a PCI device, as the kernel lists them ('0-3,8'); empty where it does not."""
    try:
        listed = (devices / address / "local_cpulist").read_text().strip()
        spans = [span.split("-") for span in listed.split(",") if span]
        return {cpu for span in spans for cpu in range(int(span[0]), int(span[-1]) + 1)}
    except (OSError, ValueError):
        return set()

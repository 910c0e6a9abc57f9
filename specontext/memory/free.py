"""How much memory is free for this process: what the host has and its control groups leave, and what a GPU has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PROC = Path("/proc")
CONTROL_GROUPS = Path("/sys/fs/cgroup")
UNIFIED = ("memory.max", "memory.high"), "memory.current", "inactive_file"  # version 2
FORMER = ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"  # version 1


def free_gpu_memory(device: torch.device) -> int:
    """Bytes that PyTorch can still take of a GPU: what is free there, but no more than this process may have of it."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    allowed = allowed_gpu_memory(device)
    return free if allowed == total else max(0, min(free, allowed - torch.cuda.memory_reserved(device)))


def allowed_gpu_memory(device: torch.device) -> int:
    """Bytes of a GPU that this process may have: all, or the share that `torch.cuda.set_per_process_memory_fraction` was told,
    which the GPU itself does not know."""
    import torch

    share = torch.cuda.get_per_process_memory_fraction(device.index)  # which takes no device without a number
    return int(share * torch.cuda.mem_get_info(device)[1])


def free_host_memory(proc: Path = PROC, control_groups: Path = CONTROL_GROUPS) -> int:
    """Bytes that can be allocated: the lesser of what the system calls available and of what is left in each control group.

    A container's limit is that of a control group, and /proc tells nothing of it. Pages of files count as free, as the kernel
    gives them up first. Where nothing tells (no Linux), it is the whole memory.
    """
    return max(0, min([available(proc), *left_in_groups(proc, control_groups)]))


def available(proc: Path = PROC) -> int:
    """Bytes that the system has for new allocations, without swapping; its whole memory where it does not tell."""
    for line in _lines(proc / "meminfo"):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def left_in_groups(proc: Path = PROC, control_groups: Path = CONTROL_GROUPS) -> Iterator[int]:
    """Bytes left below the limit of each control group that this process is in, from its own up to the root."""
    for line in _lines(proc / "self" / "cgroup"):  # number:controllers:path, without controllers for version 2
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if not path:
            continue
        if not controllers:
            for root in (control_groups, control_groups / "unified"):
                yield from _left(root, path, *UNIFIED)
        elif "memory" in controllers.split(","):
            yield from _left(control_groups / "memory", path, *FORMER)


def _left(root: Path, path: str, limits: tuple[str, ...], usage: str, reclaimable: str) -> Iterator[int]:
    """Bytes left in a group and in those around it, as far as they can be seen here: a container sees its own as the root."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        group = root.joinpath(*parts[:depth])
        least = min((limit for name in limits if (limit := _number(group / name)) is not None), default=None)
        used = _number(group / usage)
        if least is not None and used is not None:
            yield least - used + _of_table(group / "memory.stat", reclaimable)


def _number(file: Path) -> int | None:
    """What a file says, None where there is none or it says 'max'."""
    lines = _lines(file)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _of_table(file: Path, name: str) -> int:
    """The value behind a name in a file of such lines, 0 where it is not there."""
    for line in _lines(file):
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []

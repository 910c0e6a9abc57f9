"""What a machine reaches, measured once and kept in the cache directory: bandwidths of a GPU, and of pieces of pinned memory.

A CPU is not measured: both of its tiers are the same memory. What was measured decides how many requests run at once and where KV
lives, and never what a request reads.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from specontext.gguf.cache import cache_folder
from specontext.memory.free import free_gpu_memory
from specontext.memory.step_time import CPU, MachineSpeed, known_machine

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("specontext")

VERSION = 1  # of what is measured: files of others are measured anew
POOL = 1 << 28  # bytes of host memory in which pieces are read, pinned for the time of the probe
LEAST_POOL = 1 << 20
PIECE = 2048  # bytes
PIECES = 1 << 15  # of one timed read
READ = 1 << 32  # bytes of the device's memory that are read
REPEATS = 5
PATIENCE = 60.0  # seconds for another process that measures
LEAST_PINNED = POOL  # bytes; with less the host tier is of no use to layers
SLOW_BUS = 4e9  # bytes a second of pieces, below which no layer leaves the device: an H100's reach 50e9


def machine_speed(device: torch.device, folder: Path | None = None) -> MachineSpeed:
    """What this machine reaches with a device: as it was measured before, else measured now, in less than a second.

    Args:
        folder: where it is kept; None is `machines` in the cache directory.
    """
    if device.type != "cuda":
        return CPU
    import torch

    name = torch.cuda.get_device_name(device)
    file = (folder or speeds_folder()) / f"{_node()}-{_in_a_name(name)}.json"
    if (found := _speed_of(file, name)) is not None:
        return found
    with _alone(file):
        if (found := _speed_of(file, name)) is not None:
            return found
        found = probe(device)
        with suppress(OSError):  # it is measured again next time
            write_speed(file, found)
    logger.info(
        "%s: reads its memory at %.2f TB/s, pieces of pinned host memory at %.1f GB/s (kept in %s)",
        name,
        found.device / 1e12,
        found.host / 1e9,
        file,
    )
    return found


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Nobody else measures inside: engines that start together would have half of each other's bus, and keep that.

    Where the folder takes no lock, or somebody has it for longer than measuring can take, nobody waits.
    """
    from filelock import FileLock

    lock = FileLock(file.with_suffix(".lock"))
    with suppress(OSError, NotImplementedError):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=PATIENCE)
    try:
        yield
    finally:
        lock.release()


def _speed_of(file: Path, name: str) -> MachineSpeed | None:
    """What a file says of a GPU with this name."""
    found = read_speed(file)
    return found if found is not None and found.name == name else None


def kept_speeds(folder: Path | None = None) -> list[MachineSpeed]:
    """The GPUs of this machine that were measured; other machines may keep theirs in the same folder."""
    place = folder or speeds_folder()
    try:
        files = sorted(place.iterdir())
    except OSError:
        return []
    known = [(file, found) for file in files if file.suffix == ".json" and (found := read_speed(file)) is not None]
    return [found for file, found in known if file.stem == f"{_node()}-{_in_a_name(found.name)}"]


def speeds_folder() -> Path:
    """Where measurements are kept."""
    return cache_folder() / "machines"


def _node() -> str:
    return _in_a_name(platform.node() or "host")


def _in_a_name(words: str) -> str:
    """Words as a part of a file's name."""
    return words.replace(" ", "-").replace("/", "-")


def read_speed(file: Path) -> MachineSpeed | None:
    """What a file says; None where there is none, it is broken, or it is another version's."""
    try:
        values = json.loads(file.read_text())
        if values.pop("version") != VERSION or set(values) != {one.name for one in fields(MachineSpeed)}:
            return None
        speed = MachineSpeed(**values)
        return speed if _can_be(speed) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _can_be(speed: MachineSpeed) -> bool:
    """Whether these are numbers of a machine."""
    rates, seconds = (speed.device, speed.host, speed.products), (speed.layer_s, speed.offloaded_s, speed.step_s)
    numbers = (*rates, *seconds, speed.piece, 0 if speed.pinned is None else speed.pinned)
    return (
        isinstance(speed.name, str)
        and all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
        and min(rates) > 0
        and min(numbers) >= 0
        and all(isinstance(count, int) for count in (speed.piece, speed.pinned or 0))
    )


def write_speed(file: Path, speed: MachineSpeed) -> None:
    """Keep it, whole or not at all, whoever writes at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
    draft = Path(name)
    try:
        with os.fdopen(handle, "w") as stream:
            json.dump({"version": VERSION, **asdict(speed)}, stream)
        draft.chmod(0o644)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def probe(device: torch.device) -> MachineSpeed:
    """Measure a GPU. Launches are those of a known one: they hardly differ."""
    import torch

    from specontext.memory.speed import best_seconds, measure_products

    known = known_machine(torch.cuda.get_device_name(device))
    block = torch.ones(min(READ, free_gpu_memory(device) // 4) // 4, dtype=torch.float32, device=device)
    read = block.numel() * 4 / best_seconds(device, block.sum, REPEATS)
    del block
    products = measure_products(device, torch.bfloat16, 4096)
    host, pinned = _pieces(device)
    torch.cuda.empty_cache()
    return replace(known, name=torch.cuda.get_device_name(device), device=read, host=host, products=products, pinned=pinned)


def _pieces(device: torch.device) -> tuple[float, int]:
    """Bytes a second of random pieces of pinned memory, and how much could be pinned; almost nothing where none could be."""
    import torch

    from specontext.kernels.rows import gather_rows
    from specontext.memory.speed import best_seconds

    size, pool = POOL, None
    while pool is None and size >= LEAST_POOL:
        try:
            pool = torch.empty((size // PIECE, 2, PIECE // 4), dtype=torch.bfloat16, pin_memory=True)
        except RuntimeError:  # more than the container may lock
            size //= 2
    if pool is None:
        return 1.0, 0
    chosen = torch.randint(len(pool), (PIECES,), device=device)
    target = torch.empty((PIECES, *pool.shape[1:]), dtype=pool.dtype, device=device)
    place = torch.arange(PIECES, device=device)
    gather_rows(pool, chosen, target, place)  # compiles the kernel
    speed = PIECES * PIECE / best_seconds(device, partial(gather_rows, pool, chosen, target, place), REPEATS)
    del pool
    if hasattr(torch._C, "_host_emptyCache"):  # else PyTorch keeps it pinned
        torch._C._host_emptyCache()
    return speed, size


def why_kv_stays(speed: MachineSpeed) -> str | None:
    """Why no layer's KV should leave a GPU of this machine, in words; None where it may."""
    if speed.pinned is not None and speed.pinned < LEAST_PINNED:
        return f"only {speed.pinned >> 20} MiB of host memory could be pinned (in a container: --ulimit memlock=-1)"
    if speed.host < SLOW_BUS:
        return f"pieces of host memory come at {speed.host / 1e9:.2f} GB/s only"
    return None

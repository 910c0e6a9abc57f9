"""How much memory each tier of an engine may have, in which number formats, and which wishes about it cannot be met."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from specontext.checkpoints.files import user_path
from specontext.config import EngineConfig, SpeContextConfig
from specontext.errors import ConfigError, MemoryPlanError
from specontext.kernels.quantised_rows import FORMATS
from specontext.memory.free import allowed_gpu_memory, free_gpu_memory
from specontext.memory.model import MemoryModel
from specontext.memory.probe import LEAST_PINNED, why_kv_stays
from specontext.memory.step_time import MachineSpeed
from specontext.memory.tiers import SHARE_OF_FREE_MEMORY, free_memory
from specontext.model_shape import ModelShape
from specontext.retrieval.head import RetrievalHead

logger = logging.getLogger("specontext")
SHARE_OF_GPU = 0.9  # that the engine may use where nothing was said


def with_kv_where_it_can_be(method: SpeContextConfig, machine: MachineSpeed) -> SpeContextConfig:
    """The same settings, with all KV on the device where a machine's host tier is of no use to layers and nothing else was asked
    for. A warning says so."""
    why = why_kv_stays(machine)
    if why is None or method.offload_layers == 0:
        return method
    if method.offload_layers is not None:
        logger.warning("%s: layers on the host, as offload_layers asks for, will be slow or fail", why)
        return method
    logger.warning("%s: the KV of all layers stays on the device, and requests wait where it is full", why)
    return replace(method, offload_layers=0)


def beside_known(shape: ModelShape, plan: MemoryModel, head: RetrievalHead | None) -> int:
    """Bytes that are kept of a page of a known prompt besides the KV that grows: the head's keys, what it has seen of the last
    token, and the rows of layers with a window."""
    windowed = sum(window is not None for window in shape.windows) if shape.windowed else 0
    seen = 0 if head is None else head.config.hidden_size * shape.dtype.itemsize
    return plan.kv.page_size * (plan.kv.common_token + windowed * plan.kv.resident_token) + seen


def pinnable(host_memory: int, machine: MachineSpeed, plan: MemoryModel) -> int:
    """Bytes of the host tier: where little can be pinned no more than that, and one page at least."""
    if machine.pinned is None or machine.pinned >= LEAST_PINNED:
        return host_memory
    return min(host_memory, max(machine.pinned, plan.kv.host_page))


def with_kv_formats(config: EngineConfig, shape: ModelShape, device: torch.device) -> ModelShape:
    """The shape with the number formats of KV in both tiers.

    Raises:
        ConfigError: the model's heads, or the GPU, cannot have them.
    """
    host = config.host_kv_dtype if config.host_in_8_bits else "auto"
    for setting, name in (("kv_cache_dtype", config.kv_cache_dtype), ("host_kv_dtype", host)):
        if name == "auto":
            continue
        shape.check_kv_format(f"{setting} {name}")
        if name == "fp8" and device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < (8, 9):
            raise ConfigError(
                f"{setting} fp8 needs a GPU of compute capability 8.9, and this one has {found[0]}.{found[1]}: set it to int8"
            )
    return replace(shape, kv_dtype=FORMATS.get(config.kv_cache_dtype), host_kv_dtype=FORMATS.get(host))


def check_host_format(config: EngineConfig, method: SpeContextConfig, layers: int) -> None:
    """Raises ConfigError where known prompts would come back to layers on the device in the host's 8 bits."""
    if config.host_in_8_bits and config.enable_prefix_caching and method.offload_layers != layers:
        raise ConfigError(
            f"host_kv_dtype {config.host_kv_dtype} would give the {layers - (method.offload_layers or 0)} layers on the device "
            "known prompts in 8 bits: set offload_layers to -1, or enable_prefix_caching to False"
        )


def check_offload_dir(directory: Path) -> None:
    """Raises ConfigError, which names the directory, where no file can be made in it."""
    user_path(directory, ConfigError)
    if not directory.is_dir():
        raise ConfigError(f"offload_dir {directory} is not a directory: make it, or name another")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(f"offload_dir {directory} cannot be written to: change its permissions, or name another")


def host_default(config: EngineConfig) -> int:
    """Bytes of the host tier where none were named: a share of what is free in memory, or on the disk of `offload_dir`."""
    if config.offload_dir is None:
        return int(SHARE_OF_FREE_MEMORY * free_memory(torch.device("cpu")))
    check_offload_dir(config.offload_dir)
    return int(SHARE_OF_FREE_MEMORY * shutil.disk_usage(config.offload_dir).free)


def gpu_limit(config: EngineConfig, device: torch.device) -> int:
    """Bytes that the engine may use of a GPU: what was asked for, as far as this process may have it."""
    total = torch.cuda.mem_get_info(device)[1]
    asked = config.gpu_memory or int((config.gpu_memory_utilization or SHARE_OF_GPU) * total)
    return min(asked, allowed_gpu_memory(device))


def device_memory(config: EngineConfig, plan: MemoryModel, device: torch.device) -> int:
    """Bytes of the device tier of KV: on a GPU what the engine's limit leaves beside weights, buffers and tables.

    On a CPU, where these are ordinary memory, the limit is the tier's own.
    """
    if device.type == "cpu":
        if config.gpu_memory_utilization is not None:
            raise ConfigError("gpu_memory_utilization needs a GPU: on a CPU give gpu_memory, the bytes of the device tier of KV")
        if (tables := plan.fixed["tables"]) > (free := free_memory(device)):
            budget = config.method.budget is not None
            lower = "max_model_len, max_num_seqs or the budget" if budget else "max_model_len or max_num_seqs"
            raise MemoryPlanError(
                f"tables for {config.max_num_seqs} requests of the longest context need {tables} bytes of memory, and {free} are "
                f"free: set {lower} lower"
            )
        return config.gpu_memory or int(SHARE_OF_FREE_MEMORY * free_memory(device))
    free, total = free_gpu_memory(device), torch.cuda.mem_get_info(device)[1]
    # Weights are there already. What PyTorch keeps beside what is in use will be used; what others use of it is theirs.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free += kept + plan.fixed["weights"] + plan.fixed["retrieval_head"]
    limit = gpu_limit(config, device)
    others, parts = plan.fixed_bytes, ", ".join(f"{name} {size}" for name, size in plan.fixed.items())
    if limit < others and limit == allowed_gpu_memory(device) < total:
        raise MemoryPlanError(
            f"this process may have {limit} bytes of the GPU and {others} are needed beside KV ({parts}): let it have more "
            "(torch.cuda.set_per_process_memory_fraction)"
        )
    if limit < others:
        raise MemoryPlanError(
            f"--gpu-memory allows {limit} bytes and {others} are needed beside KV ({parts}): raise it by more than "
            f"{others - limit}"
        )
    if (config.gpu_memory or 0) > total:
        logger.warning("--gpu-memory names %d bytes and the GPU has %d: what is free of them is used", config.gpu_memory, total)
    elif free < limit:  # raising the limit would change nothing
        logger.warning("the engine may use %d bytes of the GPU and %d of them are free: end what else uses it", limit, free)
    if free < others:
        raise MemoryPlanError(f"the GPU has {free} bytes free and {others} are needed beside KV ({parts}): end what else uses it")
    return min(limit, free) - others

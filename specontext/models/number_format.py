"""In which number format weights run where nobody said (`--dtype auto`)."""

from __future__ import annotations

import logging
import platform

import torch
from transformers import PreTrainedConfig

from specontext.config import DTYPES
from specontext.errors import ConfigError
from specontext.memory.facts import count_parameters, weight_bytes
from specontext.memory.tiers import free_memory

logger = logging.getLogger("specontext")
# What a CPU must be able to do to multiply matrices of a format without unpacking every number. Without it they run several times
# slower than in float32 (a prompt in float16: four times).
NATIVE = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}
SHARE_OF_FREE = 0.5  # that weights of twice the size may take


def running_format(asked: str, config: PreTrainedConfig, device: torch.device) -> str:
    """The number format by name; 'auto' for the checkpoint's own.

    A 16-bit checkpoint runs in float32 on an x86 CPU that has no arithmetic of its format, if its weights then take at most half
    of the free memory. What was asked for is never changed.

    Raises:
        ConfigError: no such format.
    """
    if asked not in DTYPES:
        raise ConfigError(f"unknown dtype '{asked}': choose one of {', '.join(DTYPES)}")
    stored = config.dtype
    if asked != "auto" or device.type != "cpu" or stored not in NATIVE or _has_arithmetic(stored):
        return asked
    if weight_bytes(count_parameters(config)[0], torch.float32) > SHARE_OF_FREE * free_memory(device):
        return asked
    name = str(stored).removeprefix("torch.")
    logger.info("this CPU has no %s arithmetic: the weights run in float32 (--dtype %s keeps their format)", name, name)
    return "float32"


def _has_arithmetic(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies this format natively; other kinds of CPU than x86 are believed to."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return not able or any(able.get(name) for name in NATIVE[dtype])

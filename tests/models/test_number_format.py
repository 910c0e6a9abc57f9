"""In which number format a checkpoint runs where nobody said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from specontext.models import number_format
from specontext.models.loading import load_model


@pytest.fixture
def stored(write_family: Callable[..., Path]) -> Callable[[torch.dtype], Path]:
    def write(dtype: torch.dtype) -> Path:
        folder = write_family("llama")
        load_model(folder, dtype=str(dtype).removeprefix("torch."), device=torch.device("cpu")).model.save_pretrained(folder)
        return folder

    return write


def ran_in(folder: Path, dtype: str = "auto") -> torch.dtype:
    return load_model(folder, dtype=dtype, device=torch.device("cpu")).shape.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cpu_without_the_formats_arithmetic_runs_in_float32(dtype: torch.dtype, stored: Any, monkeypatch: Any) -> None:
    folder = stored(dtype)
    able: dict[str, bool] = {"avx2": True}
    monkeypatch.setattr(number_format.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert ran_in(folder) == torch.float32
    assert ran_in(folder, str(dtype).removeprefix("torch.")) == dtype
    with monkeypatch.context() as patch:
        patch.setattr(number_format, "free_memory", lambda device: 1000)
        assert ran_in(folder) == dtype
    able[number_format.NATIVE[dtype][0]] = True
    assert ran_in(folder) == dtype
    able.clear()  # a CPU that cannot be asked
    assert ran_in(folder) == dtype


def test_float32_stays_float32(checkpoint: Any) -> None:
    assert ran_in(checkpoint("llama")) == torch.float32

"""A model whose code waits for the GPU is found before its steps are captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from specontext import LLM
from specontext.engine.capturable import why_not_captured

MakeLLM = Callable[..., LLM]


@pytest.fixture
def sync_debug(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands in for a GPU's mode in which whatever waits for it raises; its last element is the mode."""
    modes: list[Any] = [0]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    return modes


@pytest.mark.parametrize("kind", ["llama", "windows", "latents", "shared"])
def test_models_that_do_not_wait_are_captured(kind: str, make_llm: MakeLLM, sync_debug: list[Any]) -> None:
    loaded = make_llm(kind, "full").engine.loaded
    assert why_not_captured(loaded) is None
    assert sync_debug == [0, "error", 0], "what was there before comes back"


def test_what_waits_in_a_step_is_named_and_what_waits_once_is_not(
    make_llm: MakeLLM, sync_debug: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = make_llm("llama", "full").engine.loaded
    layer = loaded.model.model.layers[1].mlp
    forward, seen = layer.forward, 0

    def waits(hidden: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        if sync_debug[-1] == "error" and waiting:
            raise RuntimeError("called a synchronizing CUDA operation\nand more")
        return forward(hidden)

    monkeypatch.setattr(layer, "forward", waits)
    waiting = False
    assert why_not_captured(loaded) is None and seen == 2
    waiting = True
    assert why_not_captured(loaded) == "called a synchronizing CUDA operation"
    assert sync_debug[-1] == 0

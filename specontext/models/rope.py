"""Angles of RoPE that would follow the longest position of a batch (types `dynamic` and `longrope`), fixed for one length.

Requests of one batch would change each other, a stored key would have other angles than a later query, and a captured step cannot
ask how long its requests are. So an engine has the angles that the library has for the engine's longest context, for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

FIXED = {"dynamic": "default", "longrope": "default"}
OWN = "specontext_rope_type"  # attribute of a module whose angles are fixed: what its type is


def fix_rope(model: PreTrainedModel, longest: int) -> None:
    """Give a model the angles that it has in the library with a batch of `longest` positions, and keep them.

    A model that has other ones fixed gets these instead.
    """
    for module in moving_rope(model):
        kind = module.__dict__.setdefault(OWN, module.__dict__["rope_type"])
        module.__dict__["rope_type"] = kind
        _forget(module)
        last = torch.tensor([[longest - 1]], device=model.device)
        for layers in kind if isinstance(kind, dict) else [None]:
            module(torch.zeros(1, device=model.device), last, *([] if layers is None else [layers]))
        module.__dict__["rope_type"] = _fixed(kind)


def _forget(module: nn.Module) -> None:
    """Undo what a longer batch has made of a module's angles: the library does so itself in some versions only."""
    for name in [name for name in module._buffers if name.endswith("inv_freq")]:
        prefix = name.removesuffix("inv_freq").removesuffix("original_")
        original = getattr(module, f"{prefix}original_inv_freq", None)
        here = module._buffers[name]
        if original is not None and here is not None:
            module._buffers[name] = original.to(here.device)
    for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
        vars(module)[name] = vars(module).get("original_max_seq_len", vars(module)[name])


def moving_rope(model: PreTrainedModel) -> list[nn.Module]:
    """The modules whose angles would follow the longest position of a batch, or would if they were not fixed."""
    kinds = ((module, getattr(module, OWN, getattr(module, "rope_type", None))) for module in model.modules())
    return [module for module, kind in kinds if isinstance(kind, str | dict) and _fixed(kind) != kind]


class LentRope:
    """Such modules of a model that its owner goes on using: what an engine makes of them is theirs inside of `lent` only."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list(modules)
        self._engine_s: list[dict[str, Any]] | None = None

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Inside, the modules are as they were when an engine had them last; at first as their owner has them."""
        owner_s = [_state(module) for module in self._modules]
        for module, state in zip(self._modules, self._engine_s or [_state(module) for module in self._modules], strict=True):
            _put(module, state)
        try:
            yield
        finally:
            self._engine_s = [_state(module, copied=False) for module in self._modules]
            for module, state in zip(self._modules, owner_s, strict=True):
                _put(module, state)


def _state(module: nn.Module, *, copied: bool = True) -> dict[str, Any]:
    """Attributes of a module; the library writes to the buffers themselves, so they are copied where another may go on."""
    buffers = {name: one.clone() if copied and one is not None else one for name, one in module._buffers.items()}
    return {**vars(module), "_buffers": buffers}


def _put(module: nn.Module, state: dict[str, Any]) -> None:
    vars(module).clear()
    vars(module).update(state)


def _fixed(kind: Any) -> Any:
    """A type of RoPE, or those of several kinds of layers, with what moves made constant."""
    return {layers: _fixed(own) for layers, own in kind.items()} if isinstance(kind, dict) else FIXED.get(kind, kind)

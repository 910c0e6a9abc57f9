"""Modules through torch.compile, while a step is being captured: norms, rotary embedding, activations and residuals fuse.

Modelling code stays as it is. Attention is a call out of the compiled code, so each decoder layer compiles to what comes before
and what comes after it, and all layers share these two. Replayed graphs hold the fused kernels; nothing else runs compiled, so
prompts of any length never wait for a compiler.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class CompiledModules:
    """Modules, many of them alike, that are compiled when they are first run inside `use`: once for one token, where
    products become reductions, which read weights at full speed, and once for any other number of tokens."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list(modules)
        self._forwards: dict[bool, list[Any]] = {}

    @contextmanager
    def use(self, tokens: int) -> Iterator[None]:
        """Inside, the modules run compiled for that many tokens."""
        single = tokens == 1
        if single not in self._forwards:
            if not self._forwards:
                # What the compiler has looked at stays in cycles, and the modules with it, until they are searched for.
                weakref.finalize(self, gc.collect).atexit = False
            self._forwards[single] = self._compiled(single)
        try:
            for module, forward in zip(self._modules, self._forwards[single], strict=True):
                module.forward = forward
            yield
        finally:
            for module in self._modules:
                del module.forward

    def _compiled(self, single: bool) -> list[Any]:
        # Alike modules differ in their weights only, which are inputs of the compiled code; a limit counts them all the same.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(self._modules))
        # Tuning the kernels takes half of the time of compiling, and with several tokens it gains nothing.
        options: dict[str, Any] = {"coordinate_descent_tuning": single}
        return [torch.compile(module.forward, options=options, dynamic=not single) for module in self._modules]
